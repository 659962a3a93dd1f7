"""UniPC (Zhao et al., 2023, arXiv 2302.04867), predictor and corrector in one row a step.

The corrector of a step needs the model where the predictor arrived, so it waits for the next row:

    x      what the predictor says; here the model is called, which gives m
    h      the corrected sample but for its term in m; r: the m of the step before

so that a row completes `x_c = h + b m` and predicts from there.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from fastlora.samplers.arguments import integer, on_host
from fastlora.samplers.grid import Grid, gaps, grid_or
from fastlora.samplers.levels import multistep_grid
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.table import EPS, X0, Combination, H, R, Table, X

TYPES = ("bh1", "bh2")


@on_host
def unipc(
    schedule: Schedule | Grid,
    steps: int | None = None,
    prediction: str = "epsilon",
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    spacing: str = "linspace",
    sigmas: str | None = None,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
    threshold: tuple[float, float] | None = None,
    clip: float | None = None,
    begin: int = 0,
) -> Table:
    """UniP and UniC of order 1 or 2 (default: 50 steps), in x0 or in eps.

    `B(h)` is h with bh1, `e^h - 1` with bh2 (section 3.2). `lower_order_final`: the last steps are
    of lower order. `disable_corrector`: steps that go uncorrected. Where no step comes to it order
    may be 3, else that would need a third history. The grid is that of `multistep_grid`, or the one
    that is given. `clip` and `threshold` of x0 need predict_x0. `begin`: the first step that is
    taken. Raises TypeError for what is no Schedule or Grid, ValueError for what is out of range,
    levels that do not descend, and steps to sigma = 0 in eps or of order 2.
    """
    first = integer(begin)
    if first is None or first < 0:
        raise ValueError(f"unipc: begin: expected an int >= 0, got {begin!r}")
    skipped = _steps(disable_corrector)
    number = integer(order)
    if number is None or not 1 <= number <= 3:
        raise ValueError(f"unipc: order: expected 1 or 2, got {order!r}")
    if solver_type not in TYPES:
        raise ValueError(f"unipc: solver_type: expected bh1 or bh2, got {solver_type!r}")
    if not predict_x0 and (clip, threshold) != (None, None):
        raise ValueError("unipc: threshold: expected None without predict_x0, got one of x0")
    final = "zero" if predict_x0 else "sigma_min"
    grid = grid_or(
        schedule,
        steps,
        "unipc",
        lambda s, n: multistep_grid(s, n, spacing, sigmas=sigmas, final=final),
    )
    n = len(grid)
    orders = [
        max(1, min(number, i - first + 1, n - i if lower_order_final else number)) for i in range(n)
    ]
    if max(orders) > 2:
        raise ValueError(
            "unipc: order: expected 1 or 2, got 3: it looks back on two model outputs, which takes"
            " three histories where a step has two"
        )
    if grid.sigma_next[-1] == 0 and (not predict_x0 or orders[-1] > 1):
        raise ValueError(
            "unipc: schedule: expected a last sigma above 0 (sigma_min) for steps in eps, and"
            " without lower_order_final, got 0"
        )
    x_next, partial = _rows(grid, orders, solver_type, predict_x0, skipped, first)
    m = X0 if predict_x0 else EPS
    name = f"unipc(steps={n}, order={number}, solver_type={solver_type})"
    table = Table.build(name, grid, prediction, x_next, (partial, m), 0.0, clip, threshold)
    return table.since(first)


def _steps(given: Collection[int]) -> set[int | None]:
    """What disable_corrector names. Raises ValueError unless it is ints."""
    expected = f"unipc: disable_corrector: expected the numbers of steps, got {given!r}"
    try:
        steps = {integer(step) for step in given}
    except TypeError:
        raise ValueError(expected) from None
    if None in steps:
        raise ValueError(expected)
    return steps


def _rows(
    grid: Grid,
    orders: list[int],
    solver_type: str,
    predict_x0: bool,
    skipped: Collection[int | None],
    begin: int,
) -> tuple[Combination, Combination]:
    """x' and h', row by row."""
    h, before = gaps(grid, "unipc").tolist(), 0.0
    m = X0 if predict_x0 else EPS
    weight = 0.0  # b, of the row to come
    rows: list[tuple[Combination, Combination]] = []
    for i, order in enumerate(orders):
        corrected = i > begin and (i - 1) not in skipped
        x = H + m * weight if corrected else X
        alpha, sigma = grid.alpha[i].item(), grid.sigma[i].item()
        alpha_next, sigma_next = grid.alpha_next[i].item(), grid.sigma_next[i].item()
        hh = -h[i] if predict_x0 else h[i]
        scale = alpha_next if predict_x0 else sigma_next
        lead = sigma_next / sigma if predict_x0 else alpha_next / alpha
        phi_1 = math.expm1(hh)
        base = x * lead - m * (scale * phi_1)
        if math.isinf(hh) or hh == 0:  # arrives at sigma = 0, or stays: nothing to correct
            rows.append((base, base * 0.0))
            weight, before = 0.0, h[i]
            continue
        b_h = hh if solver_type == "bh1" else phi_1
        predictor, corrector = _weights(order, -before / h[i], hh, b_h)
        slope = (R - m) * (1 / (-before / h[i])) if order == 2 else m * 0.0
        rows.append(
            (
                base - slope * (scale * b_h * predictor),
                base - (slope * corrector[0] - m * corrector[1]) * (scale * b_h),
            )
        )
        weight, before = -scale * b_h * corrector[1], h[i]
    return _stacked([row[0] for row in rows]), _stacked([row[1] for row in rows])


def _weights(order: int, r: float, hh: float, b_h: float) -> tuple[float, tuple[float, float]]:
    """rho of the predictor, and those of the corrector: of the step before, of the new m."""
    if order == 1:
        return 0.0, (0.0, 0.5)
    phi_2 = math.expm1(hh) / hh - 1
    b_1, b_2 = phi_2 / b_h, (phi_2 / hh - 0.5) * 2 / b_h
    rho = (b_1 - b_2) / (1 - r)  # of rho + rho' = b_1, r rho + rho' = b_2
    return 0.5, (rho, b_1 - rho)


def _stacked(rows: list[Combination]) -> Combination:
    names = ("x", "x0", "eps", "h", "r")
    return Combination(
        **{n: torch.tensor([getattr(row, n) for row in rows], dtype=torch.float64) for n in names}
    )
