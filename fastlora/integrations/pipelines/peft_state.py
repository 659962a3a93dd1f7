"""What a model has of PEFT's, before a load and after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fastlora.formats.changes import Change, Target


class Before:
    """What a model has of PEFT's before a load, to be there again after one that fails half-way."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.names = set(getattr(model, "peft_config", ()))
        self.active = {layer: list(layer.active_adapters) for _, layer in peft_layers(model)}

    def put_back(self) -> None:
        from diffusers.utils.peft_utils import delete_adapter_layers

        for path, layer in list(peft_layers(self.model)):
            if layer in self.active:
                layer._active_adapter = self.active[layer]
            else:
                parent, _, last = path.rpartition(".")
                setattr(self.model.get_submodule(parent), last, layer.base_layer)
        for name in set(getattr(self.model, "peft_config", ())) - self.names:
            delete_adapter_layers(self.model, name)
            getattr(self.model, "peft_config", {}).pop(name, None)
        if not self.names and hasattr(self.model, "peft_config"):
            del self.model.peft_config


def peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that PEFT has put into a model, by path."""
    if sys.modules.get("peft") is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


def take_up(models: Mapping[str, nn.Module], changes: Mapping[Target, Change]) -> None:
    """Has accelerated layers look at what they have got: PEFT makes them with parameters of float32
    on the meta device, and those of the file come later, in the dtype of the model."""
    from fastlora.integrations.peft.layers import FastLayer  # PEFT is there by now

    for place in changes:
        layer = models[place.component].get_submodule(place.path)
        if isinstance(layer, FastLayer):
            layer.synchronise()
