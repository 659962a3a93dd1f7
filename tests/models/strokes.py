"""Strokes of known width, drawn by counting sub-pixels in float64: an independent pen."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

SIZE, SUB = 32, 8  # pixels, and sub-pixels along a pixel's edge

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def segment(x0: float, y0: float, x1: float, y1: float) -> Distance:
    """The distance to a segment; the origin is the picture's centre, y points down."""

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        dx, dy = x1 - x0, y1 - y0
        along = (((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy)).clamp(0, 1)
        return torch.hypot(x - x0 - along * dx, y - y0 - along * dy)

    return distance


def bar(degrees: float, length: float = 18.0) -> Distance:
    """A straight stroke, its top `degrees` to the right of upright."""
    dx, dy = (length / 2 * f(math.radians(degrees)) for f in (math.sin, math.cos))
    return segment(-dx, dy, dx, -dy)


def ring(radius: float) -> Distance:
    return lambda x, y: (torch.hypot(x, y) - radius).abs()


def union(*parts: Distance) -> Distance:
    return lambda x, y: torch.stack([part(x, y) for part in parts]).amin(0)


def eight(radius: float = 5.0) -> Distance:
    """Two rings that touch."""
    up, down = ring(radius), ring(radius)
    return union(lambda x, y: up(x, y + radius), lambda x, y: down(x, y - radius))


def picture(distance: Distance, width: float, ink: float = 1.0) -> torch.Tensor:
    """[1, 1, 32, 32] in [-1, 1]: the share of a pixel within width / 2 of the line, times ink."""
    at = (torch.arange(SIZE * SUB, dtype=torch.float64) + 0.5) / SUB - SIZE / 2
    covered = (distance(at[None, :], at[:, None]) <= width / 2).double()
    shares = covered.view(SIZE, SUB, SIZE, SUB).mean((1, 3))
    return (2 * ink * shares - 1).float()[None, None]
