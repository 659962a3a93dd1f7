"""Ancestral sampling in the log-SNR (Ho and Salimans, 2022)."""

from __future__ import annotations

import torch

from fastlora.samplers.arguments import number, on_host
from fastlora.samplers.grid import Grid, grid_of, grid_or
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.table import X0, Table, X


@on_host
def log_snr_ancestral(
    schedule: Schedule | Grid,
    steps: int | None = None,
    v: float = 0.3,
    prediction: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
) -> Table:
    """`x' = r (alpha'/alpha) x + (1 - r) alpha' x0 + s z`, `r = e^(lambda - lambda')`.

    Classifier-Free Diffusion Guidance (arXiv 2207.12598), Algorithm 2: lambda is the log-SNR, and
    `s^2 = [(1-r) sigma'^2]^(1-v) [(1-r) sigma^2]^v` lies between the posterior's variance (v = 0)
    and that of the forward process (v = 1). A step that arrives at sigma' = 0 returns x0, without
    noise. The paper samples on `linear_log_snr(256)` with v = 0.3 at 64x64; on any other
    Grid, or on a schedule's timesteps (default 50, `spacing` as for `spaced`), the formula is the
    same, and v = 0 is DDPM. `clip`, `threshold`: of x0, as for `ddim`.

    Raises TypeError for what is no Schedule or Grid; ValueError for v outside [0, 1], what the grid
    refuses, levels that do not get cleaner, and what `Table.build` refuses.
    """
    if not 0 <= number(v) <= 1:
        raise ValueError(f"log_snr_ancestral: v: expected a number from 0 to 1, got {v!r}")
    v = number(v)
    grid = grid_or(schedule, steps, "log_snr_ancestral", lambda s, n: grid_of(s, n, spacing))
    rise = 2 * (grid.half_log_snr_next - grid.half_log_snr)  # inf where SNR' is, or where SNR is 0
    if not bool((rise > 0).all()):
        raise ValueError(
            "log_snr_ancestral: schedule: expected an SNR that rises at every step, got"
            f" {rise.exp().min().item():g} times it at step {int(rise.argmin())}"
        )
    rest = -(-rise).expm1()  # 1 - r without the cancellation
    c_x = grid.alpha * grid.sigma_next**2 / (grid.sigma**2 * grid.alpha_next)  # for alpha = 0 too
    s = (rest * grid.sigma_next ** (2 * (1 - v)) * grid.sigma ** (2 * v)).sqrt()
    s = torch.where(grid.sigma_next == 0, 0.0, s)
    name = f"log_snr_ancestral(steps={len(grid)}, v={v:g})"
    x_next = X * c_x + X0 * (rest * grid.alpha_next)
    return Table.build(name, grid, prediction, x_next, noise=s, clip=clip, threshold=threshold)
