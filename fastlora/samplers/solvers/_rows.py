"""Rows that are put together from steps of several kinds, each with a model call of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlora.samplers.grid import Grid
from fastlora.samplers.table import EPS, X0, Number, Table, X

# The columns of rows: those of a Grid, then the coefficients of x' and the noise.
_GRID = ("timesteps", "alpha", "sigma", "alpha_next", "sigma_next", "input_scale")
_STEP = ("x", "x0", "score", "noise")


def rows(grid: Grid, **step: Number) -> Tensor:
    """`x' = x x + x0 x̂0 + score s(x) + noise z` at every level of the grid, float64 [S, 10]."""
    columns = [getattr(grid, name) for name in _GRID]
    columns += [torch.as_tensor(step.get(name, 0.0), dtype=torch.float64) for name in _STEP]
    return torch.stack([column.double().expand(len(grid)) for column in columns], 1)


def tweedie(values: Tensor) -> Tensor:
    """The same rows, but each returns x̂0, the mean of x0 given x: Tweedie's formula."""
    return with_columns(values, alpha_next=1.0, sigma_next=0.0, x=0.0, x0=1.0, score=0.0, noise=0.0)


def with_columns(values: Tensor, **columns: Number) -> Tensor:
    """A copy of rows with some columns replaced."""
    values = values.clone()
    for name, value in columns.items():
        values[:, (*_GRID, *_STEP).index(name)] = torch.as_tensor(value, dtype=torch.float64)
    return values


def interleaved(first: Tensor, then: Tensor, times: int) -> Tensor:
    """Each row of `first`, followed by `times` copies of the same row of `then`."""
    return torch.stack([first] + [then] * times, 1).flatten(0, 1)


def table_of(name: str, grid: Grid, prediction: str, parts: Sequence[Tensor]) -> Table:
    """The table of rows, whose start is that of `grid`. The score is `-eps/sigma`."""
    values = torch.cat(list(parts))
    column = dict(zip((*_GRID, *_STEP), values.unbind(1), strict=True))
    timesteps = column["timesteps"].to(grid.timesteps.dtype)  # int64 ones are exact in float64
    levels = [column[key] for key in _GRID[1:]]
    whole = Grid(timesteps, *levels, init_noise_sigma=grid.init_noise_sigma)
    eps = torch.where(column["score"] == 0, 0.0, -column["score"] / whole.sigma)
    x_next = X * column["x"] + X0 * column["x0"] + EPS * eps
    return Table.build(name, whole, prediction, x_next, noise=column["noise"])
