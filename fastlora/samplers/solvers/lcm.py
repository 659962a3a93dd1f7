"""Latent consistency models (Luo et al., 2023): multistep consistency sampling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastlora.samplers.arguments import integer, on_host
from fastlora.samplers.grid import Grid, grid_or, listed
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.table import X0, Combination, Table, X

SIGMA_DATA = 0.5


@on_host
def lcm(
    schedule: Schedule | Grid,
    steps: int | None = None,
    prediction: str = "epsilon",
    original_steps: int = 50,
    timestep_scaling: float = 10.0,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
) -> Table:
    """`x' = alpha' (c_skip x + c_out x0) + sigma' z`, default: 4 steps; no noise after the last.

    With `tau = timestep_scaling t`: `c_skip = 0.25 / (tau^2 + 0.25)`, `c_out = tau / sqrt(tau^2 +
    0.25)`. `original_steps` of the schedule are those that the model was distilled on, see
    `distilled`. All else as for `ddim`. Raises TypeError for what is no Schedule or Grid,
    ValueError as `distilled` and `ddim` do.
    """
    grid = grid_or(
        schedule,
        steps,
        "lcm",
        lambda s, n: listed(s, distilled(len(s), n, original_steps)),
        default=4,
    )
    last = torch.arange(len(grid)) == len(grid) - 1  # returns the denoised sample
    alpha, sigma = (
        torch.where(last, end, level)
        for end, level in ((1.0, grid.alpha_next), (0.0, grid.sigma_next))
    )
    x_next = denoised(grid, timestep_scaling) * alpha
    name = f"lcm(steps={len(grid)})"
    return Table.build(name, grid, prediction, x_next, noise=sigma, clip=clip, threshold=threshold)


def denoised(grid: Grid, timestep_scaling: float) -> Combination:
    """`c_skip x + c_out x0`: the consistency function, which is x itself where tau is 0."""
    tau = timestep_scaling * grid.timesteps.double()
    c_skip = SIGMA_DATA**2 / (tau**2 + SIGMA_DATA**2)
    return X * c_skip + X0 * (tau * (tau**2 + SIGMA_DATA**2).rsqrt())


@on_host
def distilled(T: int, steps: int, original_steps: int = 50) -> Tensor:
    """`steps` of the timesteps `T // original_steps` apart that end at T - 1 (or shortly before).

    int64, evenly taken, from the noisiest on. Raises ValueError for numbers that do not fit.
    """
    original, count = integer(original_steps), integer(steps)
    if original is None or not 1 <= original <= T:
        raise ValueError(
            f"lcm: original_steps: expected an int from 1 to the schedule's length {T}, got"
            f" {original_steps!r}"
        )
    if count is None or not 1 <= count <= original:
        raise ValueError(
            f"lcm: steps: expected an int from 1 to original_steps = {original}, got {steps!r}"
        )
    timesteps = (torch.arange(1, original + 1) * (T // original) - 1).flip(0)
    chosen = np.floor(np.linspace(0, original, num=count, endpoint=False)).astype(np.int64)
    return timesteps[torch.from_numpy(chosen)]
