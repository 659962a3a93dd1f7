"""What the scheduler configurations of diffusers may say: classes, options, defaults."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlora.samplers.arguments import describe, integer, number, on_host
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
_NUMBERS = ("sigma_min", "sigma_max", "shift_terminal")  # or None, as they are by default
_PAST = ("timestep_values",)  # of early versions, which knew nothing but None for it
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


class Configured(Protocol):
    """A scheduler of diffusers, or of this package in its place."""

    @property
    def config(self) -> Mapping[str, Any]: ...


Config = Mapping[str, Any] | str | Path | Configured


def read(config: Config) -> tuple[str, Options]:
    """Class name and every option of the class, checked in kind; see `table_from_config`."""
    given = _load(config)
    if "_class_name" not in given:
        raise ValueError(
            "config: _class_name: expected the class of the scheduler, got none: pass the scheduler"
            " itself, or add its name, as in dict(scheduler.config, _class_name='DDIMScheduler')"
        )
    name = _known(given["_class_name"])
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
        elif option in _PAST:
            if value is not None:
                raise refuse(name, option, "None", value)
        elif option not in elsewhere:
            message = "no such option; a newer version of diffusers may have it"
            raise ValueError(f"{name}: {option}: {message}, got {value!r}")
    return name, options


def _known(name: Any) -> Any:
    """FastX of `fastlora.integrations.diffusers` is X."""
    plain = name.removeprefix("Fast") if isinstance(name, str) else name
    return plain if isinstance(plain, str) and plain in DEFAULTS else name


def _of_scheduler(scheduler: Configured) -> Mapping[str, Any]:
    """The configuration of a live scheduler, which says everything but the class; where it names
    one, that may be the class whose configuration it was made from."""
    classes = [_known(kind.__name__) for kind in type(scheduler).__mro__]
    known = [name for name in classes if name in DEFAULTS or name in UNSUPPORTED]
    return dict(scheduler.config) | {"_class_name": (*known, classes[0])[0]}


def _load(config: Config) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, (str, Path)):
        if isinstance(getattr(config, "config", None), Mapping):
            return _of_scheduler(config)
        raise TypeError(f"config: expected a dict, a path or a scheduler, got {describe(config)}")
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
    if option in _NUMBERS and value is not None:
        if not math.isfinite(number(value)):
            raise refuse(name, option, "a number or None", value)
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


def bounds(name: str, options: Options) -> dict[str, Any]:
    """clip and threshold; thresholding comes first where both are on.

    Raises ValueError for what is out of range, also for a sample_max_value below 1: diffusers then
    divides by it whatever the sample, which is no dynamic thresholding.
    """
    if options.get("thresholding"):
        quantile, largest = options["dynamic_thresholding_ratio"], options["sample_max_value"]
        if not 0 < quantile <= 1:
            expected = "a number above 0 and up to 1"
            raise refuse(name, "dynamic_thresholding_ratio", expected, quantile)
        if not 1 <= largest < math.inf:
            raise refuse(name, "sample_max_value", "a number >= 1 with thresholding", largest)
        return {"clip": None, "threshold": (quantile, largest)}
    if not options.get("clip_sample"):
        return {"clip": None, "threshold": None}
    clip = options["clip_sample_range"]
    if not 0 < clip < math.inf:
        raise refuse(name, "clip_sample_range", "a number > 0", clip)
    return {"clip": clip, "threshold": None}


@on_host
def single_precision_ratios(name: str, options: Options) -> Tensor:
    """sigma / alpha [T] as diffusers has it: float32, computed in float32, held as float64.

    For what is cut off to an int, and so depends on how this is rounded.
    """
    T, kind = options["num_train_timesteps"], options["beta_schedule"]
    start, end = options["beta_start"], options["beta_end"]
    if options["trained_betas"] is None and kind == "linear":
        betas = torch.linspace(start, end, T, dtype=torch.float32)
    elif options["trained_betas"] is None and kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float32) ** 2
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


@on_host
def schedule_of(name: str, options: Options) -> Schedule:
    """The schedule of its betas. Raises ValueError where it has none, or they are none."""
    if "beta_schedule" not in options:
        raise ValueError(f"{name}: schedule: expected betas, got none (flow matching has sigmas)")
    T, trained = options["num_train_timesteps"], options["trained_betas"]
    kind, start, end = (options[o] for o in ("beta_schedule", "beta_start", "beta_end"))
    if T < 1:
        raise refuse(name, "num_train_timesteps", "an int >= 1", T)
    if trained is not None:
        try:
            betas = torch.as_tensor(trained, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise refuse(name, "trained_betas", "numbers", trained) from None
        if betas.shape != (T,):
            got = len(betas) if betas.dim() == 1 else trained
            raise refuse(name, "trained_betas", f"num_train_timesteps = {T} of them", got)
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
