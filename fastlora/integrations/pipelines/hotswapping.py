"""After a hot swap: the strengths and the books that PEFT leaves as the last adapter had them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastlora.formats.changes import Change, LowRank, Target
from fastlora.formats.peft_config import write_settings


def settle_hotswap(
    models: Mapping[str, nn.Module], changes: Mapping[Target, Change], name: str
) -> None:
    """Gives every module of a swapped adapter its own alpha / rank.

    PEFT takes one for all modules, and `set_scale` later that of the adapter before: its `r` and
    `lora_alpha` stay. Where the compiled model reads a tensor, it stays the same tensor.
    """
    for component in dict.fromkeys(target.component for target in changes):
        weights: dict[str, LowRank] = {}
        for target, change in changes.items():
            if target.component == component:
                assert isinstance(change.weight, LowRank)
                weights[target.path] = change.weight
        model: Any = models[component]
        settings = write_settings(weights, dora=False, bias=False)
        for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
            setattr(model.peft_config[name], key, settings[key])
        for path, low in weights.items():
            layer: Any = model.get_submodule(path)
            stabilized = layer.use_rslora.get(name, False)
            layer.r[name] = low.rank
            layer.lora_alpha[name] = low.ratio * (math.sqrt(low.rank) if stabilized else low.rank)
            scaling = layer.scaling[name]
            if isinstance(scaling, torch.Tensor):
                layer.scaling[name] = scaling.fill_(low.ratio)
            else:
                layer.scaling[name] = low.ratio
