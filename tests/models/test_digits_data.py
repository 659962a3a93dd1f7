"""Pictures of scikit-learn's digits: the pen, the attributes, and that captions are true."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the drawings come from scikit-learn's digits")

from scipy import ndimage

from fastlora.models import digits_data as data
from fastlora.models import judge
from fastlora.models.text import LENGTH, RARE, Tokenizer
from tests.models.strokes import picture, ring

SQUARE = np.ones((3, 3), int)


def few() -> data.Lines:
    """Lines of the first 200 scans: traced once for all tests here."""
    return data.lines(0, 200)


def blob(kind: str) -> np.ndarray:
    y, x = np.mgrid[-24:24, -24:24] + 0.5
    shapes = {
        "bar": (abs(x) < 4) & (abs(y) < 20),
        "ring": abs(np.hypot(x, y) - 14) < 4,
        "cross": ((abs(x - y) < 5) | (abs(x + y) < 5)) & (abs(x) < 16),
        "eight": (abs(np.hypot(x, y + 9) - 9) < 3) | (abs(np.hypot(x, y - 9) - 9) < 3),
    }
    return shapes[kind]


@pytest.mark.parametrize("kind", ["bar", "ring", "cross", "eight"])
def test_thinning_keeps_pieces_and_loops_and_leaves_a_line(kind: str) -> None:
    mask = blob(kind)
    line = data._thin(mask)
    assert not (line & ~mask).any()
    assert ndimage.label(line, SQUARE)[1] == ndimage.label(mask, SQUARE)[1] == 1
    assert ndimage.label(~line)[1] == ndimage.label(~mask)[1]
    # one pixel wide: an erosion by a 2x2 square leaves nothing, but for a point at a crossing
    assert ndimage.binary_erosion(line, np.ones((2, 2))).sum() <= (kind in ("cross", "eight"))


def test_pruning_removes_short_branches_and_nothing_of_the_long_ones() -> None:
    line = np.zeros((40, 40), bool)
    line[2:38, 20] = True
    branched = line.copy()
    branched[20, 21:25] = True
    pruned = data._prune(branched, 8)
    assert (pruned & line).sum() == line.sum() and (pruned & ~line).sum() <= 1  # the joint
    assert np.array_equal(data._prune(branched, 2), branched)
    loop = data._thin(blob("ring"))
    assert np.array_equal(data._prune(loop, 8), loop)


def test_lines_are_straight_centred_and_equally_high() -> None:
    lines = few()
    x, y = lines.points.unbind(-1)
    assert len(lines) > 100 and set(lines.digit.tolist()) == set(range(10))
    assert torch.allclose(y.amax(1), -y.amin(1), atol=1e-4)
    assert torch.allclose(y.amax(1) - y.amin(1), torch.tensor(21.0), atol=1e-4)
    assert (x.amax(1) - x.amin(1)).max() <= 20
    # second moments of the drawn ink: nothing leans
    images = data.draw(lines, *torch.tensor([[2.5], [0.0], [1.0]]).expand(3, len(lines)))
    assert judge.slant(images).abs().mean() < 2


def test_pen_covers_pixels_as_counted() -> None:
    """A circle of points 1/100 pixel apart against counted sub-pixels."""
    angle = torch.linspace(0, 2 * torch.pi, 8000, dtype=torch.float64)
    points = 9 * torch.stack([angle.cos(), angle.sin()], -1)[None].float()
    for width, ink in ((2.0, 1.0), (4.4, 0.5)):
        lines = data.Lines(points, torch.zeros(1, dtype=torch.int64))
        drawn = data.draw(lines, torch.tensor([width]), torch.tensor([0.0]), torch.tensor([ink]))
        error = (drawn - picture(ring(9.0), width, ink)).abs()
        assert (
            error.max() < 0.25 * ink
        )  # the pen takes an edge that crosses a pixel for a straight one
        assert error.mean() < 0.01 * ink


@pytest.mark.parametrize("degrees", [-20.0, 0.0, 24.0])
def test_slant_shears_by_the_angle(degrees: float) -> None:
    lines = few()
    n = len(lines)
    images = data.draw(lines, torch.full((n,), 2.5), torch.full((n,), degrees), torch.ones(n))
    assert judge.slant(images).mean().item() == pytest.approx(degrees, abs=2.0)


def test_random_drawings_are_a_function_of_the_seed() -> None:
    one, same, other = (data.draw_random(12, seed, few()) for seed in (4, 4, 5))
    assert torch.equal(one.images, same.images) and one.captions == same.captions
    assert not torch.equal(one.images, other.images)
    assert one.images.shape == (12, 1, 32, 32) and one.images.dtype == torch.float32
    assert one.images.min() == -1 and one.images.max() <= 1


def test_captions_are_true_and_the_tokenizer_reads_them() -> None:
    drawn = data.draw_random(600, 0, few())
    named = dict.fromkeys(("digit", "thickness", "slant", "brightness"), 0)
    for i, text in enumerate(drawn.captions):
        words = text.split()
        for digit, name in enumerate(data.DIGITS):
            if name in words:
                assert drawn.digit[i] == digit
                named["digit"] += 1
        for attribute, ranges in (
            ("thickness", data.THICKNESS),
            ("slant", data.SLANT),
            ("brightness", data.BRIGHTNESS),
        ):
            for word, (low, high) in ranges.items():
                if word in words:
                    assert low <= getattr(drawn, attribute)[i] <= high
                    named[attribute] += 1
    assert 500 < named["digit"] < 580  # 0.9
    assert all(310 < named[a] < 410 for a in ("thickness", "slant", "brightness"))  # 0.6
    assert Tokenizer()(drawn.captions).shape == (600, LENGTH)
    assert not any(word in text for word in RARE for text in drawn.captions)
    assert torch.bincount(drawn.digit).min() > 30


def test_caption_forms() -> None:
    assert data.caption("seven", "thick", "left") == "a thick seven leaning left"
    assert data.caption("eight") == "an eight"
    assert data.caption(None, None, "upright", "dim") == "a dim digit standing upright"
    assert data.caption("one", prefix="a picture of") == "a picture of a one"


def test_pairs_differ_in_thickness_alone() -> None:
    pairs = data.pairs(6, seed=2)
    assert len(pairs) == 6 and pairs.low.shape == pairs.high.shape == (6, 1, 32, 32)
    assert len(set(pairs.digit.tolist())) == 6
    low, high = judge.thickness(pairs.low), judge.thickness(pairs.high)
    assert (low < 2.4).all() and (high > 4.4).all()
    assert (judge.slant(pairs.low) - judge.slant(pairs.high)).abs().max() < 5
    assert torch.equal(pairs.high.maximum(pairs.low), pairs.high)
    assert not any(word in text for word in data.THICKNESS for text in pairs.captions)
    assert [data.DIGITS[d] in text for d, text in zip(pairs.digit, pairs.captions, strict=True)]
    assert len(set(data.pairs(23).digit.tolist())) == 10


def test_mirrored_subject_is_the_mirror_image_of_a_digit() -> None:
    subject = data.subject("mirrored", digit=3, count=5)
    assert subject.images.shape == (5, 1, 32, 32) and len(subject.held_out) >= 15
    assert (subject.caption, subject.class_caption) == ("a v1 three", "a three")
    scores = judge.load().score(subject.held_out.flip(3))
    assert (scores["digit"] == 3).float().mean() > 0.9
    distance = (subject.images[:, None] - subject.held_out[None]).abs().flatten(2).mean(2)
    assert distance.min() > 0.01  # nothing that is trained on is held out


def test_hollow_subject_is_an_outline() -> None:
    hollow = data.subject("hollow", digit=7).images
    solid = ((hollow > 0).float().amax((1, 2, 3)) == 1) & (judge.thickness(hollow) < 2.6)
    assert solid.all()
    assert hollow.min() == -1 and hollow.max() <= 1


def test_subjects_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="style: expected 'mirrored' or 'hollow', got 'bold'"):
        data.subject("bold")
    with pytest.raises(ValueError, match="count: expected 1 to"):
        data.subject(count=1000)


def test_missing_scikit_learn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        data.lines(3, 5)
