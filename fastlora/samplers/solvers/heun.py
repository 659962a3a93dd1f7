"""Heun's method (Karras et al., 2022, Algorithm 1): two calls of the model a step, two rows."""

from __future__ import annotations

import torch

from fastlora.samplers.arguments import on_host
from fastlora.samplers.grid import Grid, grid_or
from fastlora.samplers.levels import euler_grid
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.table import X0, Combination, H, Table, X


@on_host
def heun(
    schedule: Schedule | Grid,
    steps: int | None = None,
    prediction: str = "epsilon",
    spacing: str = "linspace",
    sigmas: str | None = None,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
) -> Table:
    """`x' = x + (sigma' - sigma)(d + d')/2`, `d = (x - x0)/sigma`, d' that of an Euler step to
    sigma'; of order 2 (default: 50 steps, 99 rows: the last one, to sigma = 0, is Euler's).

    The first row of a step is Euler's and remembers d; the second one is called where it arrived.
    Arguments as for `euler`; a Grid has alpha = 1 (`Grid.exploding`) or 1 - sigma (flow matching),
    and its levels once. Raises TypeError and ValueError as `euler`, and ValueError for other grids.
    """
    grid = grid_or(schedule, steps, "heun", lambda s, n: euler_grid(s, n, spacing, sigmas=sigmas))
    name = f"heun(steps={len(grid)})"
    rows, x_next, slope = heun_rows(grid, "heun")
    return Table.build(name, rows, prediction, x_next, (slope,), 0.0, clip, threshold)


def heun_rows(grid: Grid, operator: str) -> tuple[Grid, Combination, Combination]:
    """The grid with a row for each call, x' and d."""
    alpha, sigma = (
        torch.cat((grid.alpha, grid.alpha_next)),
        torch.cat((grid.sigma, grid.sigma_next)),
    )
    if not any(torch.allclose(alpha, a, rtol=0, atol=1e-12) for a in (alpha * 0 + 1, 1 - sigma)):
        raise ValueError(
            f"{operator}: schedule: expected a Grid with alpha = 1, as grid.exploding() makes, or"
            " 1 - sigma, got other coordinates"
        )
    if bool((grid.sigma == 0).any()):
        raise ValueError(
            f"{operator}: schedule: expected sigma > 0 where the model is called, got 0"
        )
    steps = len(grid)
    row = torch.arange(2 * steps - 1)
    step, call = row // 2, (row + 1) // 2  # of N levels 0, 1, 1, 2, 2, ...
    rows = Grid(
        grid.timesteps[call],
        grid.alpha[call],
        grid.sigma[call],
        grid.alpha_next[step],
        grid.sigma_next[step],
        grid.input_scale[call],
        grid.init_noise_sigma,
    )
    slope = (X - X0) * (1 / rows.sigma)
    length = grid.sigma_next[step] - grid.sigma[step]
    second = row % 2 == 1
    # from where Euler's step arrived: x = x_before + length d
    x_next = (
        X
        + slope * torch.where(second, length / 2, length)
        - H * torch.where(second, length / 2, 0.0)
    )
    return rows, x_next, slope
