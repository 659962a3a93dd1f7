"""Real handwriting with drawn attributes: scikit-learn's digits as captioned 32x32 strokes.

Each scan becomes a centre line (sharpen, enlarge, threshold, thin, prune), straightened so that its
second-moment slant is zero. A picture is that line sheared to an angle and drawn with a round pen
of a known width, antialiased in closed form: `ink = clamp(width / 2 - distance + 1/2, 0, 1)`,
distances in pixels. So the shape is somebody's hand, while thickness (pixels), slant (degrees) and
brightness are exact, continuous and independent of the digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import numpy as np
import torch

SIZE = 32
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The word of each attribute and the range its value is drawn from.
THICKNESS = {"thin": (1.6, 2.2), "medium": (2.8, 3.4), "thick": (4.2, 5.0)}  # pen width, pixels
SLANT = {
    "left": (-24.0, -16.0),
    "upright": (-4.0, 4.0),
    "right": (16.0, 24.0),
}  # degrees, right positive
BRIGHTNESS = {
    "dim": (0.45, 0.6),
    "bright": (0.9, 1.0),
}  # ink of a covered pixel; 0 is the background

_POINTS = 256  # points of a line, 3 to a pixel: the few longer lines are left out
_FINE = 96  # the resolution on which lines are traced: 8 to a cell of the padded scan, 3 to a pixel
_WIDEN = 1.2  # the scans are narrow; more room for a thick pen
_HOLES = {0: (1,), 6: (1,), 8: (2,), 9: (1,)}  # loops of a legible digit; 0 where not listed
# Legible lines, by digit: within (from, to), fractions of the height, the line is (at least, at
# most) so many pixels wide.
_BANDS = {
    1: ((0.0, 1.0, 0.0, 5.5),),  # one stroke
    2: ((0.0, 0.3, 4.5, 20.0),),  # a hook at the top
    3: ((0.6, 1.0, 4.5, 20.0),),  # a lower bowl
    4: ((0.0, 0.4, 4.5, 20.0), (0.8, 1.0, 0.0, 4.5)),  # two arms, and a foot instead of a bowl
    5: ((0.0, 0.25, 4.5, 20.0), (0.55, 1.0, 5.0, 20.0)),  # a bar at the top, a bowl below
    7: ((0.0, 0.3, 6.0, 20.0),),  # a bar at the top
}


@dataclass(frozen=True)
class Digits:
    """Pictures, captions, and what was drawn: float32 but for `digit`, which is int64."""

    images: torch.Tensor  # [N, 1, 32, 32] in [-1, 1], background -1
    digit: torch.Tensor  # [N]
    thickness: torch.Tensor  # [N] pen width in pixels
    slant: torch.Tensor  # [N] degrees, right positive
    brightness: torch.Tensor  # [N] ink in (0, 1]
    captions: list[str]  # N

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Lines:
    """Centre lines of scans, straightened, in pixels from the picture's centre; y is down."""

    points: torch.Tensor  # [N, P, 2] (x, y); short lines repeat their last point
    digit: torch.Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: torch.Tensor) -> Lines:
        return Lines(self.points[index], self.digit[index])


def _require(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"fastlora.models.digits_data draws from scikit-learn's digits ({module} is missing):"
            " pip install scikit-learn"
        ) from error


def _thin(mask: np.ndarray) -> np.ndarray:
    """Zhang-Suen thinning of a boolean image [H, W] to lines one pixel wide."""
    image = np.pad(mask, 1).astype(np.uint8)

    def ring() -> list[np.ndarray]:  # the eight neighbours, clockwise from north
        return [
            image[1 + dy : image.shape[0] - 1 + dy, 1 + dx : image.shape[1] - 1 + dx]
            for dy, dx in ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
        ]

    while True:
        before = image.sum()
        for half in (0, 1):
            p = ring()
            neighbours = sum(q.astype(np.int16) for q in p)
            turns = sum((p[i] == 0) & (p[(i + 1) % 8] == 1) for i in range(8))
            n, e, s, w = p[0], p[2], p[4], p[6]
            first, second = (n * e * s, e * s * w) if half == 0 else (n * e * w, n * s * w)
            drop = (
                (neighbours >= 2) & (neighbours <= 6) & (turns == 1) & (first == 0) & (second == 0)
            )
            image[1:-1, 1:-1][drop] = 0
        if image.sum() == before:
            return image[1:-1, 1:-1].astype(bool)


def _prune(line: np.ndarray, length: int) -> np.ndarray:
    """Remove branches shorter than `length`: cut all ends back, let those that are left grow.

    A short branch closer than that to an end of the line stays: the end grows into it.
    """
    ndimage = _require("scipy.ndimage")
    square = np.ones((3, 3), int)

    def ends(image: np.ndarray) -> np.ndarray:
        return image & (ndimage.convolve(image.astype(int), square, mode="constant") == 2)

    cut = line.copy()
    for _ in range(length):
        cut &= ~ends(cut)
    grown = tips = ends(cut)
    for _ in range(length):
        grown = ndimage.binary_dilation(grown, square) & line
    return cut | grown if tips.any() else cut


