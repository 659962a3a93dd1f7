"""Adapters on existing layers: inject, scale, fold, save, load, remove."""

from typing import TYPE_CHECKING, Any

import fastlora.adapters.transposed  # noqa: F401  # registers its layer
from fastlora.adapters.adapted import adapts_later
from fastlora.adapters.captured import CapturedStrengths
from fastlora.adapters.combine import combine
from fastlora.adapters.control import (
    adapters,
    disable,
    enable,
    parameters,
    scaled,
    set_scale,
    tiled,
)
from fastlora.adapters.folding import fold, unfold
from fastlora.adapters.inject import inject, remove
from fastlora.adapters.load_report import LoadReport
from fastlora.adapters.loading import load
from fastlora.adapters.lookup import adapted_layers
from fastlora.adapters.materialize import materialize
from fastlora.adapters.phases import phases
from fastlora.adapters.reserve import ReserveInfo, reserve
from fastlora.adapters.saving import save
from fastlora.adapters.specs import AdapterError, AdapterInfo, LoRA, Spectral
from fastlora.adapters.steady import steady
from fastlora.adapters.swapping import Prepared, prepare, swap

if TYPE_CHECKING:  # when they are asked for: `import fastlora` stays light
    from fastlora.adapters.counting import parameter_counts
    from fastlora.adapters.decomposing import DecomposeReport, decompose

adapts_later("transformers.pytorch_utils.Conv1D", "fastlora.adapters.conv1d")

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "CapturedStrengths",
    "DecomposeReport",
    "LoRA",
    "LoadReport",
    "Prepared",
    "ReserveInfo",
    "Spectral",
    "adapted_layers",
    "adapters",
    "combine",
    "decompose",
    "disable",
    "enable",
    "fold",
    "inject",
    "load",
    "materialize",
    "parameter_counts",
    "parameters",
    "phases",
    "prepare",
    "remove",
    "reserve",
    "save",
    "scaled",
    "set_scale",
    "steady",
    "swap",
    "tiled",
    "unfold",
]


def __getattr__(name: str) -> Any:
    if name in ("decompose", "DecomposeReport"):
        from fastlora.adapters import decomposing

        return getattr(decomposing, name)
    if name == "parameter_counts":
        from fastlora.adapters.counting import parameter_counts

        return parameter_counts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
