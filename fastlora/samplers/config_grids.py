"""The noise levels that diffusers' schedulers pass, from their options: one function a class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlora.samplers import levels
from fastlora.samplers.arguments import describe, integer
from fastlora.samplers.grid import Grid, as_timesteps, between, listed, spaced
from fastlora.samplers.options import Options, refuse, schedule_of, single_precision_ratios
from fastlora.samplers.solvers.lcm import distilled


@dataclass(frozen=True)
class Request:
    """What is wanted of a configuration: the arguments of `table_from_config`."""

    steps: int | None = None
    timesteps: Sequence[float] | Tensor | None = None
    sigmas: Sequence[float] | Tensor | None = None
    mu: float | None = None
    eta: float = 0.0
    rederive: bool = False
    every: bool = False
    begin: int = 0


def _spaced(options: Options, steps: Any) -> Tensor:
    spacing, offset = options["timestep_spacing"], options["steps_offset"]
    return spaced(options["num_train_timesteps"], steps, spacing, offset)


def ddim_grid(name: str, options: Options, wanted: Request) -> Grid:
    schedule = schedule_of(name, options)
    T = len(schedule)
    t = _spaced(options, wanted.steps)
    stride = T // len(t)
    if wanted.every:
        t = torch.arange(T).flip(0)
        if options["prediction_type"] == "epsilon":  # says nothing where the SNR is 0
            t = t[schedule.alphas_cumprod.flip(0) > 0]
    return between(schedule, t, t, t - stride)


def ddim_inverse_grid(name: str, options: Options, wanted: Request) -> Grid:
    """Towards noise; the model is told where the step arrives."""
    schedule = schedule_of(name, options)
    T = len(schedule)
    t = _spaced(options, wanted.steps).flip(0)
    stride = T // len(t)
    t = torch.arange(T) if wanted.every else t
    return between(schedule, t, t - stride, t)


def ddpm_grid(name: str, options: Options, wanted: Request) -> Grid:
    schedule = schedule_of(name, options)
    if wanted.every:
        return listed(schedule, torch.arange(len(schedule)).flip(0))
    if wanted.timesteps is not None:
        return listed(schedule, wanted.timesteps, name)
    return listed(schedule, _spaced(options, wanted.steps))


def lcm_grid(name: str, options: Options, wanted: Request) -> Grid:
    schedule = schedule_of(name, options)
    if wanted.timesteps is not None:
        return listed(schedule, wanted.timesteps, name)
    original = options["original_inference_steps"]
    return listed(schedule, distilled(len(schedule), wanted.steps, original))  # type: ignore[arg-type]


def ramp_of(name: str, options: Options) -> str | None:
    """The one ramp that is switched on."""
    names = {
        "use_karras_sigmas": "karras",
        "use_exponential_sigmas": "exponential",
        "use_beta_sigmas": "beta",
        "use_lu_lambdas": "lu",
    }
    on = [option for option in names if options.get(option)]
    if len(on) > 1:
        raise refuse(name, on[1], f"False beside {on[0]}", True)
    return names[on[0]] if on else None


def _ramp(options: Options, ramp: str, largest: Tensor, smallest: Tensor, steps: int) -> Tensor:
    low, high = options.get("sigma_min"), options.get("sigma_max")
    low = smallest.item() if low is None else low
    return levels.ramp(ramp, largest.item() if high is None else high, low, steps)


def _timesteps(name: str, options: Options, wanted: Request, *conflicts: str) -> Tensor:
    """The timesteps that were asked for; they leave nothing to what conflicts."""
    assert wanted.timesteps is not None
    for option in conflicts:
        if options.get(option):
            raise refuse(name, "timesteps", f"none beside {option}", wanted.timesteps)
    return as_timesteps(wanted.timesteps, options["num_train_timesteps"], name)


RAMPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def euler_grid(name: str, options: Options, wanted: Request) -> Grid:
    """Of EulerDiscreteScheduler, EulerAncestralDiscreteScheduler and (each level once) Heun."""
    schedule = levels.without_zero_snr(schedule_of(name, options))
    table = levels.ratios(schedule, name)
    T, spacing = len(schedule), options["timestep_spacing"]
    continuous = options.get("timestep_type", "discrete") == "continuous"
    continuous = continuous and options["prediction_type"] == "v_prediction"
    if options.get("timestep_type", "discrete") not in ("discrete", "continuous"):
        raise refuse(name, "timestep_type", "discrete or continuous", options["timestep_type"])
    if wanted.sigmas is not None:
        sigmas = levels.descending(wanted.sigmas, name)
        t = levels.timesteps_of(sigmas[:-1], table)
    else:
        if wanted.timesteps is None:
            t = levels.positions(T, wanted.steps, spacing, options["steps_offset"])  # type: ignore[arg-type]
        else:
            t = _timesteps(name, options, wanted, *RAMPS).float().double()
            if continuous:
                got = wanted.timesteps
                raise refuse(name, "timesteps", "none beside continuous timestep_type", got)
        sigmas = levels.interpolated(table, t)
        kind = options.get("interpolation_type", "linear")
        if kind == "log_linear":  # one more than there are steps: the last one is never zero
            logs = table[-1].log().item(), table[0].log().item()
            sigmas = torch.from_numpy(np.exp(np.linspace(*logs, len(t) + 1)))
        elif kind != "linear":
            raise refuse(name, "interpolation_type", "linear or log_linear", kind)
        ramp = ramp_of(name, options)
        if ramp is not None:
            sigmas = _ramp(options, ramp, sigmas[0], sigmas[-1], len(t))
            t = levels.timesteps_of(sigmas, table)
        last = levels.final_sigma(options.get("final_sigmas_type", "zero"), table, name)
        sigmas = torch.cat((sigmas, torch.tensor([last], dtype=torch.float64)))[: len(t) + 1]
        sigmas = levels.descending(sigmas, name)
    if continuous:
        t = 0.25 * sigmas[:-1].log()
    return levels.exploding(t, sigmas, levels.started(sigmas, spacing))


def flow_grid(name: str, options: Options, wanted: Request) -> Grid:
    """Of FlowMatchEulerDiscreteScheduler and (each level once) FlowMatchHeunDiscreteScheduler.

    A static shift counts twice where no sigmas are given: for the ends, and for all.
    """
    T, shift = options["num_train_timesteps"], options["shift"]
    dynamic = options.get("use_dynamic_shifting", False)
    if T < 1:
        raise refuse(name, "num_train_timesteps", "an int >= 1", T)
    if not 0 < shift < math.inf:
        raise refuse(name, "shift", "a number > 0", shift)
    told = None if wanted.timesteps is None else _numbers(name, "timesteps", wanted.timesteps)
    if wanted.sigmas is not None:
        sigmas = _numbers(name, "sigmas", wanted.sigmas)
    elif told is not None:
        sigmas = told / T
    else:
        first, last = (e if dynamic else levels.shifted(e, shift) for e in (1.0, 1 / T))
        steps = _count(name, wanted.steps)
        sigmas = torch.from_numpy(np.linspace(first * T, last * T, steps)) / T
    for option, count in (
        ("steps", wanted.steps),
        ("timesteps", None if told is None else len(told)),
    ):
        if count is not None and count != len(sigmas):
            raise refuse(name, option, f"as many as sigmas, {len(sigmas)}", count)
    if not bool(((sigmas > 0) & (sigmas <= 1)).all()):
        raise refuse(name, "sigmas", "numbers above 0 and up to 1", sigmas.tolist())
    sigmas = (
        _dynamic(name, options, wanted.mu, sigmas) if dynamic else levels.shifted(sigmas, shift)
    )
    sigmas = _terminal(options, sigmas)
    ramp = ramp_of(name, options)
    if ramp is not None:
        sigmas = _ramp(options, ramp, sigmas[0], sigmas[-1], len(sigmas))
    sigmas = levels.descending([*sigmas.tolist(), 0.0], name)
    if options.get("invert_sigmas"):  # the model counts from noise at 0 to data at 1
        told = (1 - sigmas[:-1]) * T
    return levels.flow(sigmas[:-1] * T if told is None else told, sigmas)


def _numbers(name: str, argument: str, values: Sequence[float] | Tensor) -> Tensor:
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError):
        got = describe(values)
        raise TypeError(f"{name}: {argument}: expected numbers, got {got}") from None
    if numbers.dim() != 1 or not len(numbers):
        raise ValueError(f"{name}: {argument}: expected a list of numbers, got {describe(values)}")
    return numbers


def _count(name: str, steps: Any) -> int:
    count = integer(steps)
    if count is None or count < 1:
        raise refuse(name, "steps", "an int >= 1", steps)
    return count


def _dynamic(name: str, options: Options, mu: float | None, sigmas: Tensor) -> Tensor:
    """`e^mu / (e^mu + 1/sigma - 1)`, which is a shift by e^mu; linear: by mu."""
    if mu is None:
        raise refuse(name, "mu", "a number, since use_dynamic_shifting is on", mu)
    shift = _shift_of(name, options, mu)
    return shift / (shift + (1 / sigmas - 1))  # as it is rounded where it is cut off to an int


def _shift_of(name: str, options: Options, mu: float) -> float:
    kind = options["time_shift_type"]
    if kind not in ("exponential", "linear"):
        raise refuse(name, "time_shift_type", "exponential or linear", kind)
    return math.exp(mu) if kind == "exponential" else mu


def _terminal(options: Options, sigmas: Tensor) -> Tensor:
    terminal = options.get("shift_terminal")
    return levels.stretched(sigmas, terminal) if terminal else sigmas


def dpm_solver_grid(name: str, options: Options, wanted: Request) -> Grid:
    schedule = levels.without_zero_snr(schedule_of(name, options))
    table, T = levels.ratios(schedule, name), len(schedule)
    ramp, by_flow = ramp_of(name, options), options["use_flow_sigmas"]
    if by_flow and ramp is not None:
        raise refuse(name, "use_flow_sigmas", f"False beside {ramp} sigmas", True)
    shift = options["flow_shift"]
    if wanted.mu is not None:
        if not options["use_dynamic_shifting"]:
            raise refuse(name, "mu", "None, since use_dynamic_shifting is off", wanted.mu)
        shift = _shift_of(name, options, wanted.mu)
    if wanted.timesteps is not None:
        t = _timesteps(name, options, wanted, *RAMPS, "use_flow_sigmas").floor()
    else:
        last = T - int((-table.log() < options["lambda_min_clipped"]).sum())
        t = _multistep_timesteps(options, wanted.steps, last)
    if ramp is not None:
        steps = _count(name, wanted.steps)
        sigmas = _ramp(options, ramp, table[-1], table[0], steps)
        t = _told_by_ramp(name, options, ramp, steps)
        if ramp in ("karras", "lu") and options["beta_schedule"] != "squaredcos_cap_v2":
            t = t.round()
    elif by_flow:
        even = torch.from_numpy(1 - np.linspace(1, 1 / T, _count(name, wanted.steps) + 1))
        sigmas = levels.shifted(even, shift).flip(0)[:-1]
        t = sigmas * T
    else:
        sigmas = levels.interpolated(table, t)
    last_sigma = levels.final_sigma(options["final_sigmas_type"], table, name)
    return _multistep(name, t, sigmas, last_sigma, by_flow)


def unipc_grid(name: str, options: Options, wanted: Request) -> Grid:
    schedule = levels.without_zero_snr(schedule_of(name, options))
    table, T = levels.ratios(schedule, name), len(schedule)
    ramp, by_flow = ramp_of(name, options), options["use_flow_sigmas"]
    if not by_flow and options["shift_terminal"] is not None:
        raise refuse(
            name, "shift_terminal", "None without use_flow_sigmas", options["shift_terminal"]
        )
    if not by_flow and wanted.sigmas is not None:
        raise refuse(name, "sigmas", "none without use_flow_sigmas", wanted.sigmas)
    if options["use_dynamic_shifting"] and wanted.mu is None:
        raise refuse(name, "mu", "a number, since use_dynamic_shifting is on", None)
    if by_flow and ramp not in (None, "karras"):
        raise refuse(name, "use_flow_sigmas", f"False beside {ramp} sigmas", True)
    if ramp is not None and wanted.sigmas is not None:
        raise refuse(name, "sigmas", f"none beside {ramp} sigmas", wanted.sigmas)
    given = None if wanted.sigmas is None else _numbers(name, "sigmas", wanted.sigmas)
    steps = _count(name, wanted.steps if given is None else len(given))
    smallest = table[0].item()
    if ramp is not None:
        sigmas = _ramp(options, ramp, table[-1], table[0], steps)
        t = _told_by_ramp(name, options, ramp, steps)
        if by_flow:
            sigmas = sigmas / (sigmas + 1)
            t = sigmas * T
        elif ramp == "karras":
            t = t.round()
        smallest = sigmas[-1].item()
    elif by_flow:
        sigmas = given
        if sigmas is None:
            sigmas = torch.from_numpy(np.linspace(1, 1 / T, steps + 1))[:-1]
        if options["use_dynamic_shifting"]:
            sigmas = _dynamic(name, options, wanted.mu, sigmas)
        else:
            sigmas = levels.shifted(sigmas, options["flow_shift"])
        sigmas = _terminal(options, sigmas).clone()
        if abs(sigmas[0].item() - 1) < 1e-6:  # at 1 the log-SNR would be infinite
            sigmas[0] -= 1e-6
        t, smallest = sigmas * T, sigmas[-1].item()
    else:
        t = _multistep_timesteps(options, steps, T)
        sigmas = levels.interpolated(table, t)
    final = options["final_sigmas_type"]
    last = levels.final_sigma(final, torch.tensor([smallest], dtype=torch.float64), name)
    return _multistep(name, t, sigmas, last, by_flow)


def _told_by_ramp(name: str, options: Options, ramp: str, steps: int) -> Tensor:
    """Timesteps to be cut off, as diffusers has them, whose schedule is float32: where the level is
    that of 999 its models may be told 998."""
    table = single_precision_ratios(name, options)
    logs = table.float().log().double()
    if ramp == "lu":
        high, low = logs[-1].item(), logs[0].item()
        sigmas = torch.from_numpy(np.exp(high + np.linspace(0, 1, steps) * (low - high)))
    else:
        sigmas = _ramp(options, ramp, table[-1], table[0], steps)
    return levels.timesteps_of(sigmas, table, logs)


def _multistep_timesteps(options: Options, steps: Any, last: int) -> Tensor:
    T, spacing = options["num_train_timesteps"], options["timestep_spacing"]
    return levels.multistep_positions(T, steps, spacing, options["steps_offset"], last)


def _multistep(name: str, t: Tensor, sigmas: Tensor, last: float, by_flow: bool) -> Grid:
    """The model is told ints, cut off."""
    told = t.long()
    sigmas = levels.descending([*sigmas.tolist(), last], name)
    return levels.flow(told, sigmas) if by_flow else levels.preserving(told, sigmas)


GRIDS: dict[str, Callable[[str, Options, Request], Grid]] = {
    "DDIMScheduler": ddim_grid,
    "DDIMInverseScheduler": ddim_inverse_grid,
    "DDPMScheduler": ddpm_grid,
    "EulerDiscreteScheduler": euler_grid,
    "EulerAncestralDiscreteScheduler": euler_grid,
    "HeunDiscreteScheduler": euler_grid,
    "DPMSolverMultistepScheduler": dpm_solver_grid,
    "LCMScheduler": lcm_grid,
    "FlowMatchEulerDiscreteScheduler": flow_grid,
    "FlowMatchHeunDiscreteScheduler": flow_grid,
    "UniPCMultistepScheduler": unipc_grid,
}
