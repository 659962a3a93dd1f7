"""Around a hot swap of PEFT's: what it would refuse half-way, what it takes for the old adapter's,
and the strengths and books that it leaves as the last adapter had them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastlora.adapters.specs import AdapterError
from fastlora.formats.changes import Change, LowRank, Target
from fastlora.formats.peft_config import write_settings
from fastlora.integrations.pipelines.peft_state import peft_layers

IGNORED = ("alpha_pattern", "use_rslora", "lora_dropout")  # PEFT wants them equal, and reads none
ADAPTER = re.compile(r"\.lora_[^.]+\.([^.]+)")  # in a parameter's name


def check_hotswap(
    models: Mapping[str, nn.Module],
    changes: Mapping[Target, Change],
    name: str | None,
    source: str,
) -> None:
    """Raises AdapterError for a swap that PEFT or diffusers cannot do: they find out half-way, and
    then the adapter that was there is lost."""
    start = f"{source}: hotswap"
    for component in dict.fromkeys(target.component for target in changes):
        config = getattr(models[component], "peft_config", {})
        if component.startswith("text_encoder"):
            raise AdapterError(f"{start}: diffusers exchanges no adapters of a {component}")
        if name not in config:
            raise AdapterError(
                f"{start}: the {component} has no adapter {name!r} to exchange; it has "
                f"{sorted(config) or 'none'}"
            )
    for place, change in changes.items():
        layer: Any = models[place.component].get_submodule(place.path)
        if name not in getattr(layer, "lora_A", ()):
            raise AdapterError(
                f"{start}: {place} has no adapter {name!r} to exchange; PEFT brings none where "
                "there was none: delete_adapters and load"
            )
        if change.magnitude is not None or name in layer.lora_variant:
            raise AdapterError(f"{start}: {place}: PEFT exchanges plain LoRAs alone, no DoRA")
        if name in layer.merged_adapters:
            raise AdapterError(f"{start}: {place}: {name!r} is fused; unfuse_lora first")


@contextmanager
def others_kept(models: Mapping[str, nn.Module], name: str) -> Iterator[None]:
    """Puts back, at the end of a block, what PEFT's swap of an adapter zeroes of others: every
    parameter in whose key the name occurs, as "a" does in all of them."""
    kept = [
        (parameter, parameter.detach().clone())
        for model in models.values()
        for key, parameter in model.named_parameters()
        if name in key and (match := ADAPTER.search(key)) is not None and match[1] != name
    ]
    try:
        yield
    finally:
        for parameter, values in kept:
            parameter.data.copy_(values)


def settle_hotswap(
    models: Mapping[str, nn.Module], changes: Mapping[Target, Change], name: str
) -> None:
    """Gives every module of a swapped adapter its own alpha / rank, and books that say so.

    PEFT takes one for all modules, and `set_scale` later that of the adapter before: its `r` and
    `lora_alpha` stay. Ranks are those of the parameters, which may be padded; they are saved so.
    Where the compiled model reads a tensor, it stays the same tensor.
    """
    for component in dict.fromkeys(target.component for target in changes):
        model: Any = models[component]
        layers = {p: layer for p, layer in peft_layers(model) if name in layer.lora_A}
        weights: dict[str, LowRank] = {}
        for path, layer in layers.items():
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            ratio = ratio_of(changes.get(Target(component, path)))
            weights[path] = LowRank(down, up, alpha=ratio * down.shape[0])
            layer.r[name], layer.lora_alpha[name] = down.shape[0], ratio * down.shape[0]
            layer.use_rslora[name] = False
            scaling = layer.scaling[name]
            if isinstance(scaling, torch.Tensor):
                layer.scaling[name] = scaling.fill_(ratio)
            else:
                layer.scaling[name] = ratio
        settings = write_settings(weights, dora=False, bias=False)
        for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
            setattr(model.peft_config[name], key, settings[key])


def ratio_of(change: Change | None) -> float:
    """alpha / rank; 1 for a module that the new file has not, whose parameters are zeros now."""
    if change is None:
        return 1.0
    assert isinstance(change.weight, LowRank)
    return change.weight.ratio
