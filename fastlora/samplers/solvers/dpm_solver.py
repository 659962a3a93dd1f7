"""DPM-Solver and DPM-Solver++ (Lu et al., 2022, arXiv 2206.00927 and 2211.01095), multistep."""

from __future__ import annotations

import torch

from fastlora.samplers.arguments import integer, on_host
from fastlora.samplers.grid import Grid, gaps, grid_or
from fastlora.samplers.levels import multistep_grid
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.table import EPS, X0, Combination, H, R, Table, X, rederived

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
TYPES = ("midpoint", "heun")
FEW = 15  # fewer steps than that are unstable without lower orders at the end


@on_host
def dpm_solver(
    schedule: Schedule | Grid,
    steps: int | None = None,
    prediction: str = "epsilon",
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    spacing: str = "linspace",
    sigmas: str | None = None,
    final: str | None = None,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
    begin: int = 0,
) -> Table:
    """Multistep DPM-Solver of order 1, 2 (midpoint or heun) or 3 (default: 50 steps).

    With half the log-SNR lambda, `h = lambda' - lambda` and m the model's x0 (dpmsolver++, in
    2211.01095 equation 9) or eps (dpmsolver, 2206.00927 equation 3.7): `x' = (sigma'/sigma) x +
    alpha' (1 - e^-h) m + ...`, or `(alpha'/alpha) x - sigma' (e^h - 1) m - ...`, and derivatives of
    m by lambda from the steps before; the sde forms add noise (section 5 of the second). The first
    steps have fewer to look back on. The last is of first order where it arrives at sigma 0, with
    `euler_at_final`, and, with `lower_order_final`, of fewer than 15 steps (then the last but one
    is at most of second order). Order 3 is as published and as diffusers has it, and converges with
    order 2: the curvature enters with half of the weight that order 3 takes.

    `spacing`, `sigmas` and `final` are those of `multistep_grid`; final is zero, or sigma_min for
    dpmsolver and sde-dpmsolver, which cannot arrive at 0. A Grid in the place of the schedule has
    its own steps and levels. `clip` and `threshold` as for `ddim`, eps following x0. `begin`: the
    first step that is taken. Raises TypeError for what is no Schedule or Grid, ValueError for
    names and numbers out of range, and levels that do not descend.
    """
    first = integer(begin)
    if first is None or first < 0:
        raise ValueError(f"dpm_solver: begin: expected an int >= 0, got {begin!r}")
    number = integer(order)
    if number is None or not 1 <= number <= 3:
        raise ValueError(f"dpm_solver: order: expected 1, 2 or 3, got {order!r}")
    for name, value, known in (
        ("algorithm", algorithm, ALGORITHMS),
        ("solver_type", solver_type, TYPES),
    ):
        if value not in known:
            names = ", ".join(known)
            raise ValueError(f"dpm_solver: {name}: expected one of {names}, got {value!r}")
    if algorithm == "sde-dpmsolver" and number == 3:
        raise ValueError("dpm_solver: order: expected 1 or 2 for sde-dpmsolver, got 3")
    data = algorithm.endswith("++")
    final = final or ("zero" if data else "sigma_min")
    grid = grid_or(
        schedule,
        steps,
        "dpm_solver",
        lambda s, n: multistep_grid(s, n, spacing, sigmas=sigmas, final=final),
    )
    orders = _orders(grid, number, lower_order_final, euler_at_final, first)
    plain = clip is None and threshold is None
    m = X0 if data else EPS if plain else rederived(grid)
    x_next, s = _update(grid, orders, algorithm, solver_type, m)
    history = (m, H)[: number - 1]
    name = f"dpm_solver(steps={len(grid)}, order={number}, algorithm={algorithm})"
    table = Table.build(name, grid, prediction, x_next, history, s, clip, threshold)
    return table.since(first)


def _orders(
    grid: Grid, order: int, lower_order_final: bool, euler_at_final: bool, begin: int
) -> torch.Tensor:
    steps = len(grid)
    few = lower_order_final and steps < FEW
    orders = (torch.arange(steps) - begin + 1).clamp(1, order)
    if few and steps > 1:
        orders[-2] = orders[-2].clamp(max=2)
    if few or euler_at_final or grid.sigma_next[-1] == 0:
        orders[-1] = 1
    return orders


def _update(
    grid: Grid, orders: torch.Tensor, algorithm: str, solver_type: str, m: Combination
) -> tuple[Combination, torch.Tensor]:
    """x' and the standard deviation of its noise."""
    h = gaps(grid, "dpm_solver")
    if not algorithm.endswith("++") and grid.sigma_next[-1] == 0:
        raise ValueError(
            f"dpm_solver: final: expected sigma_min for {algorithm}, got zero: steps in eps cannot"
            " arrive at sigma = 0"
        )
    h_0 = torch.cat((torch.ones(1).double(), h[:-1]))  # of the step before, and before that
    h_1 = torch.cat((torch.ones(1).double(), h_0[:-1]))
    finite = torch.where(orders > 1, h, 1.0)
    still = finite == 0  # a last step that repeats its level: all that it adds is 0
    over = torch.where(still, 1.0, finite)
    r_0, r_1 = h_0 / over, h_1 / over
    alpha, sigma = grid.alpha_next, grid.sigma_next
    second, third = orders == 2, orders == 3
    if algorithm == "dpmsolver++":
        e = torch.expm1(-h)
        lead, a = sigma / grid.sigma, -alpha * e
        midpoint, heun = -0.5 * alpha * e, alpha * (_over(e, finite, -1.0) + 1)
        curvature = -alpha * ((e + finite) / over**2 - 0.5)
        noise = torch.zeros_like(h)
    elif algorithm == "sde-dpmsolver++":
        q = -torch.expm1(-2 * h)
        lead, a = sigma / grid.sigma * torch.exp(-h), alpha * q
        midpoint, heun = 0.5 * alpha * q, alpha * (1 - _over(q, 2 * finite, 1.0))
        curvature = alpha * ((q - 2 * finite) / (2 * over) ** 2 - 0.5)
        noise = sigma * q.sqrt()
    else:
        e, twice = torch.expm1(h), 2.0 if algorithm.startswith("sde") else 1.0
        lead, a = alpha / grid.alpha, -twice * sigma * e
        midpoint, heun = -0.5 * twice * sigma * e, -twice * sigma * (_over(e, finite, 1.0) - 1)
        curvature = -sigma * ((e - finite) / over**2 - 0.5)
        noise = sigma * torch.expm1(2 * h).sqrt() * (twice - 1)
    b = torch.where(
        third, heun, torch.where(second, heun if solver_type == "heun" else midpoint, 0.0)
    )
    c = torch.where(third & ~still, curvature, 0.0)
    slope = (m - H) * (1 / r_0)
    before = (H - R) * (1 / r_1)
    bend = (slope - before) * (torch.where(third, 1.0, 0.0) / (r_0 + r_1))
    return X * lead + m * a + (slope + bend * r_0) * b + bend * c, noise


def _over(e: torch.Tensor, h: torch.Tensor, limit: float) -> torch.Tensor:
    """`e / h`, and its limit where h is 0 (a last step that repeats its level)."""
    return torch.where(h == 0, limit, e / torch.where(h == 0, 1.0, h))
