"""The shipped model: its file, its contract, and that its pictures are what was asked for."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora.models import digits, judge
from fastlora.models._files import load_weights, save_weights
from fastlora.models.digits_data import DIGITS, SLANT, THICKNESS, caption


@cache
def model() -> digits.DigitsModel:
    return digits.load()


@cache
def table():
    config = digits.DigitsModel.schedule_config
    assert (config["kind"], config["T"]) == ("cosine", 1000)
    schedule = fastlora.Schedule.cosine(1000)
    return fastlora.ddim(schedule, 12, prediction=config["prediction"], spacing="trailing")


@torch.no_grad()
def sampled(captions: list[str], seed: int, guidance: float) -> dict[str, torch.Tensor]:
    x = torch.randn(len(captions), *model().shape, generator=torch.Generator().manual_seed(seed))
    cond, uncond = model().encode(captions), model().encode([""] * len(captions))
    images = fastlora.sample(model(), table(), x, cond, uncond, guidance, progress=False)
    return judge.load().score(images)


def test_weights_are_at_most_six_megabytes() -> None:
    assert Path(digits.WEIGHTS).stat().st_size <= 6_000_000


def test_loaded_model_is_frozen_in_eval_mode_and_float32() -> None:
    assert not model().training
    assert {(p.dtype, p.requires_grad) for p in model().parameters()} == {(torch.float32, False)}
    assert {p.dtype for p in digits.load(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_prediction_is_finite_at_both_ends_of_the_schedule_and_the_text_matters() -> None:
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    cond = model().encode(["a thick seven", ""])
    assert cond.shape == (2, 16, 64)
    out = model()(x, torch.tensor([999, 999]), cond)
    assert out.shape == x.shape
    swapped = model()(x, torch.tensor([999, 999]), cond.flip(0))
    assert (out - swapped).abs().max() > 0.1
    assert model()(x, torch.tensor([0, 0]), cond).isfinite().all()


def test_prediction_is_v() -> None:
    """At the noisiest t, x is noise and `v = a eps - s x0` is minus a picture."""
    x = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = model()(
            x, torch.full((8,), 999), model().encode(["a bright zero standing upright"] * 8)
        )
    picture = -v.mean(0)[0]
    assert picture[:3].mean() == pytest.approx(-1, abs=0.1)  # the margin of every picture
    assert picture[6:26, 6:26].mean() > -0.8


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_digits_words_of_thickness_and_slant_are_obeyed(seed: int) -> None:
    """Three seeds, 45 pictures each; gates inside the numbers in the script's docstring."""
    asked = [(d, th, sl) for d in DIGITS[seed % 2 :: 2] for th in THICKNESS for sl in SLANT]
    scores = sampled([caption(*words) for words in asked], seed, guidance=2.0)
    right = scores["digit"] == torch.tensor([DIGITS.index(d) for d, _, _ in asked])
    assert right.float().mean() >= 0.95

    def mean(measure: str, position: int) -> dict[str, float]:
        words = THICKNESS if position == 1 else SLANT
        rows = {w: torch.tensor([asked_[position] == w for asked_ in asked]) for w in words}
        return {w: scores[measure][row].mean().item() for w, row in rows.items()}

    for word, value in mean("thickness", 1).items():
        assert THICKNESS[word][0] - 0.3 <= value <= THICKNESS[word][1] + 0.5, word
    for word, value in mean("slant", 2).items():
        assert SLANT[word][0] - 4 <= value <= SLANT[word][1] + 4, word


@pytest.mark.parametrize(("guidance", "least"), [(1.0, 0.85), (1.5, 0.97)], ids=["w=0", "w=0.5"])
def test_class_accuracy(guidance: float, least: float) -> None:
    scores = sampled([caption(d) for d in DIGITS] * 4, 7, guidance)
    assert (scores["digit"] == torch.arange(10).repeat(4)).float().mean() >= least


def test_without_a_caption_the_digit_is_left_to_chance() -> None:
    scores = sampled([""] * 40, 3, 1.0)
    accuracy = (scores["digit"] == torch.arange(10).repeat(4)).float().mean()
    assert accuracy < 0.4 and len(scores["digit"].unique()) >= 6


def test_foreign_and_broken_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(judge.load(), path, torch.float32)
    with pytest.raises(ValueError, match=r"w\.safetensors: expected those of DigitsModel"):
        digits.load(weights=path)
    path.write_bytes(Path(judge.WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match="expected a safetensors file, got one that does not read"):
        judge.load(weights=path)
    with pytest.raises(FileNotFoundError):
        judge.load(weights=tmp_path / "none.safetensors")


def test_weights_come_back_as_saved(tmp_path: Path) -> None:
    save_weights(judge.load(), tmp_path / "w.safetensors", torch.float32)
    other = judge.Judge()
    load_weights(other, tmp_path / "w.safetensors")
    for name, value in judge.load().state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
