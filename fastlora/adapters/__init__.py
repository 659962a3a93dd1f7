"""Adapters on existing layers: inject, scale, fold, save, load, remove."""

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
from fastlora.adapters.io import load, save
from fastlora.adapters.lookup import adapted_layers
from fastlora.adapters.materialize import materialize
from fastlora.adapters.phases import phases
from fastlora.adapters.reserve import ReserveInfo, reserve
from fastlora.adapters.specs import AdapterError, AdapterInfo, LoRA, Spectral
from fastlora.adapters.steady import steady

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "CapturedStrengths",
    "LoRA",
    "ReserveInfo",
    "Spectral",
    "adapted_layers",
    "adapters",
    "combine",
    "disable",
    "enable",
    "fold",
    "inject",
    "load",
    "materialize",
    "parameters",
    "phases",
    "remove",
    "reserve",
    "save",
    "scaled",
    "set_scale",
    "steady",
    "tiled",
    "unfold",
]
