"""Score-based sampling (Song et al., 2021, arXiv 2011.13456): the reverse SDE and its ODE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlora.samplers.arguments import describe, integer, number, on_host
from fastlora.samplers.grid import Grid, grid_of, grid_or
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.sde import SDE
from fastlora.samplers.solvers._rows import interleaved, rows, table_of, tweedie, with_columns
from fastlora.samplers.table import Table

PREDICTORS = ("reverse_diffusion", "probability_flow", "euler_maruyama")


@on_host
def probability_flow(
    sde: SDE,
    steps: int = 1000,
    prediction: str = "score",
    end: float | None = None,
    denoise: bool = True,
) -> Table:
    """`x' = x + (t' - t) [f x - g^2 s(x) / 2]`: Euler steps of equation 13, s being the score.

    Evenly in t from 1 to `end` (1e-3, for VE 1e-5). `denoise`: the last of the steps is Tweedie's
    formula, x0 as the model sees it at `end`; otherwise it is an Euler step that arrives at `end`.
    The paper integrates by an adaptive Runge-Kutta method, which no table of coefficients can be.
    `prediction`: what the model gives (`Grid.readings`).

    Raises TypeError for what is no SDE; ValueError for steps, `end` and `prediction`.
    """
    name = "probability_flow"
    return _in_time(name, sde, steps, prediction, end, denoise, share=0.5)


@on_host
def reverse_sde(
    sde: SDE,
    steps: int = 1000,
    prediction: str = "score",
    end: float | None = None,
    denoise: bool = True,
) -> Table:
    """`x' = x + (t' - t) [f x - g^2 s(x)] + g sqrt(t - t') z`: Euler-Maruyama steps of equation 6.

    As `probability_flow`, of which this is the noisy form with the same marginals. With `denoise`
    the last step has no noise; the authors' code ends with an Euler step without its noise instead.
    """
    return _in_time("reverse_sde", sde, steps, prediction, end, denoise, share=1.0)


@on_host
def predictor_corrector(
    schedule: SDE | Schedule | Grid,
    steps: int | None = None,
    prediction: str | None = None,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    end: float | None = None,
    denoise: bool = True,
    spacing: str = "leading",
) -> Table:
    """Predictor-corrector sampling, Algorithms 2 and 3: a predictor to the next level, then
    `corrector_steps` of `x' = x + e s(x) + sqrt(2 e) z` there, each with a model call of its own.

    Predictors, with `a = alpha/alpha'` and `G^2 = sigma^2 - a^2 sigma'^2` (for DDPM a^2 = 1 - beta
    and G^2 = beta):
    - reverse_diffusion: `x' = (2 - a) x + G^2 s(x) + G z`;
    - probability_flow: `x' = (2 - a) x + G^2 s(x) / 2`;
    - euler_maruyama: the step of `reverse_sde`, for an SDE alone.

    The corrector's step size is the *expected* one of Algorithms 4 and 5,
    `e = 2 (alpha/alpha_cleaner)^2 (snr sigma)^2`: they take `2 alpha_i (snr |z|/|s|)^2` with the
    norms of a batch, for which sqrt(d) and sqrt(d)/sigma stand here, so that no sample depends on
    its batch and no step waits for the device. (A model that predicts less than all of the noise,
    as |eps| < sqrt(d) where data and noise are confused, would get larger steps by the paper's.)

    `steps` counts predictor steps (default 1000, for a schedule 50; a Grid has its own). A step
    that arrives at sigma' = 0 is Tweedie's formula without noise, and is not corrected, nor is a
    level at which the model is not called. `denoise` is for an SDE: whether its last step is such a
    one, or arrives at `end`. `corrector_steps=0` leaves the predictor alone. `prediction`: default
    score for an SDE, epsilon for schedules and grids.

    Raises TypeError for what is no SDE, Schedule or Grid; ValueError: unknown names, corrector
    steps below 0, snr that is no number > 0, levels of a Grid that do not follow one another or
    that do not get cleaner.
    """
    operator = "predictor_corrector"
    if predictor not in PREDICTORS:
        expected = ", ".join(PREDICTORS)
        raise ValueError(f"{operator}: predictor: expected one of {expected}, got {predictor!r}")
    times = integer(corrector_steps)
    if times is None or times < 0:
        raise ValueError(
            f"{operator}: corrector_steps: expected an int >= 0, got {corrector_steps!r}"
        )
    if not 0 < number(snr) < math.inf:
        raise ValueError(f"{operator}: snr: expected a number > 0, got {snr!r}")
    if isinstance(schedule, SDE):
        grid = schedule.grid(1000 if steps is None else steps, end, denoise)
    else:
        if end is not None or not denoise:
            option = "denoise" if end is None else "end"
            raise ValueError(
                f"{operator}: {option}: expected for an SDE alone, got it for a"
                f" {type(schedule).__name__}, whose levels say where it ends"
            )
        grid = _levels(operator, schedule, steps, spacing)
    if predictor == "euler_maruyama":
        if not isinstance(schedule, SDE):
            raise ValueError(
                f"{operator}: predictor: expected an SDE for euler_maruyama, got"
                f" {describe(schedule)} (reverse_diffusion steps between any levels)"
            )
        predicted = _euler(schedule, grid, end, denoise, share=1.0)
    else:
        predicted = _reverse_diffusion(operator, grid, ode=predictor == "probability_flow")
    clean = grid.sigma_next == 0
    predicted = torch.where(clean[:, None], tweedie(predicted), predicted)
    corrected = _correction(grid, predicted[1:], number(snr))  # at each level that is arrived at
    parts = [interleaved(predicted[:-1], corrected, times), predicted[-1:]]
    name = f"{operator}(steps={len(grid)}, {predictor}, corrector_steps={times})"
    if prediction is None:
        prediction = "score" if isinstance(schedule, SDE) else "epsilon"
    return table_of(name, grid, prediction, parts)


def _in_time(
    operator: str,
    sde: SDE,
    steps: int,
    prediction: str,
    end: float | None,
    denoise: bool,
    share: float,
) -> Table:
    if not isinstance(sde, SDE):
        raise TypeError(f"{operator}: sde: expected an SDE such as VP(), got {describe(sde)}")
    grid = sde.grid(steps, end, denoise)
    values = _euler(sde, grid, end, denoise, share)
    return table_of(f"{operator}(steps={len(grid)}, {sde})", grid, prediction, [values])


def _euler(sde: SDE, grid: Grid, end: float | None, denoise: bool, share: float) -> Tensor:
    """Rows of Euler steps in t, with noise where `share` is 1; Tweedie's at the end."""
    t = sde.times(len(grid), end, denoise)
    dt = torch.cat((t.diff(), t.new_zeros(1)))[: len(grid)]  # t runs downwards
    f, g = sde.drift(t[: len(grid)]), sde.diffusion(t[: len(grid)])
    noise = g * (-dt).sqrt() if share == 1 else 0.0
    values = rows(grid, x=1 + f * dt, score=-share * g**2 * dt, noise=noise)
    return torch.cat((values[:-1], tweedie(values[-1:]))) if denoise else values


def _reverse_diffusion(operator: str, grid: Grid, ode: bool) -> Tensor:
    a = grid.alpha / grid.alpha_next
    square = grid.sigma**2 - (a * grid.sigma_next) ** 2
    if not bool((square > 0).all()):
        raise ValueError(
            f"{operator}: schedule: expected an SNR that rises at every step, got one that does not"
            f" at step {int(square.argmin())}"
        )
    share, noise = (0.5, 0.0) if ode else (1.0, square.sqrt())
    return rows(grid, x=2 - a, score=share * square, noise=noise)


def _correction(grid: Grid, predicted: Tensor, snr: float) -> Tensor:
    """Langevin rows at the levels of `predicted`, those of the grid from the second on."""
    alpha, sigma = grid.alpha[1:], grid.sigma[1:]
    size = 2 * (alpha / grid.alpha_next[1:]) ** 2 * (snr * sigma) ** 2
    return with_columns(
        predicted, alpha_next=alpha, sigma_next=sigma, x=1.0, x0=0.0, score=size,
        noise=(2 * size).sqrt(),
    )  # fmt: skip


def _levels(operator: str, schedule: Schedule | Grid, steps: int | None, spacing: str) -> Grid:
    grid = grid_or(schedule, steps, operator, lambda s, n: grid_of(s, n, spacing))
    arrives = torch.stack((grid.alpha_next, grid.sigma_next))[:, :-1]
    if not torch.equal(arrives, torch.stack((grid.alpha, grid.sigma))[:, 1:]):
        raise ValueError(
            f"{operator}: schedule: expected a Grid whose steps arrive at its next level,"
            " got others"
        )
    return grid
