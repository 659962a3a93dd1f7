"""Ancestral sampling of DDPM (Ho et al., 2020, Algorithm 2)."""

from __future__ import annotations

import torch

from fastlora.samplers.arguments import on_host
from fastlora.samplers.grid import Grid, grid_of, grid_or
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.table import X0, Table, X

VARIANCES = ("small", "large")


@on_host
def ddpm(
    schedule: Schedule | Grid,
    steps: int | None = None,
    prediction: str = "epsilon",
    spacing: str = "leading",
    variance: str = "small",
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
) -> Table:
    """`x' = sqrt(a)(1-abar')/(1-abar) x + alpha' (1-a)/(1-abar) x0 + s z`, `a = abar/abar'`.

    The prime is the next *listed* timestep, so that this holds for any spacing (equation 7 with
    1 - a for beta); default: every timestep of the schedule. `variance`: small, `s^2 =
    (1-a)(1-abar')/(1-abar)`, the best for data at one point, or large, `s^2 = 1-a`, the best for
    data N(0, 1). The step from t = 0 to no noise adds none. `clip` and `threshold` as for `ddim`.
    Raises TypeError for what is no Schedule or Grid, ValueError as `ddim` and for an unknown
    variance.
    """
    if variance not in VARIANCES:
        names = " or ".join(VARIANCES)
        raise ValueError(f"ddpm: variance: expected {names}, got {variance!r}")
    all_steps = len(schedule)
    grid = grid_or(schedule, steps, "ddpm", lambda s, n: grid_of(s, n, spacing), all_steps)
    a = (grid.alpha / grid.alpha_next) ** 2
    b = grid.sigma**2 - a * grid.sigma_next**2  # = 1 - a, since alpha^2 + sigma^2 = 1
    over = torch.where(grid.sigma == 0, 0.0, 1 / grid.sigma**2)
    s = (b * grid.sigma_next**2 * over if variance == "small" else b).clamp(min=0).sqrt()
    x_next = X * (a.sqrt() * grid.sigma_next**2 * over) + X0 * (grid.alpha_next * b * over)
    # what the model is told may be 0 at any level of a grid
    s = torch.where((grid.timesteps == 0) & (grid.sigma_next == 0), 0.0, s)
    name = f"ddpm(steps={len(grid)}, variance={variance})"
    return Table.build(name, grid, prediction, x_next, noise=s, clip=clip, threshold=threshold)
