"""Euler's method on `x = x0 + sigma eps` (Karras et al., 2022), plain and ancestral."""

from __future__ import annotations

from fastlora.samplers.arguments import number, on_host
from fastlora.samplers.grid import Grid, grid_or
from fastlora.samplers.levels import euler_grid
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.solvers.ddim import ddim_row
from fastlora.samplers.table import EPS, Table, rederived


@on_host
def euler(
    schedule: Schedule | Grid,
    steps: int | None = None,
    prediction: str = "epsilon",
    spacing: str = "linspace",
    sigmas: str | None = None,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
) -> Table:
    """`x' = x + (sigma' - sigma) eps` in the coordinates of `euler_grid` (default: 50 steps).

    `sigmas`: karras, exponential, lu or beta, see `ramp`. With clip or threshold (as for `ddim`)
    eps is `(x - x0)/sigma`. This is DDIM's row where alpha = 1; with a Grid the steps are its own,
    in its coordinates. Raises TypeError for what is no Schedule or Grid, ValueError for what
    `euler_grid` and `Table.build` refuse.
    """
    return _euler("euler", 0.0, schedule, steps, prediction, spacing, sigmas, clip, threshold)


@on_host
def euler_ancestral(
    schedule: Schedule | Grid,
    steps: int | None = None,
    prediction: str = "epsilon",
    spacing: str = "linspace",
    sigmas: str | None = None,
    eta: float = 1.0,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
) -> Table:
    """`x' = x + (sigma_down - sigma) eps + sigma_up z` (k-diffusion's sample_euler_ancestral).

    `sigma_up = eta sigma'/sigma sqrt(sigma^2 - sigma'^2)`, `sigma_down^2 = sigma'^2 - sigma_up^2`.
    Arguments and errors as for `euler`; eta within [0, 1].
    """
    if not 0 <= number(eta) <= 1:
        raise ValueError(f"euler_ancestral: eta: expected a number from 0 to 1, got {eta!r}")
    arguments = schedule, steps, prediction, spacing, sigmas, clip, threshold
    return _euler("euler_ancestral", number(eta), *arguments)


def _euler(
    name: str,
    eta: float,
    schedule: Schedule | Grid,
    steps: int | None,
    prediction: str,
    spacing: str,
    sigmas: str | None,
    clip: float | None,
    threshold: tuple[float, float] | None,
) -> Table:
    grid = grid_or(schedule, steps, name, lambda s, n: euler_grid(s, n, spacing, sigmas=sigmas))
    given = "" if isinstance(schedule, Grid) else f", spacing={spacing}, sigmas={sigmas}"
    name = f"{name}(steps={len(grid)}{given})"
    plain = clip is None and threshold is None
    x_next, s = ddim_row(grid, eta, EPS if plain else rederived(grid))
    return Table.build(name, grid, prediction, x_next, noise=s, clip=clip, threshold=threshold)
