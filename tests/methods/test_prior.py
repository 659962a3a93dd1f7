"""Class pictures: the same as by the sampler, cached under everything that decides them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastlora.methods import sample_prior
from fastlora.samplers import ddim, noise, sample
from tests.training.toys import SCHEDULE, Toy

TABLE = ddim(SCHEDULE, 5, prediction="x0")
COND = torch.tensor([[0.0, 1.0, 0.0, 0.0]])


class Counting(Toy):
    calls = 0

    def forward(self, x, t, cond):
        Counting.calls += len(x)
        return super().forward(x, t, cond)


def make(model=None, **options):
    options = {"shape": (6,), "count": 10, "progress": False, **options}
    options = {"table": TABLE, "cond": COND, **options}
    return sample_prior(model or Toy(), options.pop("table"), options.pop("cond"), **options)


def test_pictures_are_the_samplers_and_do_not_depend_on_the_batch():
    whole = make(batch=10)
    assert whole.shape == (10, 6) and whole.dtype == torch.float32
    torch.testing.assert_close(make(batch=3), whole)
    assert len({tuple(row.tolist()) for row in whole}) == 10  # each from noise of its own
    assert not torch.equal(make(seed=1), whole)


def test_guidance_and_a_condition_for_each():
    conds = torch.eye(4).repeat(3, 1)[:10]
    own = make(cond=conds, batch=4, guidance_scale=2.0, uncond=torch.zeros(1, 4))
    seeds = torch.randint(2**62, (10,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = sample(
        *(Toy(), TABLE, noise(seeds, (6,)), conds, torch.zeros(10, 4), 2.0), progress=False
    )
    torch.testing.assert_close(own, expected)


def test_the_cache_is_read_the_second_time(tmp_path: Path):
    model = Counting()
    first = make(model, cache=tmp_path / "made")
    calls = Counting.calls
    assert calls > 0
    assert torch.equal(make(model, cache=tmp_path / "made"), first)
    assert Counting.calls == calls and len(list((tmp_path / "made").iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"model": Toy(seed=1)},
        {"cond": 2 * COND},
        {"uncond": torch.zeros(1, 4), "guidance_scale": 1.5},
        {"table": ddim(SCHEDULE, 6, prediction="x0")},
        {"count": 9},
        {"seed": 1},
    ],
    ids=str,
)
def test_what_decides_the_pictures_has_a_file_of_its_own(tmp_path: Path, other):
    first = make(cache=tmp_path)
    second = make(cache=tmp_path, **other)
    assert len(list(tmp_path.iterdir())) == 2
    assert first.shape != second.shape or not torch.equal(first, second)


@pytest.mark.parametrize("broken", ["truncated", "foreign"])
def test_a_file_that_does_not_read_is_made_again(tmp_path: Path, broken):
    first = make(cache=tmp_path)
    (file,) = tmp_path.iterdir()
    if broken == "truncated":
        file.write_bytes(file.read_bytes()[:40])
    else:
        from safetensors.torch import save_file

        save_file({"images": torch.zeros(3)}, file)
    with pytest.warns(UserWarning, match="made again"):
        assert torch.equal(make(cache=tmp_path), first)
    assert torch.equal(make(cache=tmp_path), first)


def test_refusals():
    with pytest.raises(ValueError, match="expected >= 1, got 0 and 8"):
        make(count=0)
    with pytest.raises(ValueError, match=r"expected 1 or 10 conditions, got \[3, 4\]"):
        make(cond=COND.expand(3, 4))
