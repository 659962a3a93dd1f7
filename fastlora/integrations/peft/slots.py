"""A slot whose parameters are PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastlora.adapters.slots import LoRASlot
from fastlora.adapters.specs import LoRA

Place = tuple[dict[str, Any], str]  # a module's `_parameters`, and the key of one in it


class Parameters:
    """PEFT's parameters under a slot's names, as they are now: training, an average or a load may
    exchange them at any time. What torch's modules ask of their `_parameters`."""

    def __init__(self, places: dict[str, Place]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Any:
        found, key = self.places[name]
        return found[key]

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.places else default

    def keys(self) -> list[str]:
        return list(self.places)

    def values(self) -> list[Any]:
        return [self[name] for name in self.places]

    def items(self) -> list[tuple[str, Any]]:
        return [(name, self[name]) for name in self.places]

    def __iter__(self) -> Any:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places


class PeftSlot(LoRASlot):
    """One adapter of one of PEFT's layers. `ratio`: PEFT's scaling, zero where the layer does not
    have the adapter among its active ones."""

    ratio = 0.0  # type: ignore[assignment]  # a number that PEFT changes

    def __init__(self, places: dict[str, Place], spec: LoRA) -> None:
        nn.Module.__init__(self)
        self.spec = spec
        vars(self)["_parameters"] = Parameters(places)

    @property
    def down(self) -> Tensor:  # type: ignore[override]
        return self._parameters["down"]  # type: ignore[return-value]

    @property
    def up(self) -> Tensor:  # type: ignore[override]
        return self._parameters["up"]  # type: ignore[return-value]

    @property
    def magnitude(self) -> Tensor | None:  # type: ignore[override]
        found = self._parameters.get("magnitude")
        return None if found is None else found.view(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PeftSlot:
        return self  # PEFT's modules do that
