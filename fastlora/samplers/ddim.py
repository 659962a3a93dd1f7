"""DDIM (Song et al., 2021), the row of a solver's table that most things are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlora.samplers.arguments import describe, integer, number
from fastlora.samplers.schedule import Schedule, check_prediction
from fastlora.samplers.table import Table

SPACINGS = ("leading", "trailing", "linspace")


def ddim(
    schedule: Schedule,
    steps: int = 50,
    eta: float = 0.0,
    prediction: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = None,
) -> Table:
    """The table of `x' = alpha' x0 + sqrt(1 - abar' - s^2) eps + s z`, from t to t - T // steps.

    `s = eta sqrt((1 - abar')/(1 - abar)) sqrt(1 - abar/abar')`: eta 0 is deterministic, 1 as noisy
    as DDPM. `prediction`: what the model gives, epsilon, v or x0. `spacing`: which timesteps, see
    `spaced`. `clip`: x0 is clipped to [-clip, clip] before it is used, eps stays as it was.

    Raises TypeError for what is no Schedule; ValueError: steps that are no int from 1 to T, eta
    that is no number in [0, 1], clip that is none above 0, an unknown name, and epsilon prediction
    where the SNR is 0.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"ddim: schedule: expected a Schedule, got {describe(schedule)}")
    check_prediction(prediction, "ddim")
    if not 0 <= number(eta) <= 1:
        raise ValueError(f"ddim: eta: expected a number from 0 to 1, got {eta!r}")
    if clip is not None and not 0 < number(clip) < math.inf:
        raise ValueError(f"ddim: clip: expected a positive number or None, got {clip!r}")
    eta = number(eta)
    timesteps = spaced(len(schedule), steps, spacing)
    steps = len(timesteps)
    # t' follows from t for every spacing, and is not always a listed timestep
    before = timesteps - len(schedule) // steps
    abar = schedule.alphas_cumprod[timesteps]
    abar_next = schedule.alphas_cumprod[before.clamp(min=0)]
    abar_next[before < 0] = schedule.final_alpha_cumprod
    if prediction == "epsilon" and bool((abar == 0).any()):
        raise ValueError(
            f"ddim: prediction: expected v or x0 for a schedule whose SNR is 0 at t ="
            f" {timesteps[0].item()}, got epsilon: x is nothing but noise there, so a"
            " predicted noise says nothing about x0"
            " (zero-terminal-SNR models predict v and use trailing spacing)"
        )

    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    clean = sigma == 0  # eps is then undetermined and, since abar' >= abar, not needed: d = s = 0
    over_sigma = torch.where(clean, 0.0, 1 / sigma)
    variance = (1 - abar_next) * over_sigma**2 * (1 - abar / abar_next)
    s = eta * variance.clamp(min=0).sqrt()
    d = (1 - abar_next - s**2).clamp(min=0).sqrt()
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    # x0 = k_x x + k_e e and eps = a_x x + a_e e
    k_x, k_e, a_x, a_e = {
        "epsilon": (1 / alpha, -sigma / alpha, zero, one),
        "v": (alpha, -sigma, sigma, alpha),
        "x0": (zero, one, over_sigma, -alpha * over_sigma),
    }[prediction]
    return Table.of(
        f"ddim(steps={steps}, eta={eta:g}, spacing={spacing})",
        prediction,
        timesteps,
        k_x=k_x,
        k_e=k_e,
        c_x=d * a_x,
        c_0=abar_next.sqrt(),
        c_e=d * a_e,
        c_n=s,
        clip=math.inf if clip is None else clip,
    )


def spaced(T: int, steps: int, spacing: str) -> Tensor:
    """`steps` timesteps of 0..T-1, from noisy to clean, int64 (Lin et al., 2023, Table 2).

    leading: multiples of T // steps from 0 on; trailing: T/steps apart, downwards from T - 1;
    linspace: evenly from T - 1 to 0. Raises ValueError for steps outside 1..T and unknown names.
    """
    count = integer(steps)
    if count is None or not 1 <= count <= T:
        raise ValueError(
            f"spaced: steps: expected an int from 1 to the schedule's length {T}, got {steps!r}"
        )
    steps = count  # of Python's own, whatever it was
    if spacing == "leading":
        return (torch.arange(steps) * (T // steps)).flip(0)
    if spacing == "trailing":
        # numpy's arange(T, 0, -T/steps) to the last bit, since it decides how halves are rounded;
        # but never the extra element that its own rounding adds for some numbers of steps (61 of
        # 1000 is one)
        difference = (T - T / steps) - T
        ends = T + torch.arange(steps, dtype=torch.float64) * difference
        return ends.round().long() - 1
    if spacing == "linspace":
        # numpy's linspace to the last bit, for the same reason
        gap = (T - 1) / max(steps - 1, 1)
        return (torch.arange(steps, dtype=torch.float64) * gap).round().long().flip(0)
    raise ValueError(f"spaced: spacing: expected one of {', '.join(SPACINGS)}, got {spacing!r}")
