"""Flow matching (Lipman et al., 2023; Liu et al., 2023): `x = (1 - sigma) x0 + sigma eps`."""

from __future__ import annotations

from fastlora.samplers.arguments import describe, on_host
from fastlora.samplers.grid import Grid
from fastlora.samplers.levels import flow_grid
from fastlora.samplers.solvers.ddim import ddim_row
from fastlora.samplers.solvers.heun import heun_rows
from fastlora.samplers.table import X0, Table


@on_host
def flow_euler(
    grid: Grid | int = 50,
    prediction: str = "flow",
    shift: float = 1.0,
    stochastic: bool = False,
) -> Table:
    """`x' = x + (sigma' - sigma) v` from 1 to 0, v = eps - x0.

    `grid`: one of `levels.flow`, or a number of steps for `flow_grid` with this shift. With
    `stochastic`, `x' = (1 - sigma') x0 + sigma' z` instead. Raises ValueError as `flow_grid` does,
    and for a shift beside a grid; TypeError for what is neither.
    """
    levels = _grid(grid, shift, "flow_euler")
    x_next, s = ddim_row(levels, 0.0)
    if stochastic:
        x_next, s = X0 * levels.alpha_next, levels.sigma_next
    return Table.build(f"flow_euler(steps={len(levels)})", levels, prediction, x_next, noise=s)


@on_host
def flow_heun(grid: Grid | int = 50, prediction: str = "flow", shift: float = 1.0) -> Table:
    """`x' = x + (sigma' - sigma)(v + v')/2`, v' after an Euler step: `heun` on a flow grid.

    Arguments and errors as for `flow_euler`; two rows a step, one for the last.
    """
    levels = _grid(grid, shift, "flow_heun")
    rows, x_next, slope = heun_rows(levels, "flow_heun")
    return Table.build(f"flow_heun(steps={len(levels)})", rows, prediction, x_next, (slope,))


def _grid(grid: Grid | int, shift: float, operator: str) -> Grid:
    if isinstance(grid, Grid):
        if shift != 1.0:
            raise ValueError(f"{operator}: shift: expected none beside a Grid, got {shift!r}")
        return grid
    if isinstance(grid, (str, float)) or grid is None:
        got = describe(grid)
        raise TypeError(f"{operator}: grid: expected a Grid or a number of steps, got {got}")
    return flow_grid(grid, shift)
