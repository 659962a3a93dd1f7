"""Updates of a layer that are no low-rank slot: what a `fastlora.formats` Change says, as it is.

LoHa, LoKr, whole differences, differences of norms and biases, and the DoRA forms of all.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.adapters.slots import Slot
from fastlora.formats.changes import Change, Parts


@dataclasses.dataclass(frozen=True)
class Delta:
    """What the parameters of a DeltaSlot are parts of: a Change without its tensors."""

    parts: type[Parts] | None  # LowRank, Hadamard, Kronecker, Dense; None: a bias alone
    settings: dict[str, Any]  # its fields that are no tensors: alpha, rank_stabilized, ...
    axis: Literal["out", "in"]
    rows: tuple[int, int, int] | None

    @classmethod
    def of(cls, change: Change) -> "Delta":
        if change.weight is None:
            return cls(None, {}, change.axis, change.rows)
        fields = {k: v for k, v in vars(change.weight).items() if not isinstance(v, Tensor)}
        return cls(type(change.weight), fields, change.axis, change.rows)


class DeltaSlot(Slot):
    """`V = W + strength ΔW`, with a magnitude `V · magnitude / ‖V‖`; `b + strength bias`.

    The parameters are the tensors of a Change under their names there: those of its parts (`w1_a`,
    `diff`, ...), `bias` [out], `magnitude` [out] or [in]. ΔW includes alpha / rank. The update is
    made of the whole weight: dropout of a LowRank has no place in it.
    """

    width = 1
    ratio = 1.0

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.spec = Delta.of(change)
        for name, tensor in tensors_of(change).items():
            self.register_parameter(name, nn.Parameter(tensor))

    @property
    def owned(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self._parameters)

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.change.kind

    @property
    def whole(self) -> str:  # type: ignore[override]
        if "bias" in self._parameters:
            return (
                "changes the bias itself"
                if self.spec.parts is None
                else ("has a bias beside its update and changes weight and bias themselves")
            )
        return "changes the weight itself"

    @property
    def rank(self) -> int | None:  # type: ignore[override]
        return getattr(self.change.weight, "rank", None)

    @property
    def change(self) -> Change:
        """The Change of the parameters as they are."""
        spec, own = self.spec, dict(self._parameters)
        bias, magnitude = own.pop("bias", None), own.pop("magnitude", None)
        weight: Any = None if spec.parts is None else spec.parts(**own, **spec.settings)
        return Change(weight, bias, magnitude, spec.axis, spec.rows)

    def extra_repr(self) -> str:
        rank = "" if self.rank is None else f"rank={self.rank}, "
        return f"{rank}kind={self.kind}"


class Update(NamedTuple):
    """A Change, whose tensors may be parameters, and its strength."""

    change: Change
    strength: Tensor  # []

    @property
    def changes_weight(self) -> bool:
        """Not the bias alone."""
        return self.change.weight is not None or self.change.magnitude is not None

    def tensors(self) -> list[Tensor]:
        return [*tensors_of(self.change).values(), self.strength]

    def detached(self) -> "Update":
        return Update(mapped(self.change, Tensor.detach), self.strength.detach())


def tensors_of(change: Change) -> dict[str, Tensor]:
    """The tensors of a Change by field name: those of its parts, bias, magnitude."""
    own = {} if change.weight is None else change.weight.tensors()
    beside = {"bias": change.bias, "magnitude": change.magnitude}
    return own | {k: v for k, v in beside.items() if v is not None}


def mapped(change: Change, function: Callable[[Tensor], Tensor]) -> Change:
    """The Change with `function` of every tensor."""
    weight = change.weight
    if weight is not None:
        own = {name: function(tensor) for name, tensor in weight.tensors().items()}
        weight = dataclasses.replace(weight, **own)
    bias, magnitude = (t if t is None else function(t) for t in (change.bias, change.magnitude))
    return dataclasses.replace(change, weight=weight, bias=bias, magnitude=magnitude)


def updates_of(layer: Any, active: Iterable[tuple[str, Any]]) -> tuple[Update, ...]:
    """The active DeltaSlots of a layer. Raises AdapterError for a strength per sample."""
    slots = [(name, slot) for name, slot in active if isinstance(slot, DeltaSlot)]
    return tuple(Update(slot.change, layer.strength(name)) for name, slot in slots)


def updated_weight(weight: Tensor, updates: Iterable[Update]) -> Tensor:
    """`W' = W + Σ strength ΔW`, computed in the weight's dtype.

    A magnitude is that of its own update, as for LoRA's DoRA beside other adapters: it adds
    `V · magnitude / ‖V‖ - W` with `V = W + strength ΔW`, as `Change.changed` has it.
    """
    total = weight
    for change, strength in updates:
        if change.magnitude is None:
            total = change.changed(total, strength)
            continue
        whole = change.changed(weight, strength)
        total = whole if total is weight else total + (whole - weight)
    return total


def updated_bias(bias: Tensor | None, dtype: torch.dtype, updates: Iterable[Update]) -> Any:
    """`b' = b + Σ strength bias` [out] in b's dtype, `dtype` where there is no b; b itself where
    nothing adds to it. Computed in at least float32."""
    biases = [(u.change.bias, u.strength) for u in updates if u.change.bias is not None]
    if not biases:
        return bias
    dtype = dtype if bias is None else bias.dtype
    wide = torch.promote_types(dtype, torch.float32)  # a strength [] would not widen the products
    total: Any = sum(strength * own.to(wide) for own, strength in biases)
    return (total if bias is None else bias + total).to(dtype)
