"""fastlora: adapters of diffusion models, fused.

    import fastlora
    fastlora.inject(model, fastlora.LoRA(rank=8), where=r".*attn.*to_[qkv]", name="style")

See the README for a tour and `fastlora.ops` for the operators.
"""

from typing import TYPE_CHECKING, Any

from fastlora import adapters as _adapters
from fastlora import ops
from fastlora.adapters import (
    AdapterError,
    AdapterInfo,
    LoadReport,
    LoRA,
    Prepared,
    Spectral,
    adapters,
    combine,
    disable,
    enable,
    fold,
    inject,
    load,
    materialize,
    parameters,
    prepare,
    remove,
    reserve,
    save,
    scaled,
    set_scale,
    steady,
    swap,
    unfold,
)
from fastlora.formats.files import FormatError
from fastlora.integrations.accelerating import accelerate, restore
from fastlora.ops import ContractError, emulated
from fastlora.samplers import Sampler, Schedule, ddim, noise, sample, sample_steps
from fastlora.tuning import TuneReport, tune
from fastlora.verify import VerifyReport, verify

if TYPE_CHECKING:
    from fastlora.adapters import DecomposeReport, decompose, parameter_counts

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "ContractError",
    "DecomposeReport",
    "FormatError",
    "LoRA",
    "LoadReport",
    "Prepared",
    "Sampler",
    "Schedule",
    "Spectral",
    "TuneReport",
    "VerifyReport",
    "accelerate",
    "adapters",
    "combine",
    "ddim",
    "decompose",
    "disable",
    "emulated",
    "enable",
    "fold",
    "inject",
    "load",
    "materialize",
    "noise",
    "ops",
    "parameter_counts",
    "parameters",
    "prepare",
    "remove",
    "reserve",
    "restore",
    "sample",
    "sample_steps",
    "save",
    "scaled",
    "set_scale",
    "steady",
    "swap",
    "tune",
    "unfold",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("DecomposeReport", "decompose", "parameter_counts"):
        return getattr(_adapters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