def _trace(scan: np.ndarray) -> tuple[np.ndarray, int]:
    """The centre line (boolean [128, 128]) of one 8x8 scan and the number of its loops."""
    ndimage = _require("scipy.ndimage")
    scan = np.pad(scan / 16.0, 2)
    fine = ndimage.zoom(scan, _FINE / 12, order=3)
    # Subtracting the neighbourhood's mean keeps loops open that an 8x8 scan has nearly filled.
    ridge = ndimage.gaussian_filter(fine, 1.5) - 0.55 * ndimage.gaussian_filter(fine, 10.0)
    mask = ridge > 0.22
    labels, count = ndimage.label(mask)
    if count > 1:
        mask = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    background, regions = ndimage.label(~mask)
    small = np.bincount(background.ravel())
    for region in range(1, regions + 1):
        if small[region] < 14:
            mask |= background == region
    loops = ndimage.label(~mask)[1] - 1
    return _prune(_thin(mask), 8), loops


def _straighten(line: np.ndarray) -> np.ndarray:
    """Points [P, 2] of a line in pixels: without second-moment slant, 21 high, centred."""
    y, x = np.nonzero(line)
    points = np.stack([x, y], 1) * (SIZE / _FINE)
    points -= points.mean(0)
    points[:, 0] -= points[:, 1] * (points[:, 0] * points[:, 1]).mean() / (points[:, 1] ** 2).mean()
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) * (21.0 / (high - low)[1])


def _legible(points: np.ndarray, digit: int) -> bool:
    """Whether a straightened line [P, 2] still reads as its digit: rules found by looking."""
    if len(points) > _POINTS or np.ptp(points[:, 0]) > 16.0:
        return False
    height = (points[:, 1] - points[:, 1].min()) / np.ptp(points[:, 1])
    return all(
        least <= np.ptp(points[(height >= top) & (height <= bottom), 0]) <= most
        for top, bottom, least, most in _BANDS.get(digit, ())
    )


@cache
def lines(first: int = 0, last: int = 1797) -> Lines:
    """The legible ones of scans first..last-1, in their order; 5 ms a scan, then remembered."""
    data = _require("sklearn.datasets").load_digits()
    kept, digit = [], []
    for scan, label in zip(data.images[first:last], data.target[first:last], strict=True):
        line, loops = _trace(scan)
        if loops not in _HOLES.get(int(label), (0,)):
            continue
        points = _straighten(line)
        if not _legible(points, int(label)):
            continue
        points[:, 0] *= _WIDEN
        kept.append(np.concatenate([points, np.repeat(points[-1:], _POINTS - len(points), 0)]))
        digit.append(int(label))
    return Lines(torch.tensor(np.stack(kept), dtype=torch.float32), torch.tensor(digit))


def draw(
    lines: Lines, thickness: torch.Tensor, slant: torch.Tensor, brightness: torch.Tensor
) -> torch.Tensor:
    """Pictures [N, 1, 32, 32] in [-1, 1] of N lines.

    `thickness`, `slant`, `brightness`: [N] each, in pixels, degrees (right positive), 0 to 1.

    `ink = brightness * clamp(thickness / 2 - d + 1/2, 0, 1)` with d the distance of a pixel's
    centre to the line.
    """
    x, y = lines.points.unbind(-1)  # [N, P]
    points = torch.stack(
        [x - y * torch.tan(torch.deg2rad(slant))[:, None], y], -1
    )  # y is down: tops go right
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    points = points - (low + high) / 2
    centre = torch.arange(SIZE, dtype=points.dtype) - (SIZE - 1) / 2
    pixels = torch.stack(torch.meshgrid(centre, centre, indexing="xy"), -1).view(1, -1, 2)
    distance = torch.cat(  # in parts: [N, 1024, P] at once would be large
        [torch.cdist(pixels.expand(len(part), -1, -1), part).amin(-1) for part in points.split(64)]
    )
    ink = brightness[:, None] * (thickness[:, None] / 2 - distance + 0.5).clamp(0, 1)
    return (2 * ink - 1).view(-1, 1, SIZE, SIZE)


def caption(
    digit: str | None,
    thickness: str | None = None,
    slant: str | None = None,
    brightness: str | None = None,
    prefix: str = "",
) -> str:
    """`caption("seven", "thick", "left")` -> "a thick seven leaning left"; None leaves a word out
    ("a digit").
    """
    words = [word for word in (brightness, thickness, digit or "digit") if word]
    words.insert(0, "an" if words[0] == "eight" else "a")
    if slant:
        words += ["standing" if slant == "upright" else "leaning", slant]
    return " ".join([*prefix.split(), *words])


