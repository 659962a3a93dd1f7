"""DDIM (Song et al., 2021), the row of a solver's table that most things are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.samplers.arguments import number, on_host
from fastlora.samplers.grid import Grid, grid_or, strided
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.table import EPS, X0, Combination, Table, rederived


@on_host
def ddim(
    schedule: Schedule | Grid,
    steps: int | None = None,
    eta: float = 0.0,
    prediction: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    rederive: bool = False,
) -> Table:
    """`x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z`, from t to t - T // steps (default 50).

    `s = eta (sigma'/sigma) sqrt(sigma^2 - (alpha/alpha')^2 sigma'^2)`: eta 0 is deterministic, 1 as
    noisy as DDPM. `prediction`: what the model gives (`Grid.readings`). `spacing`: which timesteps,
    see `spaced`. `clip`: x0 is clipped to [-clip, clip] before it is used; `threshold`: (quantile,
    largest), dynamic thresholding instead. eps stays as it was, or with `rederive` is
    `(x - alpha x0)/sigma` of the x0 that was clipped (diffusers' use_clipped_model_output).

    With a Grid in the place of the schedule the steps are its own. Raises TypeError for what is no
    Schedule or Grid; ValueError: steps that are no int from 1 to T, eta that is no number in
    [0, 1], clip that is none above 0, an unknown name, and epsilon prediction where the SNR is 0.
    """
    if not 0 <= number(eta) <= 1:
        raise ValueError(f"ddim: eta: expected a number from 0 to 1, got {eta!r}")
    eta = number(eta)
    grid = grid_or(schedule, steps, "ddim", lambda s, n: strided(s, n, spacing))
    x_next, s = ddim_row(grid, eta, rederived(grid) if rederive else EPS)
    spaced = "" if isinstance(schedule, Grid) else f", spacing={spacing}"
    name = f"ddim(steps={len(grid)}, eta={eta:g}{spaced})"
    return Table.build(name, grid, prediction, x_next, noise=s, clip=clip, threshold=threshold)


@on_host
def ddim_row(grid: Grid, eta: float, eps: Combination = EPS) -> tuple[Combination, Tensor]:
    """`alpha' x0 + sqrt(sigma'^2 - s^2) eps` and s [S].

    On grids with alpha = 1 this is Euler's step (eta 0) and the ancestral one (eta 1), on those
    with alpha = 1 - sigma that of flow matching."""
    over_sigma = torch.where(grid.sigma == 0, 0.0, 1 / grid.sigma)
    variance = grid.sigma**2 - (grid.alpha / grid.alpha_next * grid.sigma_next) ** 2
    s = eta * grid.sigma_next * over_sigma * variance.clamp(min=0).sqrt()
    d = (grid.sigma_next**2 - s**2).clamp(min=0).sqrt()
    return X0 * grid.alpha_next + eps * d, s
