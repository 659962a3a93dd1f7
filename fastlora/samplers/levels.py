"""Noise levels by the ratio sigma / alpha: where Euler, Heun, DPM-Solver and UniPC step.

All of it is float64. What numpy computes here decides how halves are rounded, and is therefore
computed by numpy: lists of timesteps agree with those that models are used with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastlora.samplers.arguments import describe, integer, number, on_host
from fastlora.samplers.grid import SPACINGS, Grid
from fastlora.samplers.schedule import Schedule

Shifted = TypeVar("Shifted", Tensor, float)
RAMPS = ("karras", "exponential", "lu", "beta")


def ratios(schedule: Schedule, operator: str = "ratios") -> Tensor:
    """`sigma / alpha` [T], ascending. Raises ValueError where abar is 0 (`without_zero_snr`)."""
    if schedule.alphas_cumprod[-1] == 0:
        raise ValueError(
            f"{operator}: schedule: expected abar > 0, got an SNR of 0 at t = {len(schedule) - 1}:"
            " sigma / alpha is infinite there (without_zero_snr makes it merely large)"
        )
    return schedule.sigma / schedule.alpha


@on_host
def without_zero_snr(schedule: Schedule) -> Schedule:
    """The same with 2^-24 for an abar of 0: sigma / alpha = 4096, as float16 can still hold it."""
    abar = schedule.alphas_cumprod.clone()
    abar[abar == 0] = 2.0**-24
    return Schedule(abar, schedule.final_alpha_cumprod)


@on_host
def interpolated(values: Tensor, timesteps: Tensor) -> Tensor:
    """values [T] at timesteps [S], linear between them and constant beyond."""
    at = np.interp(timesteps.numpy(), np.arange(len(values)), values.numpy())
    return torch.from_numpy(at)


@on_host
def timesteps_of(sigmas: Tensor, table: Tensor, logs: Tensor | None = None) -> Tensor:
    """The timesteps [S] float64 at which `table` [T] has these sigmas, log-linear between.

    `logs`: those of the table, as they are rounded elsewhere.
    """
    logs, log_sigmas = table.log() if logs is None else logs, sigmas.clamp(min=1e-10).log()
    low = (torch.searchsorted(logs, log_sigmas, right=True) - 1).clamp(0, max(len(table) - 2, 0))
    high = (low + 1).clamp(max=len(table) - 1)
    gap = logs[high] - logs[low]
    w = torch.where(gap > 0, (log_sigmas - logs[low]) / gap, 0.0).clamp(0, 1)
    return (1 - w) * low + w * high


@on_host
def ramp(name: str, sigma_max: float, sigma_min: float, steps: int) -> Tensor:
    """`steps` sigmas from the largest to the smallest.

    karras: evenly spaced seventh roots (Karras et al., 2022, equation 5); exponential and lu:
    logarithms (Lu et al., 2022); beta: quantiles of Beta(0.6, 0.6) (Lee et al., 2024; needs scipy).
    Raises ValueError for an unknown name and for sigmas that do not descend.
    """
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(
            f"ramp: sigma_min: expected 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}"
        )
    u = np.linspace(0, 1, steps)
    if name == "karras":
        low, high = sigma_min ** (1 / 7), sigma_max ** (1 / 7)
        return torch.from_numpy((high + u * (low - high)) ** 7)
    if name in ("exponential", "lu"):
        return torch.from_numpy(
            np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))
        )
    if name == "beta":
        try:
            from scipy.stats import beta
        except ImportError:
            raise ImportError(
                "ramp: beta: expected scipy to be installed for beta sigmas"
            ) from None
        return torch.from_numpy(sigma_min + beta.ppf(1 - u, 0.6, 0.6) * (sigma_max - sigma_min))
    raise ValueError(f"ramp: name: expected one of {', '.join(RAMPS)}, got {name!r}")


@on_host
def positions(T: int, steps: int, spacing: str, offset: int = 0) -> Tensor:
    """Timesteps [steps] float64 of Euler and Heun: `spaced`, but linspace is not rounded and the
    schedule is interpolated; as many as one likes. Raises ValueError for an unknown spacing."""
    count = integer(steps)
    if count is None or count < 1:
        raise ValueError(f"positions: steps: expected an int >= 1, got {steps!r}")
    if spacing == "linspace":  # float32: what the model is told is what is meant
        return _told(np.linspace(0, T - 1, count, dtype=np.float32)[::-1].copy())
    if spacing == "leading":
        return _told((np.arange(0, count) * (T // count))[::-1].copy() + offset)
    if spacing == "trailing":
        return _told(_trailing(T, T / count)[:count])
    raise ValueError(f"positions: spacing: expected one of {', '.join(SPACINGS)}, got {spacing!r}")


@on_host
def multistep_positions(
    T: int, steps: int, spacing: str, offset: int = 0, last: int | None = None
) -> Tensor:
    """Timesteps float64 of DPM-Solver and UniPC: as one step more would have them, without the
    last, and below `last`. Raises ValueError for an unknown spacing."""
    count, last = integer(steps), T if last is None else last
    if count is None or count < 1:
        raise ValueError(f"multistep_positions: steps: expected an int >= 1, got {steps!r}")
    if spacing == "linspace":
        return _told(np.linspace(0, last - 1, count + 1).round()[::-1][:-1].copy())
    if spacing == "leading":
        gap = last // (count + 1)
        return _told((np.arange(0, count + 1) * gap)[::-1][:-1].copy() + offset)
    if spacing == "trailing":
        return _told(_trailing(last, T / count)[:count])
    names = ", ".join(SPACINGS)
    raise ValueError(f"multistep_positions: spacing: expected one of {names}, got {spacing!r}")


def _trailing(T: int, gap: float) -> np.ndarray:
    values = np.arange(T, 0, -gap).round() - 1
    return values[values >= 0]  # for some numbers of steps rounding adds one that is below


def _told(timesteps: np.ndarray) -> Tensor:
    return torch.from_numpy(timesteps.astype(np.float64))


@on_host
def descending(sigmas: Sequence[float] | Tensor, operator: str) -> Tensor:
    """[S] float64, checked to descend and to end at 0 or above; the last may repeat the one before.

    Raises ValueError (TypeError for what is no list of numbers).
    """
    try:
        values = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError):
        got = describe(sigmas)
        raise TypeError(f"{operator}: sigmas: expected numbers, got {got}") from None
    if values.dim() != 1 or values.numel() < 2:
        raise ValueError(f"{operator}: sigmas: expected a list of numbers, got {describe(sigmas)}")
    falls = values.diff() < 0
    falls[-1] = values[-1] <= values[-2]
    if not bool(falls.all() & values.isfinite().all()) or values[-1] < 0 or values[-2] <= 0:
        raise ValueError(
            f"{operator}: sigmas: expected positive numbers that descend, from noisy to clean,"
            f" without repetition, and the last one 0 or above, got {values.tolist()}"
        )
    return values


@on_host
def exploding(timesteps: Tensor, sigmas: Tensor, init_noise_sigma: float | None = None) -> Grid:
    """`x = x0 + sigma eps` from sigmas [S + 1]; the model sees `x / sqrt(sigma^2 + 1)`."""
    start = sigmas[0].item() if init_noise_sigma is None else init_noise_sigma
    scale = (sigmas[:-1] ** 2 + 1).rsqrt()
    return Grid.through(timesteps, torch.ones_like(sigmas), sigmas, scale, start)


@on_host
def preserving(timesteps: Tensor, sigmas: Tensor) -> Grid:
    """The same levels as `alpha^2 + sigma^2 = 1`."""
    alpha = (sigmas**2 + 1).rsqrt()
    return Grid.through(timesteps, alpha, sigmas * alpha)


@on_host
def flow(timesteps: Tensor, sigmas: Tensor) -> Grid:
    """`x = (1 - sigma) x0 + sigma eps` from sigmas [S + 1]."""
    return Grid.through(timesteps, 1 - sigmas, sigmas)


@on_host
def euler_grid(
    schedule: Schedule,
    steps: int,
    spacing: str = "linspace",
    offset: int = 0,
    sigmas: str | None = None,
) -> Grid:
    """The grid of Euler and Heun: `exploding`, timesteps from `positions`, and with `sigmas` the
    levels of that `ramp` between the first and the last. Raises ValueError as those do."""
    table = ratios(schedule)
    t = positions(len(schedule), steps, spacing, offset)
    levels = interpolated(table, t)
    if sigmas is not None:
        levels = ramp(sigmas, levels[0].item(), levels[-1].item(), len(levels))
        t = timesteps_of(levels, table)
    levels = descending([*levels.tolist(), 0.0], "euler_grid")
    return exploding(t, levels, started(levels, spacing))


def started(sigmas: Tensor, spacing: str) -> float:
    """Standard deviation of the noise that x starts as: with leading spacing that of x, data
    included, since the first level is not quite noise."""
    largest = sigmas.max().item()
    return math.sqrt(largest**2 + 1) if spacing == "leading" else largest


@on_host
def multistep_grid(
    schedule: Schedule,
    steps: int,
    spacing: str = "linspace",
    offset: int = 0,
    sigmas: str | None = None,
    final: str = "zero",
) -> Grid:
    """The grid of DPM-Solver and UniPC: `preserving`, timesteps from `multistep_positions`, and
    with `sigmas` the levels of that `ramp` over the whole schedule. Arrives at `final`: zero, or
    sigma_min, the schedule's smallest. Raises ValueError as those do."""
    table = ratios(schedule)
    t = multistep_positions(len(schedule), steps, spacing, offset)
    levels = interpolated(table, t)
    if sigmas is not None:
        levels = ramp(sigmas, table[-1].item(), table[0].item(), len(t))
        t = timesteps_of(levels, table).round()
    last = final_sigma(final, table, "multistep_grid")
    return preserving(t.long(), descending([*levels.tolist(), last], "multistep_grid"))


