"""The strengths of a model's adapters times factors for a while, and then what they were."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.control import Changes, restoring, strengths, write
from fastlora.adapters.lookup import HOST, known_names, walked
from fastlora.adapters.specs import AdapterError


class Strengths:
    """The adapters of one model: fastlora's, which live in arenas, and layers of PEFT that were not
    accelerated."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before: Changes = strengths(model)
        self.plain = plain_layers(model)
        self.own_names = known_names(model)
        self.names = {*self.own_names, *(n for layer in self.plain for n in layer.scaling)}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts all of them back at the end of a block."""
        plain = [(layer, _copied(layer.scaling)) for layer in self.plain]
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
            if isinstance(factor, Tensor) and any(name in layer.scaling for layer in self.plain):
                raise AdapterError(
                    f"scale of {name!r}: its layers are PEFT's own, which have one strength for "
                    "all images: fastlora.accelerate the pipeline again"
                )

    def multiply(self, factors: Mapping[str, float | Tensor]) -> None:
        """Sets the strengths in arenas to what they were at first, times factors by name."""
        self.check(factors)
        write([(arena, scales, {}) for arena, scales in self._times(factors)])

    def multiply_plain(self, factors: Mapping[str, float | Tensor]) -> None:
        """Multiplies those of PEFT's own layers, once."""
        for layer in self.plain:
            for name in layer.scaling:
                factor = factors.get(name, 1.0)
                if factor != 1.0:
                    layer.scaling[name] *= factor  # of a tensor that is compiled in: in place

    def _times(self, factors: Mapping[str, float | Tensor]) -> Iterator[tuple[Any, dict[str, Any]]]:
        for arena, scales, _ in self.before:
            new = {n: _product(n, scales[n], f) for n, f in factors.items() if n in scales}
            yield arena, new


def plain_layers(model: nn.Module) -> list[Any]:
    """The LoRA layers of PEFT that are none of fastlora's too."""
    if sys.modules.get("peft") is None:
        return []
    from peft.tuners.lora import LoraLayer

    modules = {id(module): module for module in (model, *walked(model).children)}
    return [m for m in modules.values() if isinstance(m, LoraLayer) and HOST not in vars(m)]


def _product(name: str, scale: float | Tensor, factor: float | Tensor) -> float | Tensor:
    if isinstance(scale, Tensor) and isinstance(factor, Tensor):
        if scale.shape != factor.shape:
            raise AdapterError(
                f"scale of {name!r}: expected {list(scale.shape)}, as set_scale has set it, got "
                f"{list(factor.shape)}"
            )
        return scale * factor.to(scale.device, scale.dtype)
    return scale * factor


def _copied(scaling: Mapping[str, Any]) -> dict[str, Any]:
    return {n: (s, s.clone() if isinstance(s, Tensor) else s) for n, s in scaling.items()}


@torch.no_grad()
def _put_back(scaling: Any, copied: Mapping[str, Any]) -> None:
    for name, (own, value) in copied.items():
        if isinstance(own, Tensor):
            own.copy_(value)
        if name in scaling:
            scaling[name] = own
