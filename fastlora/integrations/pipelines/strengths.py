"""The strengths of a model's adapters times factors for a while, and then what they were."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.control import Changes, restoring, strengths, write
from fastlora.adapters.lookup import HOST, known_names, walked
from fastlora.adapters.specs import AdapterError


class Strengths:
    """The adapters of one model: fastlora's, which live in arenas, and those that PEFT alone knows
    the strengths of, in layers that were not accelerated or that fastlora does not compute."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before: Changes = strengths(model)
        self.own_names = known_names(model)
        self.plain = plain_layers(model)
        self.names = {*self.own_names, *(n for _, names in self.plain for n in names)}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts all of them back at the end of a block."""
        plain = [(layer, _copied(layer.scaling, names)) for layer, names in self.plain]
        with restoring(self.model, self.before):
            try:
                yield
            finally:
                for layer, scaling in plain:
                    _put_back(layer.scaling, scaling)

    def check(self, factors: Mapping[str, float | Tensor]) -> None:
        """Raises AdapterError where strengths times factors would be none."""
        for arena, scales in self._times(factors):
            arena.check_each(scales)
            arena.check(scales)
        for name, factor in factors.items():
            layers = [layer for layer, names in self.plain if name in names]
            if isinstance(factor, Tensor) and layers:
                way = "" if HOST in vars(layers[0]) else ": fastlora.accelerate the pipeline again"
                raise AdapterError(
                    f"scale of {name!r}: PEFT computes its layers, with one strength for all "
                    f"images{way}"
                )

    def multiply(self, factors: Mapping[str, float | Tensor]) -> None:
        """Sets the strengths in arenas to what they were at first, times factors by name."""
        self.check(factors)
        write([(arena, scales, {}) for arena, scales in self._times(factors)])

    def multiply_plain(self, factors: Mapping[str, float | Tensor]) -> None:
        """Multiplies those that PEFT alone knows, once."""
        for layer, names in self.plain:
            for name in names:
                factor = factors.get(name, 1.0)
                if factor != 1.0:
                    layer.scaling[name] *= factor  # of a tensor that is compiled in: in place

    def _times(self, factors: Mapping[str, float | Tensor]) -> Iterator[tuple[Any, dict[str, Any]]]:
        for arena, scales, _ in self.before:
            new = {n: _product(n, scales[n], f) for n, f in factors.items() if n in scales}
            yield arena, new


def plain_layers(model: nn.Module) -> list[tuple[Any, list[str]]]:
    """PEFT's LoRA layers with adapters whose strengths are in no arena, and these adapters."""
    if sys.modules.get("peft") is None:
        return []
    from peft.tuners.lora import LoraLayer

    modules = {id(module): module for module in (model, *walked(model).children)}
    found = [(m, _alone(m)) for m in modules.values() if isinstance(m, LoraLayer)]
    return [(layer, names) for layer, names in found if names]


def _alone(layer: Any) -> list[str]:
    """The adapters of a layer of PEFT's whose strengths only that has: all where it was not
    accelerated; else those that fastlora computes nowhere, as while their scalings are tensors."""
    host = vars(layer).get(HOST)
    known = () if host is None else host._state.arena.scales
    return [name for name in layer.scaling if name not in known]


def _product(name: str, scale: float | Tensor, factor: float | Tensor) -> float | Tensor:
    if isinstance(scale, Tensor) and isinstance(factor, Tensor):
        if scale.shape != factor.shape:
            raise AdapterError(
                f"scale of {name!r}: expected {list(scale.shape)}, as set_scale has set it, got "
                f"{list(factor.shape)}"
            )
        return scale * factor.to(scale.device, scale.dtype)
    return scale * factor


def _copied(scaling: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    own = {name: scaling[name] for name in names}
    return {n: (s, s.clone() if isinstance(s, Tensor) else s) for n, s in own.items()}


@torch.no_grad()
def _put_back(scaling: Any, copied: Mapping[str, Any]) -> None:
    for name, (own, value) in copied.items():
        if isinstance(own, Tensor):
            own.copy_(value)
        if name in scaling:
            scaling[name] = own
