"""Langevin dynamics: a random walk along the score, whose samples forget where they began."""

from __future__ import annotations

import math

import torch

from fastlora.samplers.arguments import integer, number, on_host
from fastlora.samplers.continuous import check_steps
from fastlora.samplers.grid import Grid, grid_of, grid_or
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.solvers._rows import interleaved, rows, table_of, tweedie, with_columns
from fastlora.samplers.table import Table


@on_host
def langevin(
    step_size: float,
    steps: int,
    sigma: float = 1.0,
    prediction: str = "score",
    init_noise_sigma: float = 1.0,
) -> Table:
    """`x' = x + a s(x) + sqrt(2 a) z`, a = `step_size`, at one noise level `x0 + sigma eps`.

    The model is told sigma; where it gives the score, of whatever density, sigma is nothing else.
    On N(0, S) the stationary variance is S/(1 - a/(2 S)), and steps diverge from a = 2 S on.
    Raises ValueError unless step_size, sigma, init_noise_sigma > 0 and steps is an int >= 1.
    """
    sizes = {"step_size": step_size, "sigma": sigma, "init_noise_sigma": init_noise_sigma}
    for name, value in sizes.items():
        _positive("langevin", name, value)
    level = torch.full((check_steps("langevin", steps),), number(sigma), dtype=torch.float64)
    one = torch.ones_like(level)
    start = number(init_noise_sigma)
    grid = Grid(level, one, level, one, level, one, init_noise_sigma=start)
    a = number(step_size)
    walk = rows(grid, x=1.0, score=a, noise=math.sqrt(2 * a))
    return table_of(f"langevin(steps={len(grid)}, {a:g})", grid, prediction, [walk])


@on_host
def annealed_langevin(
    schedule: Schedule | Grid,
    steps: int | None = None,
    steps_per_level: int = 5,
    step_size: float = 6.2e-6,
    prediction: str = "score",
    denoise: bool = True,
    spacing: str = "leading",
) -> Table:
    """`x' = x + a s(x) + sqrt(2 a) z`, `steps_per_level` times at every level, and
    `a = step_size sigma^2/sigma_L^2` with the cleanest level L, `x = x0 + sigma eps`.

    `annealed_langevin(geometric(232))` is NCSNv2 (Song and Ermon, 2020, arXiv 2006.09011, Algorithm
    1) for CIFAR-10, whose numbers the defaults are. Song and Ermon (2019, arXiv 1907.05600) write
    a/2 and sqrt(a) for the same: halve their step sizes. `denoise`: one more row at the cleanest
    level, which returns x0 by Tweedie's formula, `x + sigma^2 s(x)`. Samples start as noise of the
    noisiest sigma, as in Song et al. (2021); the earlier papers start from uniform noise.

    A schedule's timesteps (`steps`, default 50) or a grid in other coordinates are taken as
    `Grid.exploding`. Where a grid's steps arrive is not used: the levels are where the model is
    called. Raises TypeError for what is no Schedule or Grid; ValueError for numbers out of range,
    and levels of sigma 0 or SNR 0.
    """
    operator = "annealed_langevin"
    count = integer(steps_per_level)
    if count is None or count < 1:
        raise ValueError(
            f"{operator}: steps_per_level: expected an int >= 1, got {steps_per_level!r}"
        )
    _positive(operator, "step_size", step_size)
    grid = grid_or(schedule, steps, operator, lambda s, n: grid_of(s, n, spacing)).exploding()
    if not bool((grid.sigma > 0).all()):
        raise ValueError(f"{operator}: schedule: expected sigma > 0 at every level, got 0")
    a = number(step_size) * (grid.sigma / grid.sigma.min()) ** 2
    walk = rows(grid, x=1.0, score=a, noise=(2 * a).sqrt())
    walk = with_columns(walk, alpha_next=grid.alpha, sigma_next=grid.sigma)  # it stays at its level
    parts = [interleaved(walk, walk, count - 1)]
    if denoise:
        parts.append(tweedie(walk[-1:]))
    name = f"{operator}(levels={len(grid)}, steps_per_level={count}, {number(step_size):g})"
    return table_of(name, grid, prediction, parts)


def _positive(operator: str, name: str, value: float) -> None:
    if not 0 < number(value) < math.inf:
        raise ValueError(f"{operator}: {name}: expected a number > 0, got {value!r}")
