"""What the scheduler configurations of diffusers may say: classes, options, defaults."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.samplers.arguments import describe, integer, number
from fastlora.samplers.schedule import Schedule

Options = dict[str, Any]

_BETAS: Options = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_LEADING = {"timestep_spacing": "leading"}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_RAMPS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,  # where a class does not list these two, it reads them all the same
    "sigma_max": None,
}
_FLOW = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}

DEFAULTS: dict[str, Options] = {
    "DDIMScheduler": _BETAS
    | _LEADING
    | _CLIP
    | _THRESHOLD
    | _ZERO_SNR
    | {"set_alpha_to_one": True},
    "DDIMInverseScheduler": _BETAS
    | _LEADING
    | _CLIP
    | _ZERO_SNR
    | {"set_alpha_to_one": True, "set_alpha_to_zero": None},
    "DDPMScheduler": _BETAS
    | _LEADING
    | _CLIP
    | _THRESHOLD
    | _ZERO_SNR
    | {"variance_type": "fixed_small"},
    "EulerDiscreteScheduler": _BETAS
    | _RAMPS
    | _ZERO_SNR
    | {
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": _BETAS | _ZERO_SNR,
    "HeunDiscreteScheduler": _BETAS | _SD_BETAS | _RAMPS | _CLIP | {"clip_sample": False},
    "DPMSolverMultistepScheduler": _BETAS
    | _THRESHOLD
    | _RAMPS
    | _FLOW
    | _ZERO_SNR
    | {
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
    "LCMScheduler": _BETAS
    | _SD_BETAS
    | _LEADING  # which, like steps_offset, LCM never reads
    | _CLIP
    | _THRESHOLD
    | _ZERO_SNR
    | {
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "original_inference_steps": 50,
        "set_alpha_to_one": True,
        "timestep_scaling": 10.0,
    },
    "FlowMatchEulerDiscreteScheduler": _RAMPS
    | {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,  # these four are for pipelines, which make mu of them
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
    "UniPCMultistepScheduler": _BETAS
    | _THRESHOLD
    | _RAMPS
    | _FLOW
    | _ZERO_SNR
    | {
        "solver_order": 2,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        "shift_terminal": None,
    },
}

UNSUPPORTED = {
    "PNDMScheduler": "it looks back on three model outputs, and a step here has two histories:"
    " DPMSolverMultistepScheduler or DDIMScheduler read the same configuration",
}
_ELSEWHERE = {"skip_prk_steps"}  # options of unsupported classes that configurations carry along

PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "x0",
    "original_sample": "x0",
    "flow_prediction": "flow",
}
SCHEDULES = {
    "linear": Schedule.linear,
    "scaled_linear": Schedule.scaled_linear,
    "sigmoid": Schedule.sigmoid,
    "squaredcos_cap_v2": Schedule.cosine,
    "laplace": Schedule.laplace,
    "exp": Schedule.exponential,
}


def refuse(name: str, option: str, expected: str, got: object, why: str = "") -> ValueError:
    """The error for an option of a class that cannot be honoured."""
    because = f" ({why})" if why else ""
    return ValueError(f"{name}: {option}: expected {expected}, got {got!r}{because}")


def read(config: Mapping[str, Any] | str | Path) -> tuple[str, Options]:
    """Class name and every option of the class, checked in kind; see `table_from_config`."""
    given = _load(config)
    name = given.get("_class_name")
    if name in UNSUPPORTED:
        raise ValueError(f"config: _class_name: {name} is not supported: {UNSUPPORTED[name]}")
    if not isinstance(name, str) or name not in DEFAULTS:
        known = ", ".join(DEFAULTS)
        raise ValueError(f"config: _class_name: expected one of {known}, got {name!r}")
    options = dict(DEFAULTS[name])
    elsewhere = _ELSEWHERE.union(*DEFAULTS.values())
    for option, value in given.items():
        if option.startswith("_"):  # who wrote it, and when
            continue
        if option in options:
            options[option] = _checked(name, option, value, options[option])
        elif option not in elsewhere:
            message = "no such option; a newer version of diffusers may have it"
            raise ValueError(f"{name}: {option}: {message}, got {value!r}")
    return name, options


def _load(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, (str, Path)):
        raise TypeError(f"config: expected a dict or a path, got {describe(config)}")
    path = Path(config)
    path = path / "scheduler_config.json" if path.is_dir() else path
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        message = f"config: expected a scheduler_config.json or its folder, got {str(config)!r}"
        raise FileNotFoundError(message) from None
    except ValueError as error:
        raise ValueError(f"config: expected JSON in {str(path)!r}, got {error}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"config: expected a dict in {str(path)!r}, got {describe(loaded)}")
    return loaded


def _checked(name: str, option: str, value: Any, default: Any) -> Any:
    """value, as the kind that its default is of."""
    if isinstance(default, bool):
        if value is None or isinstance(value, bool):
            return bool(value)
        raise refuse(name, option, "a bool", value)
    if isinstance(default, int):
        if integer(value) is None:
            raise refuse(name, option, "an int", value)
        return integer(value)
    if isinstance(default, float):
        if math.isnan(number(value)):
            raise refuse(name, option, "a number", value)
        return number(value)
    if isinstance(default, str) and not isinstance(value, str):
        raise refuse(name, option, "a name", value)
    return value


def prediction_of(name: str, options: Options) -> str:
    """What the model predicts, in our words. Raises ValueError for an unknown name."""
    given = options.get("prediction_type", "flow_prediction")
    if given not in PREDICTIONS:
        raise refuse(name, "prediction_type", f"one of {', '.join(PREDICTIONS)}", given)
    return PREDICTIONS[given]


def bounds(options: Options) -> dict[str, Any]:
    """clip and threshold; thresholding comes first where both are on."""
    if options.get("thresholding"):
        threshold = options["dynamic_thresholding_ratio"], options["sample_max_value"]
        return {"clip": None, "threshold": threshold}
    clip = options["clip_sample_range"] if options.get("clip_sample") else None
    return {"clip": clip, "threshold": None}


def single_precision_ratios(name: str, options: Options) -> Tensor:
    """sigma / alpha [T] as diffusers has it: float32, computed in float32, held as float64.

    For what is cut off to an int, and so depends on how this is rounded.
    """
    T, kind = options["num_train_timesteps"], options["beta_schedule"]
    start, end = options["beta_start"], options["beta_end"]
    if options["trained_betas"] is None and kind == "linear":
        betas = torch.linspace(start, end, T)
    elif options["trained_betas"] is None and kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, T) ** 2
    else:
        exact = schedule_of(name, options | {"rescale_betas_zero_snr": False}).alphas_cumprod
        betas = (1 - exact / torch.cat((torch.ones(1).double(), exact[:-1]))).float()
    abar = (1 - betas).cumprod(0)
    if options["rescale_betas_zero_snr"]:
        root = abar.sqrt()
        first, last = root[0].clone(), root[-1].clone()
        root = ((root - last) * (first / (first - last))) ** 2
        betas = 1 - torch.cat((root[:1], root[1:] / root[:-1]))
        abar = (1 - betas).cumprod(0)
        abar[-1] = 2.0**-24
    return (((1 - abar) / abar) ** 0.5).double()


def schedule_of(name: str, options: Options) -> Schedule:
    """The schedule of its betas. Raises ValueError where it has none, or they are none."""
    if "beta_schedule" not in options:
        raise ValueError(f"{name}: schedule: expected betas, got none (flow matching has sigmas)")
    T, trained = options["num_train_timesteps"], options["trained_betas"]
    kind, start, end = (options[o] for o in ("beta_schedule", "beta_start", "beta_end"))
    if T < 1:
        raise refuse(name, "num_train_timesteps", "an int >= 1", T)
    if trained is not None:
        betas = torch.as_tensor(trained, dtype=torch.float64)
        if betas.shape != (T,):
            raise refuse(name, "trained_betas", f"num_train_timesteps = {T} of them", len(betas))
        schedule = Schedule.from_betas(betas)
    elif kind not in SCHEDULES:
        raise refuse(name, "beta_schedule", f"one of {', '.join(SCHEDULES)}", kind)
    elif kind in ("linear", "scaled_linear", "sigmoid"):
        schedule = SCHEDULES[kind](T, start, end)
    else:
        schedule = SCHEDULES[kind](T)
    if options.get("rescale_betas_zero_snr"):
        schedule = schedule.zero_terminal_snr()
    one = options.get("set_alpha_to_one", True)
    if options.get("set_alpha_to_zero") is not None:  # what DDIMInverseScheduler once called it
        one = options["set_alpha_to_zero"]
    return schedule if one else Schedule(schedule.alphas_cumprod, schedule.alphas_cumprod[0].item())
