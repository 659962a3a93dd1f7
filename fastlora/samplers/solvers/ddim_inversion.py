"""DDIM backwards, from data to the noise that it comes from (Song et al., 2021, section 4.3)."""

from __future__ import annotations

from fastlora.samplers.arguments import on_host
from fastlora.samplers.grid import Grid, between, grid_or, spaced
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.solvers.ddim import ddim_row
from fastlora.samplers.table import Table


@on_host
def ddim_inversion(
    schedule: Schedule | Grid,
    steps: int | None = None,
    prediction: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = None,
    threshold: tuple[float, float] | None = None,
) -> Table:
    """`x' = alpha' x0 + sigma' eps` from `t - T // steps` up to each t of `spaced` (default: 50).

    The model sees x where the step starts and is told t, where it arrives: then it is told the
    same timesteps as by the `ddim` of as many steps, which this inverts to first order. The first
    step starts at `final_alpha_cumprod`. With a Grid the steps are its own. Raises TypeError for
    what is no Schedule or Grid; ValueError as `ddim` does, for levels that do not ascend, and for
    x0 prediction from sigma = 0, which says nothing about eps.
    """

    def ascending(schedule: Schedule, steps: int) -> Grid:
        t = spaced(len(schedule), steps, spacing).flip(0)
        return between(schedule, t, t - len(schedule) // len(t), t)

    grid = grid_or(schedule, steps, "ddim_inversion", ascending)
    rising = grid.sigma_next * grid.alpha >= grid.sigma * grid.alpha_next
    if not bool(rising.all()):
        t = grid.timesteps[~rising][0].item()
        raise ValueError(
            "ddim_inversion: schedule: expected steps towards noise, got one towards data at"
            f" t = {t}"
        )
    if prediction == "x0" and bool((grid.sigma == 0).any()):
        raise ValueError(
            "ddim_inversion: prediction: expected epsilon, v or flow where sigma is 0, got x0: x is"
            " x0 there, so predicted data says nothing about eps (or let final_alpha_cumprod be"
            " alphas_cumprod[0])"
        )
    x_next, _ = ddim_row(grid, 0.0)
    name = f"ddim_inversion(steps={len(grid)})"
    return Table.build(name, grid, prediction, x_next, clip=clip, threshold=threshold)
