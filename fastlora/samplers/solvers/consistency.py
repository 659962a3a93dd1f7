"""Consistency models (Song et al., 2023): x0 in one step, better in a few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastlora.ops.sampler_step import COLUMNS
from fastlora.samplers.arguments import describe, number, on_host
from fastlora.samplers.grid import Grid
from fastlora.samplers.table import X0, Table


@on_host
def consistency(
    sigmas: Grid | Sequence[float] | Tensor,
    network: bool = False,
    sigma_min: float = 0.002,
    sigma_data: float = 0.5,
    clip: float | None = None,
) -> Table:
    """`x0 = f(x, tau)`, `x' = x0 + sqrt(tau'^2 - eps^2) z`, eps = `sigma_min`; the last returns x0.

    Consistency Models (arXiv 2303.01469), Algorithm 1, at the noise levels `sigmas` (tau), from
    noisy to clean: one for one-step sampling, `karras(40).sigma[[0, 22, 39]]`, or a Grid with
    alpha = 1 (its last step then still returns x0). The model is told tau, or what the Grid says.

    The model gives f itself; or, with `network`, the F of
    `f(x, t) = c_skip x + c_out F(c_in x, t)`, which makes f(x, eps) = x:
    `c_skip = sd^2/((t - eps)^2 + sd^2)`, `c_out = sd (t - eps)/sqrt(t^2 + sd^2)`,
    `c_in = 1/sqrt(t^2 + sd^2)` with sd = `sigma_data`. (Their networks are told 250 log t: replace
    `timesteps`.) `clip`: x0 is clipped to [-clip, clip]; theirs to 1, for images within ±1.

    Raises TypeError for sigmas that are no numbers; ValueError where they do not fall or end below
    `sigma_min`, a Grid has another alpha, or a number is out of range.
    """
    for name, value in (("sigma_min", sigma_min), ("sigma_data", sigma_data)):
        if not 0 < number(value) < math.inf:
            raise ValueError(f"consistency: {name}: expected a number > 0, got {value!r}")
    low, spread = number(sigma_min), number(sigma_data)
    told, tau, scale, start = _levels(sigmas, low)
    levels = torch.cat((tau, tau.new_zeros(1)))  # f's x0 stands for clean data: sigma_min is small
    c_in = 1 / (tau**2 + spread**2).sqrt() if network else scale
    grid = Grid.through(told, torch.ones_like(levels), levels, c_in, init_noise_sigma=start)
    noise = torch.cat(((tau[1:] ** 2 - low**2).clamp(min=0).sqrt(), tau.new_zeros(1)))
    name = f"consistency(steps={len(tau)})"
    table = Table.build(name, grid, "x0", X0, noise=noise, clip=clip)
    if not network:
        return table
    k_x = spread**2 / ((tau - low) ** 2 + spread**2)
    k_e = spread * (tau - low) / (tau**2 + spread**2).sqrt()
    columns = {"k_x": k_x, "k_e": k_e} | ({} if clip is not None else {"c_x": k_x, "c_e": k_e})
    coefficients = table.coefficients.clone()
    for column, values in columns.items():
        coefficients[:, COLUMNS.index(column)] = values
    return replace(table, coefficients=coefficients, prediction="F")


def _levels(
    sigmas: Grid | Sequence[float] | Tensor, low: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """What the model is told, tau, the scale of what it sees, and where samples start."""
    operator = "consistency: sigmas:"
    if isinstance(sigmas, Grid):
        if not bool((sigmas.alpha == 1).all()):
            raise ValueError(f"{operator} expected a Grid with alpha = 1, got another alpha")
        told, tau, start = sigmas.timesteps, sigmas.sigma, sigmas.init_noise_sigma
        scale = sigmas.input_scale
    else:
        if not isinstance(sigmas, (Sequence, Tensor)) or isinstance(sigmas, (str, bytes)):
            raise TypeError(f"{operator} expected a Grid or numbers, got {describe(sigmas)}")
        tau = torch.tensor([number(sigma) for sigma in sigmas], dtype=torch.float64)
        told, scale, start = tau, torch.ones_like(tau), tau[0].item() if tau.numel() else 0.0
    falls = bool((tau.diff() < 0).all() and (tau >= low).all() and tau.isfinite().all())
    if not tau.numel() or not falls:
        raise ValueError(
            f"{operator} expected numbers that fall, none below sigma_min = {low:g}, got"
            f" {tau.tolist()}"
        )
    return told, tau, scale, start
