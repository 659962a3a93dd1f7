"""Adapters beside a base that computes with its weight in a way of its own (quantised,
parametrised): the base's forward, then the low-rank part added in place."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastlora.adapters.adapted import Adapted, adapts_subclasses
from fastlora.adapters.slots import LoRASlot
from fastlora.adapters.specs import AdapterError
from fastlora.ops import lora_add_

Gated = list[tuple[Any, Tensor]]  # LoRASlots, or what a reserve holds as one, with their gates


@adapts_subclasses(nn.Linear)
class AdaptedLinearLike(Adapted):
    """A subclass of nn.Linear: Linear8bitLt and Linear4bit of bitsandbytes,
    GGUFLinear of diffusers, or anybody's."""

    beside = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        y = self.base(*args, **kwargs)
        slots = self.low_rank_slots(self.active())
        if not slots:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        return self.explaining(x, with_low_rank, self, y, x, slots)


def with_low_rank(layer: Adapted, y: Tensor, x: Tensor, slots: Gated) -> Tensor:
    """`y + Σ ((x Dᵀ) ∘ g) Uᵀ` where y is what the base has computed from x, in y's dtype."""
    if torch.is_grad_enabled():
        silent = x.requires_grad and not y.requires_grad
        # What its backward has saved may be the output itself, which may also be a view that a
        # custom function has made and nobody may write to.
        y = y.clone()
        if silent and layer.training and not is_compiling():
            warn_of_no_gradient(layer)
    return add_low_rank(layer, y, x, slots)


def warn_of_no_gradient(layer: Adapted) -> None:
    warnings.warn(
        f"{layer._state.path or 'the layer'}: no gradient passes through its base, whose weight is "
        f"{kind_of_weight(layer)}: adapters before it learn nothing from what comes after it. To "
        "train, quantise the weights alone and not the activations",
        stacklevel=4,
    )


def add_low_rank(layer: Adapted, y: Tensor, x: Tensor, slots: Gated) -> Tensor:
    """`y += Σ ((x Dᵀ) ∘ g) Uᵀ` in place: all slots in one pass over y, or each by itself where one
    has dropout, which is for its own input."""
    x_in = x.to(y.dtype)
    if layer.training and any(s.spec.dropout for s, _ in slots):
        for slot, gate in slots:
            down, up = usable(slot.down, y.dtype), usable(slot.up, y.dtype)
            lora_add_(y, dropped(slot, x_in, True), down, up, gate)
    else:
        lora_add_(y, x_in, *packed(layer, slots, y.dtype))
    return y


def usable(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in a dtype that operators take beside `dtype`. A quantised layer does not tell its
    own before it is called, so that a file may have brought the other of the 16-bit ones."""
    return factor if factor.dtype in (dtype, torch.float32) else factor.to(dtype)


def packed(layer: Adapted, slots: Gated, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """D, U and g of all slots, concatenated along rank in `dtype` where there are several. Never
    kept: a kept copy would not see what an optimiser or an average writes. `reserve` makes this one
    slot."""
    if len(slots) == 1:
        slot, gate = slots[0]
        return usable(slot.down, dtype), usable(slot.up, dtype), gate
    downs, ups = [s.down.to(dtype) for s, _ in slots], [s.up.to(dtype) for s, _ in slots]
    batches = [len(g) for _, g in slots if g.dim() == 2]
    if len(slots) == len(layer.fastlora) and not layer.fastlora.capacity:  # neighbours there
        width = sum(s.width for s, _ in slots)
        gate = layer.gates(0, width, per_sample=bool(batches))
    else:
        gates = [g for _, g in slots]
        if batches:
            gates = [g if g.dim() == 2 else g.expand(batches[0], -1) for g in gates]
        gate = torch.cat(gates, -1)
    return torch.cat(downs), torch.cat(ups, 1), gate


def dropped(slot: LoRASlot, x: Tensor, training: bool) -> Tensor:
    return F.dropout(x, slot.spec.dropout, training) if slot.spec.dropout else x


def quantised_since(layer: Adapted, what: str) -> AdapterError:
    """The error for a layer whose weight was quantised under an adapter that needs it whole."""
    return AdapterError(
        f"{layer._state.path or 'the layer'}: {what} needs the plain weight, which has become "
        f"{kind_of_weight(layer)} since; remove the adapter, or fold(model, permanent=True) before "
        "quantising"
    )


def kind_of_weight(layer: nn.Module) -> str:
    """What a weight is instead of plain values, for messages."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return "computed"
    kind = type(weight)
    return str(weight.dtype) if kind in (Tensor, nn.Parameter) else f"of type {kind.__name__}"