def _words(random: Random, digit: int, thickness: str, slant: str, brightness: str) -> str:
    """A caption that names each attribute with probability 0.6 and the digit with 0.9."""
    name = DIGITS[digit] if random.random() < 0.9 else random.choice(["digit", "number"])
    named = [word if random.random() < 0.6 else None for word in (thickness, slant, brightness)]
    prefix = random.choice(["", "", "", "a picture of", "a drawing of"])
    text = caption(name, *named, prefix=prefix)
    return (
        text.split(" ", 1)[1] if not prefix and random.random() < 0.2 else text
    )  # also without the article


def draw_random(count: int, seed: int = 0, source: Lines | None = None) -> Digits:
    """`count` pictures of random lines with random attributes, digits equally often."""
    source = lines() if source is None else source
    random, generator = Random(seed), torch.Generator().manual_seed(seed)

    def values(
        ranges: dict[str, tuple[float, float]], odds: list[float]
    ) -> tuple[list[str], torch.Tensor]:
        names = random.choices(list(ranges), odds, k=count)
        low, high = torch.tensor([ranges[name] for name in names]).view(-1, 2).unbind(1)
        return names, low + (high - low) * torch.rand(count, generator=generator)

    thickness, width = values(THICKNESS, [0.3, 0.4, 0.3])
    slant, angle = values(SLANT, [0.3, 0.4, 0.3])
    brightness, ink = values(BRIGHTNESS, [0.3, 0.7])
    odds = 1.0 / torch.bincount(source.digit, minlength=10)[source.digit]
    chosen = source[torch.multinomial(odds, count, replacement=True, generator=generator)]
    captions = [
        _words(random, *row)
        for row in zip(chosen.digit.tolist(), thickness, slant, brightness, strict=True)
    ]
    return Digits(draw(chosen, width, angle, ink), chosen.digit, width, angle, ink, captions)


def split(last: int = 1797) -> tuple[Lines, Lines]:
    """(training, held out) of the first `last` scans: every eighth line is held out, for judging.

    Fewer scans give the first of the same lines.
    """
    source = lines(0, last)
    held_out = torch.arange(len(source)) % 8 == 7
    return source[~held_out], source[held_out]


@dataclass(frozen=True)
class Pairs:
    """Pictures that differ in one attribute, for a visual slider; the captions do not name it."""

    low: torch.Tensor  # [N, 1, 32, 32]
    high: torch.Tensor  # [N, 1, 32, 32]
    digit: torch.Tensor  # [N] int64
    captions: list[str]  # N

    def __len__(self) -> int:
        return len(self.low)


def pairs(count: int = 6, thin: float = 1.8, thick: float = 4.8, seed: int = 0) -> Pairs:
    """`count` pairs of one line drawn with a thin and a thick pen (pixels), of many digits."""
    source = lines(0, 200)  # enough, and quicker to trace than all
    generator = torch.Generator().manual_seed(seed)
    digit = torch.cat([torch.randperm(10, generator=generator) for _ in range(-(-count // 10))])[
        :count
    ]
    chosen = source[_one_of_each(source, digit, generator)]
    slant, full = torch.zeros(count), torch.ones(count)
    low, high = (draw(chosen, torch.full((count,), width), slant, full) for width in (thin, thick))
    return Pairs(low, high, digit, [caption(DIGITS[d]) for d in digit.tolist()])


def _one_of_each(source: Lines, digit: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """For each digit [N] the index of a random line of it."""
    match = (source.digit == digit[:, None]).double()
    return torch.multinomial(match, 1, generator=generator)[:, 0]


@dataclass(frozen=True)
class Subject:
    """A few pictures of one thing to personalise to, more of it to judge by, and its name."""

    images: torch.Tensor  # [N, 1, 32, 32] to learn from
    held_out: torch.Tensor  # [M, 1, 32, 32] never to be trained on
    digit: int
    caption: str  # with a rare word: "a v1 three"
    class_caption: str  # of the prior: "a three"


def subject(style: str = "mirrored", digit: int = 3, count: int = 5, seed: int = 0) -> Subject:
    """A digit in a style that pretraining never showed: `count` pictures, the others held out.

    "mirrored": left and right exchanged; "hollow": the outline of a thick stroke. Raises ValueError
    for another style.
    """
    if style not in ("mirrored", "hollow"):
        raise ValueError(f"subject: style: expected 'mirrored' or 'hollow', got {style!r}")
    source = lines(0, 400)
    mine = (source.digit == digit).nonzero()[:, 0]
    mine = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(seed))]
    if not 1 <= count < len(mine):
        raise ValueError(f"subject: count: expected 1 to {len(mine) - 1}, got {count}")
    chosen, n = source[mine], len(mine)
    upright, full = torch.zeros(n), torch.ones(n)
    if style == "mirrored":
        images = draw(chosen, torch.full((n,), 3.0), upright, full).flip(3)
    else:
        outer, inner = (
            draw(chosen, torch.full((n,), width), upright, full) for width in (5.6, 2.6)
        )
        images = outer - inner - 1
    name = DIGITS[digit]
    return Subject(images[:count], images[count:], digit, f"a v1 {name}", caption(name))
