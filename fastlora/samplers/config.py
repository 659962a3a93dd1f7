"""diffusers' scheduler configurations as schedules, grids and tables.

An option counts if the configuration's class has it. Options of the other classes here are passed
over, as diffusers does: its configurations carry them from one class to another (SDXL's Euler has
DDIM's). Anything that no class here knows is refused by name, and so is what cannot be honoured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from torch import Tensor

from fastlora.samplers.arguments import integer, number, on_host
from fastlora.samplers.config_grids import GRIDS, Request
from fastlora.samplers.grid import Grid
from fastlora.samplers.options import (
    Config,
    Options,
    bounds,
    prediction_of,
    read,
    refuse,
    schedule_of,
)
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.solvers.ddim import ddim
from fastlora.samplers.solvers.ddim_inversion import ddim_inversion
from fastlora.samplers.solvers.ddpm import ddpm
from fastlora.samplers.solvers.dpm_solver import dpm_solver
from fastlora.samplers.solvers.euler import euler, euler_ancestral
from fastlora.samplers.solvers.flow import flow_euler, flow_heun
from fastlora.samplers.solvers.heun import heun
from fastlora.samplers.solvers.lcm import lcm
from fastlora.samplers.solvers.unipc import unipc
from fastlora.samplers.table import Table

Numbers = Sequence[float] | Tensor


@on_host
def table_from_config(
    config: Config,
    steps: int | None = None,
    *,
    timesteps: Numbers | None = None,
    sigmas: Numbers | None = None,
    mu: float | None = None,
    eta: float = 0.0,
    rederive: bool = False,
    every: bool = False,
    begin: int = 0,
) -> Table:
    """The table of a diffusers scheduler: `from_config`, `set_timesteps` and all its `step`s.

    `config`: the scheduler itself; or the dict, with its `_class_name`; or the path of a
    scheduler_config.json or of the folder that has it. One of `steps`, `timesteps` and `sigmas`,
    where the class takes them, as its `set_timesteps` does; `mu` shifts sigmas dynamically, and is
    passed over by FlowMatchEulerDiscreteScheduler where that is off. `eta` and `rederive`
    (use_clipped_model_output) are arguments of DDIM's `step`. `begin`: the first step that is
    taken, for image to image. `every`: a step from each of the timesteps, for those that are
    called with any (DDIM: to `t - T // steps`; DDPM, without steps: to t - 1); where DDIM's SNR is
    0 and eps is predicted there is none.

    Raises ValueError: an unknown class or option, an option or argument that cannot be honoured,
    and what the solver refuses; TypeError and FileNotFoundError for what is no configuration.
    """
    wanted = Request(steps, timesteps, sigmas, mu, eta, rederive, every, begin)
    name, options = read(config)
    _check(name, wanted)
    grid = GRIDS[name](name, options, wanted)
    table = TABLES[name](name, options, wanted, grid, prediction_of(name, options))
    return table if name in LOOK_BACK else table.since(begin)


@on_host
def grid_from_config(
    config: Config,
    steps: int | None = None,
    *,
    timesteps: Numbers | None = None,
    sigmas: Numbers | None = None,
    mu: float | None = None,
    every: bool = False,
) -> Grid:
    """The noise levels of the same, each once; arguments and errors as for `table_from_config`."""
    wanted = Request(steps, timesteps, sigmas, mu, every=every)
    name, options = read(config)
    _check(name, wanted)
    return GRIDS[name](name, options, wanted)


@on_host
def schedule_from_config(config: Config) -> Schedule:
    """The schedule of a configuration's betas; zero-terminal-SNR ones end at 0 itself.

    Raises what `table_from_config` raises, and ValueError for flow matching, which has no betas.
    """
    return schedule_of(*read(config))


LOOK_BACK = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # begin with lower orders

# The arguments that each class takes; `begin` is for all.
ARGUMENTS = {
    "DDIMScheduler": ("steps", "eta", "rederive", "every"),
    "DDIMInverseScheduler": ("steps", "every"),
    "DDPMScheduler": ("steps", "timesteps", "every"),
    "EulerDiscreteScheduler": ("steps", "timesteps", "sigmas"),
    "EulerAncestralDiscreteScheduler": ("steps",),
    "HeunDiscreteScheduler": ("steps", "timesteps"),
    "DPMSolverMultistepScheduler": ("steps", "timesteps", "mu"),
    "LCMScheduler": ("steps", "timesteps"),
    "FlowMatchEulerDiscreteScheduler": ("steps", "timesteps", "sigmas", "mu"),
    "FlowMatchHeunDiscreteScheduler": ("steps",),
    "UniPCMultistepScheduler": ("steps", "sigmas", "mu"),
}


def _check(name: str, wanted: Request) -> None:
    takes = (*ARGUMENTS[name], "begin")
    for field in fields(Request):
        value = getattr(wanted, field.name)
        unset = value is field.default if field.default is None else number(value) == field.default
        if field.name not in takes and not unset:
            expected = f"none ({name} takes {', '.join(takes)})"
            raise refuse("table_from_config", field.name, expected, value)
    if integer(wanted.begin) is None:
        raise refuse("table_from_config", "begin", "an int", wanted.begin)
    lists = [a for a in ("steps", "timesteps", "sigmas") if getattr(wanted, a) is not None]
    several = name == "FlowMatchEulerDiscreteScheduler"  # checks their lengths
    all_of_ddpm = name == "DDPMScheduler" and wanted.every
    if len(lists) != (0 if all_of_ddpm else 1) and not (several and lists):
        choices = " or ".join(a for a in takes if a in ("steps", "timesteps", "sigmas"))
        expected = "none beside every" if all_of_ddpm else f"one of {choices} for {name}"
        got = " and ".join(lists) or "none"
        raise ValueError(f"table_from_config: steps: expected {expected}, got {got}")
    if wanted.mu is not None and not abs(number(wanted.mu)) < 1e3:
        raise refuse("table_from_config", "mu", "a number", wanted.mu)


def _ddim(name: str, options: Options, wanted: Request, grid: Grid, prediction: str) -> Table:
    limits = bounds(name, options)
    return ddim(grid, eta=wanted.eta, prediction=prediction, rederive=wanted.rederive, **limits)


def _ddim_inversion(
    name: str, options: Options, wanted: Request, grid: Grid, prediction: str
) -> Table:
    return ddim_inversion(grid, prediction=prediction, **bounds(name, options))


def _ddpm(name: str, options: Options, wanted: Request, grid: Grid, prediction: str) -> Table:
    kind = options["variance_type"]
    if kind == "fixed_large_log":
        why = "diffusers takes the root of a negative logarithm there"
        raise refuse(name, "variance_type", "fixed_large", kind, why)
    if kind in ("learned", "learned_range"):
        why = "half of the model's channels would be variances, and a step reads only outputs"
        raise refuse(name, "variance_type", "fixed_small or fixed_large", kind, why)
    if kind not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise refuse(name, "variance_type", "fixed_small, fixed_small_log or fixed_large", kind)
    variance = "large" if kind == "fixed_large" else "small"
    return ddpm(grid, prediction=prediction, variance=variance, **bounds(name, options))


def _euler(name: str, options: Options, wanted: Request, grid: Grid, prediction: str) -> Table:
    return euler(grid, prediction=prediction)


def _ancestral(name: str, options: Options, wanted: Request, grid: Grid, prediction: str) -> Table:
    return euler_ancestral(grid, prediction=prediction)


def _heun(name: str, options: Options, wanted: Request, grid: Grid, prediction: str) -> Table:
    _check_first_row(name, wanted)
    return heun(grid, prediction=prediction, **bounds(name, options))


def _flow_heun(name: str, options: Options, wanted: Request, grid: Grid, prediction: str) -> Table:
    _check_first_row(name, wanted)
    return flow_heun(grid)


def _check_first_row(name: str, wanted: Request) -> None:
    if wanted.begin % 2:
        raise refuse(name, "begin", "an even number, where a step begins", wanted.begin)


def _dpm_solver(name: str, options: Options, wanted: Request, grid: Grid, prediction: str) -> Table:
    _check_flow(name, options, prediction)
    algorithm, solver_type = options["algorithm_type"], options["solver_type"]
    if options["variance_type"] is not None:
        why = "half of the model's channels would be variances, and a step reads only outputs"
        raise refuse(name, "variance_type", "None", options["variance_type"], why)
    return dpm_solver(
        grid,
        prediction=prediction,
        order=options["solver_order"],
        # what configurations of other classes say, as diffusers reads it
        algorithm="dpmsolver++" if algorithm == "deis" else algorithm,
        solver_type="midpoint" if solver_type in ("logrho", "bh1", "bh2") else solver_type,
        lower_order_final=options["lower_order_final"],
        euler_at_final=options["euler_at_final"],
        begin=wanted.begin,
        **bounds(name, options),
    )


def _check_flow(name: str, options: Options, prediction: str) -> None:
    by_flow = options["use_flow_sigmas"]
    if (prediction == "flow" and not by_flow) or (prediction == "v" and by_flow):
        expected = "epsilon, sample or flow_prediction" if by_flow else "other than flow_prediction"
        got, on = options["prediction_type"], "with" if by_flow else "without"
        raise refuse(name, "prediction_type", f"{expected} {on} use_flow_sigmas", got)


def _unipc(name: str, options: Options, wanted: Request, grid: Grid, prediction: str) -> Table:
    _check_flow(name, options, prediction)
    solver_type = options["solver_type"]
    if options["solver_p"] is not None:
        raise refuse(name, "solver_p", "None", options["solver_p"], "the predictor is UniPC's own")
    return unipc(
        grid,
        prediction=prediction,
        order=options["solver_order"],
        # what configurations of other classes say, as diffusers reads it
        solver_type="bh2" if solver_type in ("midpoint", "heun", "logrho") else solver_type,
        predict_x0=options["predict_x0"],
        lower_order_final=options["lower_order_final"],
        disable_corrector=options["disable_corrector"],
        begin=wanted.begin,
        **bounds(name, options),
    )


def _lcm(name: str, options: Options, wanted: Request, grid: Grid, prediction: str) -> Table:
    scaling = options["timestep_scaling"]
    return lcm(grid, prediction=prediction, timestep_scaling=scaling, **bounds(name, options))


def _flow_euler(name: str, options: Options, wanted: Request, grid: Grid, prediction: str) -> Table:
    inverted, stochastic = options["invert_sigmas"], options["stochastic_sampling"]
    if inverted and stochastic:
        raise refuse(name, "stochastic_sampling", "False beside invert_sigmas", True)
    table = flow_euler(grid, stochastic=stochastic)
    return table.negated() if inverted else table


TABLES: dict[str, Callable[[str, Options, Request, Grid, str], Table]] = {
    "DDIMScheduler": _ddim,
    "DDIMInverseScheduler": _ddim_inversion,
    "DDPMScheduler": _ddpm,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _ancestral,
    "DPMSolverMultistepScheduler": _dpm_solver,
    "HeunDiscreteScheduler": _heun,
    "LCMScheduler": _lcm,
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "FlowMatchHeunDiscreteScheduler": _flow_heun,
    "UniPCMultistepScheduler": _unipc,
}
