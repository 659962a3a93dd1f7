"""What commands train on: pictures as they are read, the schedule of a model's training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from fastlora.commands import CommandError
from fastlora.commands.targets import pictures, schedule_of


def test_pictures_are_cut_to_the_middle_and_scaled(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = pictures([tmp_path / "wide.png"], 4, "RGB")
    assert found.shape == (1, 3, 4, 4) and found.dtype == torch.float32
    assert found[..., 1:3].min() > 0.95  # the white middle; its edge rings with the filter
    assert pictures([tmp_path / "wide.png"], 4, "L").shape == (1, 1, 4, 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB with a transparent colour"])
def test_what_is_transparent_is_white(tmp_path, mode):
    """Above: red, there; below: red again, or black, that nobody is to see."""
    values = np.zeros((8, 8, 4), np.uint8)
    values[:4] = (255, 0, 0, 255)
    picture = Image.fromarray(values)
    options = {}
    if mode == "P":
        picture = Image.fromarray((values[..., 3] == 0).astype(np.uint8))
        picture = Image.frombytes("P", (8, 8), picture.tobytes())
        picture.putpalette([255, 0, 0, 0, 0, 0])
        options = {"transparency": 1}
    elif mode.startswith("RGB "):
        picture, options = picture.convert("RGB"), {"transparency": (0, 0, 0)}
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / "x.png", **options)
    found = pictures([tmp_path / "x.png"], 8, "RGB")[0]
    grey = pictures([tmp_path / "x.png"], 8, "L")[0]
    assert (found[:, 4:] == 1).all() and (grey[:, 4:] == 1).all()
    red = torch.tensor([1.0, -1.0, -1.0]) if mode != "LA" else torch.full((3,), 76 / 127.5 - 1)
    torch.testing.assert_close(found[:, :4], red[:, None, None].expand(3, 4, 8))


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(tmp_path / "x.png")  # 20 % black
    assert pictures([tmp_path / "x.png"], 4, "RGB").mean().item() == pytest.approx(0.6, abs=0.01)


def test_the_schedule_is_that_of_the_training_whatever_the_sampler():
    """SD 1.5 comes with PNDM; abar_T of scaled-linear betas is a golden value."""
    sd = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
    sd |= {"beta_schedule": "scaled_linear", "skip_prk_steps": True, "steps_offset": 1}
    schedule, prediction = schedule_of({**sd, "num_train_timesteps": 1000})
    assert prediction == "epsilon" and len(schedule) == 1000
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(0.0046601, rel=1e-4)
    assert schedule_of({**sd, "prediction_type": "v_prediction"})[1] == "v"
    with pytest.raises(CommandError, match="predicts flow"):
        schedule_of({**sd, "prediction_type": "flow"})
