"""The judge's measures against strokes of known width, angle and ink."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fastlora.models import judge
from tests.models.strokes import bar, eight, picture, ring, segment, union

SHAPES = {
    "upright": bar(0),
    "leaning": bar(25),
    "flat": bar(90),
    "ring": ring(9),
    "cross": union(bar(45), bar(-45)),
    "eight": eight(),
    "seven": union(segment(-6, -9, 6, -9), segment(6, -9, -3, 10)),
}


@pytest.mark.parametrize("ink", [0.4, 1.0], ids=["dim", "bright"])
@pytest.mark.parametrize("width", [2.0, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_thickness_is_the_width_of_the_pen(shape: str, width: float, ink: float) -> None:
    measured = judge.thickness(picture(SHAPES[shape], width, ink)).item()
    assert measured == pytest.approx(width, abs=0.35)


@pytest.mark.parametrize("shape", SHAPES)
def test_thickness_hardly_depends_on_brightness_blur_haze_or_place(shape: str) -> None:
    image = picture(SHAPES[shape], 3.5)
    plain = judge.thickness(image)
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (line[:, None] * line)[None, None]
    blurred = F.conv2d(F.pad(image, (1, 1, 1, 1), value=-1.0), kernel)
    noise = 0.08 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    assert judge.thickness((image - 1) / 2).item() == pytest.approx(plain.item(), abs=0.02)
    assert judge.thickness(blurred).item() == pytest.approx(plain.item(), abs=0.5)
    assert judge.thickness(image + noise.abs()).item() == pytest.approx(plain.item(), abs=0.3)
    assert judge.thickness(image.roll((2, -1), (2, 3))).item() == pytest.approx(
        plain.item(), abs=1e-4
    )


@pytest.mark.parametrize("width", [1.6, 3.0, 5.0])
@pytest.mark.parametrize("degrees", [-30.0, -20.0, 0.0, 10.0, 30.0])
def test_slant_is_the_angle_of_a_bar(degrees: float, width: float) -> None:
    measured = judge.slant(picture(bar(degrees, 20.0), width)).item()
    # the ends of a thick bar are round: its second moments lean a little less than its axis
    assert measured == pytest.approx(degrees, abs=0.4 + 0.06 * abs(degrees))


def test_mirroring_turns_the_slant_and_leaves_the_thickness() -> None:
    image = picture(SHAPES["seven"], 3.0)
    mirrored = image.flip(3)
    assert judge.slant(mirrored).item() == pytest.approx(-judge.slant(image).item(), abs=1e-3)
    assert judge.thickness(mirrored).item() == pytest.approx(
        judge.thickness(image).item(), abs=1e-4
    )


@pytest.mark.parametrize("ink", [0.3, 0.5, 0.8, 1.0])
def test_brightness_is_the_ink_of_covered_pixels(ink: float) -> None:
    for width in (2.0, 4.0):
        measured = judge.brightness(picture(SHAPES["leaning"], width, ink)).item()
        assert measured == pytest.approx(ink, rel=0.06)


def test_an_empty_picture_measures_zero() -> None:
    empty = torch.full((2, 1, 32, 32), -1.0)
    for measure in (judge.thickness, judge.slant, judge.brightness):
        assert measure(empty).tolist() == [0.0, 0.0]


def test_half_precision_and_out_of_range_pictures_are_measured_alike() -> None:
    image = picture(SHAPES["eight"], 3.0)
    plain, half = judge.thickness(image), judge.thickness((image * 1.3).half())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(plain.item(), abs=0.3)


def test_score_has_one_row_a_picture_and_does_not_mix_them() -> None:
    model = judge.load()
    images = torch.cat([picture(SHAPES["ring"], 3.0), picture(bar(0), 4.0, 0.5)])
    scores = model.score(images)
    assert {name: list(value.shape) for name, value in scores.items()} == dict.fromkeys(
        ("digit", "confidence", "thickness", "slant", "brightness"), [2]
    )
    assert scores["digit"].tolist() == [0, 1] and scores["digit"].dtype == torch.int64
    assert scores["thickness"].tolist() == pytest.approx([3.0, 4.0], abs=0.3)
    assert scores["brightness"].tolist() == pytest.approx([1.0, 0.5], abs=0.05)
    alone = model.score(images[1:])
    for name, value in alone.items():
        torch.testing.assert_close(value, scores[name][1:])
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("shape", [(32, 32), (2, 3, 32, 32), (2, 1, 28, 28)])
def test_pictures_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"judge: images: expected \[B, 1, 32, 32\], got"):
        judge.load().score(torch.zeros(shape))


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_digits_of_lines_never_trained_on_are_recognised(seed: int) -> None:
    pytest.importorskip("sklearn", reason="the drawings come from scikit-learn's digits")
    from fastlora.models.digits_data import draw_random, lines

    source = lines(0, 400)
    held_out = source[torch.arange(7, len(source), 8)]
    data = draw_random(300, seed=seed, source=held_out)
    scores = judge.load().score(data.images)
    assert (
        scores["digit"] == data.digit
    ).float().mean() >= 0.95  # a few of the lines are hard to read
    assert (scores["thickness"] - data.thickness).abs().max() <= 0.6
    assert (scores["brightness"] - data.brightness).abs().max() <= 0.06
    assert (scores["slant"] - data.slant).abs().mean() <= 3.0


def test_weights_are_small() -> None:
    assert Path(judge.WEIGHTS).stat().st_size < 500_000
