"""The noise levels that a sampling passes: where the model is called, and where each step arrives.

`x = alpha x0 + sigma eps` at every level, in any coordinates: variance preserving (alpha^2 +
sigma^2 = 1), variance exploding (alpha = 1), flow matching (alpha = 1 - sigma).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.samplers.arguments import describe, integer, number, on_host
from fastlora.samplers.schedule import Schedule, check_prediction

SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True, eq=False)
class Grid:
    """One entry for each step, float64 on the CPU; `timesteps` int64 or float64.

    The model is called at (alpha, sigma), is told the timestep and sees `input_scale x`; the step
    arrives at (alpha_next, sigma_next), as a rule the next entry's level. Samples start as noise of
    standard deviation `init_noise_sigma`. Raises ValueError for what does not fit together.
    """

    timesteps: Tensor  # [S]
    alpha: Tensor  # [S]
    sigma: Tensor  # [S]
    alpha_next: Tensor  # [S]
    sigma_next: Tensor  # [S]
    input_scale: Tensor  # [S]
    init_noise_sigma: float = 1.0

    @on_host
    def __post_init__(self) -> None:
        told = self.timesteps
        known = isinstance(told, Tensor) and told.dtype in (torch.int64, torch.float64)
        if not known or told.dim() != 1:
            got = describe(told)
            raise ValueError(f"Grid: timesteps: expected int64 or float64 [S], got {got}")
        if not bool(told.isfinite().all()):
            raise ValueError(f"Grid: timesteps: expected finite numbers, got {told.tolist()}")
        object.__setattr__(self, "timesteps", told.to("cpu"))
        steps = told.numel()
        for name in ("alpha", "sigma", "alpha_next", "sigma_next", "input_scale"):
            values = getattr(self, name)
            fits = isinstance(values, Tensor) and values.shape == (steps,)
            if not fits or values.dtype != torch.float64:
                got = describe(values)
                raise ValueError(f"Grid: {name}: expected float64 [{steps}], got {got}")
            if not bool((values.isfinite() & (values >= 0)).all()):
                got = values.tolist()
                raise ValueError(f"Grid: {name}: expected finite numbers >= 0, got {got}")
            object.__setattr__(self, name, values.to("cpu"))
        if not 0 <= number(self.init_noise_sigma) < math.inf:
            got = repr(self.init_noise_sigma)
            raise ValueError(f"Grid: init_noise_sigma: expected a number >= 0, got {got}")
        if steps < 1:
            raise ValueError("Grid: timesteps: expected at least one, got none")

    @classmethod
    @on_host
    def through(
        cls,
        timesteps: Tensor,  # [S]
        alpha: Tensor,  # [S + 1]
        sigma: Tensor,  # [S + 1]
        input_scale: Tensor | float = 1.0,
        init_noise_sigma: float = 1.0,
    ) -> Grid:
        """The grid whose steps each arrive at the next level."""
        scale = torch.as_tensor(input_scale, dtype=torch.float64).expand(len(timesteps))
        levels = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
        return cls(timesteps, *levels, scale, init_noise_sigma)

    def __len__(self) -> int:
        return self.timesteps.numel()

    @on_host
    def exploding(self) -> Grid:
        """The same levels as `x / alpha = x0 + (sigma / alpha) eps` for the same model, which sees
        x times alpha. The coordinates of Euler, Heun and Karras et al. (2022)."""
        if bool((self.alpha == 0).any()):
            raise ValueError("Grid: exploding: expected alpha > 0, got an SNR of 0")
        one = torch.ones_like(self.alpha)
        sigma, sigma_next = self.sigma / self.alpha, self.sigma_next / self.alpha_next
        start = self.init_noise_sigma / self.alpha[0].item()
        scale = self.input_scale * self.alpha
        return replace(self, alpha=one, alpha_next=one, sigma=sigma, sigma_next=sigma_next,
                       input_scale=scale, init_noise_sigma=start)  # fmt: skip

    @property
    def half_log_snr(self) -> Tensor:
        """`log(alpha / sigma)` [S]: the lambda of DPM-Solver."""
        return (self.alpha / self.sigma).log()

    @property
    def half_log_snr_next(self) -> Tensor:
        return (self.alpha_next / self.sigma_next).log()

    @on_host
    def readings(
        self, prediction: str, operator: str = "Grid"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(k_x, k_e, a_x, a_e): `x0 = k_x x + k_e e` and `eps = a_x x + a_e e` for what the model
        gives, e, of its own input `input_scale x = a x0 + s eps`:

        epsilon: eps; x0: x0; v: `a eps - s x0`; flow: `eps - x0`; score: `-eps / s`.

        Raises ValueError for an unknown prediction, and for epsilon and score where alpha is 0.
        """
        check_prediction(prediction, operator)
        scale, alpha, sigma = self.input_scale, self.alpha, self.sigma
        a, s = scale * alpha, scale * sigma
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        if prediction in ("epsilon", "score") and bool((alpha == 0).any()):
            t = self.timesteps[alpha == 0][0].item()
            raise ValueError(
                f"{operator}: prediction: expected v, x0 or flow where the SNR is 0, at t = {t},"
                f" got {prediction}: x is nothing but noise there, so predicted noise says nothing"
                " about x0 (zero-terminal-SNR models predict v and use trailing spacing)"
            )
        # eps is undetermined at sigma = 0, and never needed there: what goes on from there is clean
        over_sigma = torch.where(sigma == 0, 0.0, 1 / sigma)
        if prediction == "epsilon":
            return 1 / alpha, -sigma / alpha, zero, one
        if prediction == "score":
            return 1 / alpha, s * sigma / alpha, zero, -s
        if prediction == "x0":
            return zero, one, over_sigma, -alpha * over_sigma
        if prediction == "flow":
            total = a + s
            return scale / total, -s / total, scale / total, a / total
        square = a**2 + s**2
        return a * scale / square, -s / square, s * scale / square, a / square