def final_sigma(final: str, table: Tensor, operator: str) -> float:
    """0 for zero, the smallest of the table for sigma_min. Raises ValueError for another name."""
    if final not in ("zero", "sigma_min"):
        raise ValueError(
            f"{operator}: final_sigmas_type: expected zero or sigma_min, got {final!r}"
        )
    return 0.0 if final == "zero" else table[0].item()


def shifted(sigmas: Shifted, shift: float) -> Shifted:
    """`shift sigma / (1 + (shift - 1) sigma)` (Esser et al., 2024, equation 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretched(sigmas: Tensor, terminal: float) -> Tensor:
    """Stretched away from 1, so that the last one becomes `terminal` (LTX-Video)."""
    return 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal))


@on_host
def flow_grid(steps: int, shift: float = 1.0, T: int = 1000) -> Grid:
    """`flow` from 1 to 0: sigmas evenly spaced from 1 to 1/T, `shifted`, and 0; the model is told
    T sigma. Raises ValueError for steps that are no int >= 1 a shift that
    is not > 0, and T below 1."""
    count = integer(steps)
    if count is None or count < 1:
        raise ValueError(f"flow_grid: steps: expected an int >= 1, got {steps!r}")
    if not 0 < number(shift) < math.inf:
        raise ValueError(f"flow_grid: shift: expected a number > 0, got {shift!r}")
    if not 1 <= number(T) < math.inf:
        raise ValueError(f"flow_grid: T: expected a number >= 1, got {T!r}")
    sigmas = shifted(torch.from_numpy(np.linspace(1, 1 / number(T), count)), number(shift))
    return flow(sigmas * number(T), torch.cat((sigmas, torch.zeros(1, dtype=torch.float64))))