def gaps(grid: Grid, operator: str) -> Tensor:
    """`lambda' - lambda` [S] of half the log-SNR, +inf where the last step arrives at sigma = 0.

    Raises ValueError where levels do not descend (the last may repeat), or have an SNR of 0.
    """
    h = grid.half_log_snr_next - grid.half_log_snr
    falls = bool((h[:-1] > 0).all() & (h[-1] >= 0))
    if not falls or not bool((grid.sigma > 0).all() & (grid.alpha > 0).all()):
        raise ValueError(
            f"{operator}: schedule: expected levels that descend, from an SNR above 0 to clean,"
            f" without repetition, got sigma/alpha = {(grid.sigma / grid.alpha).tolist()}"
        )
    return h


@on_host
def spaced(T: int, steps: int, spacing: str, offset: int = 0) -> Tensor:
    """`steps` timesteps of 0..T-1, from noisy to clean, int64 (Lin et al., 2023, Table 2).

    leading: multiples of T // steps from `offset` on; trailing: T/steps apart, downwards from
    T - 1; linspace: evenly from T - 1 to 0. Raises ValueError for steps outside 1..T, an offset
    that leads outside, and unknown names.
    """
    count = integer(steps)
    if count is None or not 1 <= count <= T:
        raise ValueError(
            f"spaced: steps: expected an int from 1 to the schedule's length {T}, got {steps!r}"
        )
    steps = count  # of Python's own, whatever it was
    if spacing == "leading":
        first = (steps - 1) * (T // steps) + offset
        if not 0 <= offset <= first < T:
            raise ValueError(
                f"spaced: offset: expected an int from 0 to {T - 1 - first + offset}, got {offset}"
                f" (the first of {steps} timesteps would be {first})"
            )
        return (torch.arange(steps) * (T // steps)).flip(0) + offset
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


@on_host
def grid_of(schedule: Schedule, steps: int, spacing: str = "leading", offset: int = 0) -> Grid:
    """`steps` timesteps of a schedule, each step arriving at the next listed one, the last one at
    `final_alpha_cumprod`. Raises what `spaced` raises."""
    return listed(schedule, spaced(len(schedule), steps, spacing, offset))


@on_host
def strided(schedule: Schedule, steps: int, spacing: str = "leading", offset: int = 0) -> Grid:
    """The same timesteps, each step arriving at `t - T // steps`, as DDIM is used: that is not
    always a listed timestep. Raises what `spaced` raises."""
    timesteps = spaced(len(schedule), steps, spacing, offset)
    return between(schedule, timesteps, timesteps, timesteps - len(schedule) // len(timesteps))


@on_host
def listed(
    schedule: Schedule, timesteps: Sequence[float] | Tensor, operator: str = "listed"
) -> Grid:
    """These timesteps of a schedule, each step arriving at the next one, the last one at
    `final_alpha_cumprod`. Raises ValueError unless they are ints of 0..T-1 that descend."""
    t = as_timesteps(timesteps, len(schedule), operator)
    if t.is_floating_point() and not bool((t == t.floor()).all()):
        raise ValueError(f"{operator}: timesteps: expected ints, got {t.tolist()}")
    t = t.long()
    return between(schedule, t, t, torch.cat((t[1:], torch.tensor([-1]))))


@on_host
def between(schedule: Schedule, told: Tensor, start: Tensor, end: Tensor) -> Grid:
    """Steps from the levels of `start` to those of `end` [S] int64, where any timestep below 0 is
    `final_alpha_cumprod`; the model is told `told`."""

    def abar(t: Tensor) -> Tensor:
        values = schedule.alphas_cumprod[t.clamp(min=0)]
        return torch.where(t < 0, schedule.final_alpha_cumprod, values)

    levels = abar(start).sqrt(), (1 - abar(start)).sqrt(), abar(end).sqrt(), (1 - abar(end)).sqrt()
    return Grid(told, *levels, torch.ones(len(told), dtype=torch.float64))


@on_host
def as_timesteps(timesteps: Sequence[float] | Tensor, T: int, operator: str) -> Tensor:
    """[S] int64 or float64, which have to lie within 0..T-1 and to descend.

    Raises TypeError for what is no list of numbers, ValueError for what is wrong in it.
    """
    where, got = f"{operator}: timesteps: expected", describe(timesteps)
    try:
        t = torch.as_tensor(timesteps).cpu()
        if t.is_floating_point() and not isinstance(timesteps, Tensor):
            t = torch.as_tensor(timesteps, dtype=torch.float64)  # not by way of the default dtype
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{where} numbers, got {got}") from None
    if t.dim() != 1 or t.numel() == 0 or t.dtype == torch.bool or t.is_complex():
        raise ValueError(f"{where} a list of numbers, got {got}")
    t = t.double() if t.is_floating_point() else t.long()
    if not bool(((t >= 0) & (t <= T - 1)).all()):
        raise ValueError(f"{where} numbers from 0 to {T - 1}, got {t.tolist()}")
    if not bool((t.diff() < 0).all()):
        raise ValueError(
            f"{where} numbers that descend, from noisy to clean, without repetition, got"
            f" {t.tolist()}"
        )
    return t


def as_grid(schedule: Schedule | Grid, steps: int | None, operator: str) -> Grid | None:
    """The grid that was given; None for a schedule. Raises TypeError for anything else, ValueError
    for a number of steps beside a grid, which has its own."""
    if isinstance(schedule, Grid):
        if steps is not None and integer(steps) != len(schedule):
            raise ValueError(
                f"{operator}: steps: expected none beside a Grid, which has {len(schedule)},"
                f" got {steps!r}"
            )
        return schedule
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"{operator}: schedule: expected a Schedule or a Grid, got {describe(schedule)}"
        )
    return None


def grid_or(
    schedule: Schedule | Grid,
    steps: int | None,
    operator: str,
    make: Callable[[Schedule, int], Grid],
    default: int = 50,
) -> Grid:
    """The grid that was given, or what `make` makes of a schedule. Raises what `as_grid` raises."""
    grid = as_grid(schedule, steps, operator)
    if grid is not None:
        return grid
    assert isinstance(schedule, Schedule)
    return make(schedule, default if steps is None else steps)
