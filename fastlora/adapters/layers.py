"""The layers that can be adapted: how each uses its weight and adds low-rank parts."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted, adapts
from fastlora.adapters.beside import (
    Gated,
    add_low_rank,
    dropped,
    packed,
    quantised_since,
    with_low_rank,
)
from fastlora.adapters.changed_weight import Recipe, changed_bias
from fastlora.adapters.dora import row_scale
from fastlora.adapters.slots import LoRASlot, in_place
from fastlora.adapters.spectral import in_activations, operands
from fastlora.adapters.state import is_capturing
from fastlora.adapters.tensors import is_plain
from fastlora.ops import ContractError, lora_add_, lora_linear, spectral_linear

# Bound once: the shortest way through an adapted Linear looks up as little as it can.
_lora_linear = lora_linear.eager  # type: ignore[attr-defined]
_is_compiling = torch.compiler.is_compiling


class LinearForward(Adapted):
    """A linear layer with a plain weight: what nn.Linear and Conv1D of transformers share."""

    fused = staticmethod(_lora_linear)  # of an input, `weight`, bias, D, U, gate, row scale

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        if _is_compiling():
            return super().forward(input)
        state = self._state
        if state.epoch != state.arena.epoch or (fast := state.fast) is None:
            return super().forward(input)
        slot, gate, own, pins = fast
        if pins is not None and (
            is_capturing() or (pins and torch.is_grad_enabled()) or not in_place(pins)
        ):
            return super().forward(input)
        try:
            weight, bias, down, up = own["weight"], own["bias"], slot["down"], slot["up"]
        except KeyError:  # a parametrisation has taken one away since
            state.forget()
            return super().forward(input)
        try:
            return self.fused(input, weight, bias, down, up, gate, None)
        except ContractError as error:
            raise self.explained(error, input) from None

    def shortcut(self) -> Any:
        """(D and U, gate, own parameters, pins), where one LoRA is all that is to compute.

        Pins are those of the reserve where its buffers are used: not with gradients. They are ()
        where others are off, which have to be computed too in a CUDA graph. Else None.
        """
        state, holder, own = self._state, self.fastlora, self._parameters
        names = [name for name, _ in state.active]
        reserved = bool(names) and all(name in holder.reserved_rows for name in names)
        if state.merged or state.arena.learned or not (reserved or len(names) == 1):
            return None
        if not is_plain(own.get("weight")) or self.weight.dtype == torch.float64:
            return None
        with torch.no_grad():  # the buffer itself, not a copy
            if reserved and state.packed is not None and not holder.drops:
                down, up, _ = state.packed
                gate = self.gates(0, len(down), state.rows)
                return {"down": down, "up": up}, gate, own, holder.pins
            name, slot = state.active[0]
            if len(names) > 1 or not isinstance(slot, LoRASlot):
                return None
            if slot.spec.dora or slot.spec.dropout:
                return None
            return slot._parameters, self.gate(name), own, None if len(holder) == 1 else ()

    def register_parameter(self, name: str, param: Any) -> None:
        super().register_parameter(name, param)
        self._state.forget()  # the weight may be quantised from here on

    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def changed(self, x: Tensor, recipe: Recipe, slots: Gated) -> Tensor:
        if not is_plain(self.weight):
            raise quantised_since(self, "one of its adapters")
        whole = recipe.weight_updates or any(s.spec.dora for s, _ in slots)
        if recipe.shift is None or whole or not in_activations(self, x):
            return super().changed(x, recipe, slots)
        weight, *factors = operands(self, recipe.shift)
        y = spectral_linear(x, weight, changed_bias(self, recipe), *factors)
        return self.explaining(x, add_low_rank, self, y, x, slots) if slots else y

    def low_rank(self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Gated) -> Tensor:
        dora = any(s.spec.dora for s, _ in slots)
        if not is_plain(weight):  # torchao's, for one: the class stays nn.Linear
            if dora:
                raise quantised_since(self, "DoRA")
            return with_low_rank(self, self.base(x), x, slots)
        dropout = self.training and any(s.spec.dropout for s, _ in slots)
        if not dropout and (not dora or len(slots) == 1):
            down, up, gate = packed(self, slots, weight.dtype)
            scale = row_scale(self, weight, *slots[0]) if dora else None
            return lora_linear(x, weight, bias, down, up, gate, scale)
        # Dropout needs the adapter's own input; several DoRA share no single row scale.
        y = F.linear(x, weight)
        scales = row_scales(self, weight, slots)
        y = rescaled(y, scales)
        for (slot, gate), scale in zip(slots, scales, strict=True):
            lora_add_(y, dropped(slot, x, self.training), slot.down, scaled_up(slot, scale), gate)
        return y if bias is None else y + bias.to(y.dtype)


@adapts(nn.Linear)
class AdaptedLinear(LinearForward, nn.Linear):
    pass


@adapts(nn.Conv2d)
class AdaptedConv2d(Adapted, nn.Conv2d):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A layer that is made of this class is a plain one: PEFT makes D and U of a convolution
        with its type."""
        if (args or kwargs) and not cls.foreign:
            return nn.Conv2d(*args, **kwargs)
        return super().__new__(cls)

    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def low_rank(self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Gated) -> Tensor:
        if x.dim() == 3:  # a single image without a batch dimension
            return self.low_rank(x[None], weight, bias, slots)[0]
        dora = any(s.spec.dora for s, _ in slots)
        y = self._conv_forward(x, weight, None if dora else bias)
        scales = row_scales(self, weight, slots)
        y = rescaled(y, [s if s is None else s[:, None, None] for s in scales])
        for (slot, gate), scale in zip(slots, scales, strict=True):
            h = self._conv_forward(dropped(slot, x, self.training), slot.down.to(x.dtype), None)
            y = self.add_up(y, h, scaled_up(slot, scale), gate)
        return y + bias[:, None, None].to(y.dtype) if dora and bias is not None else y

    def add_up(self, y: Tensor, h: Tensor, up: Tensor, gate: Tensor) -> Tensor:
        if self.groups == 1:
            lora_add_(y.movedim(1, -1), h.movedim(1, -1), None, up.flatten(1), gate)
            return y
        if gate.dim() == 2 and len(gate) != len(h):
            raise ContractError(
                f"x: expected a batch of {len(gate)}, one for each strength, got {len(h)}"
            )
        h = (h.to(gate.dtype) * gate[..., None, None]).to(y.dtype)
        return y + F.conv2d(h, up.to(y.dtype), groups=self.groups)


@adapts(nn.Embedding)
class AdaptedEmbedding(Adapted, nn.Embedding):
    """`max_norm` limits the rows of the base, as it does without adapters; what the adapters add
    comes after."""

    transposed = True  # rows are the vocabulary

    def limited(self, weight: Tensor) -> Tensor:
        """The weight with the rows that a look-up would shorten to max_norm."""
        if self.max_norm is None:
            return weight
        rows = torch.arange(len(weight), device=weight.device)
        return torch.embedding_renorm_(weight.clone(), rows, self.max_norm, self.norm_type)

    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        max_norm = None if weight is self.fastlora.folded_weight else self.max_norm
        return F.embedding(
            x, weight, self.padding_idx, max_norm, self.norm_type, self.scale_grad_by_freq,
            self.sparse,
        )  # fmt: skip

    def low_rank(self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Gated) -> Tensor:
        y = self.with_weight(x, weight, None)
        scales = row_scales(self, weight.t(), slots)
        y = rescaled(y, scales)
        for (slot, gate), scale in zip(slots, scales, strict=True):
            h = F.embedding(
                x, slot.down.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
            )
            lora_add_(y, h.to(y.dtype), None, scaled_up(slot, scale), gate)
        return y


class AdaptedNorm(Adapted):
    def is_norm(self) -> bool:
        return True


@adapts(nn.LayerNorm)
class AdaptedLayerNorm(AdaptedNorm, nn.LayerNorm):
    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


@adapts(nn.GroupNorm)
class AdaptedGroupNorm(AdaptedNorm, nn.GroupNorm):
    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


@adapts(nn.RMSNorm)
class AdaptedRMSNorm(AdaptedNorm, nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # torch's name for it
        return super().forward(x)

    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


# --- parts of a low-rank forward ------------------------------------------------------------------


def row_scales(layer: Adapted, weight: Tensor, slots: Gated) -> list[Tensor | None]:
    """DoRA's row scales ρ of the slots; None for plain LoRA."""
    return [row_scale(layer, weight, s, g) if s.spec.dora else None for s, g in slots]


def rescaled(y: Tensor, scales: list[Tensor | None]) -> Tensor:
    """`y (1 + Σ (ρ - 1))`: the base's share of every DoRA."""
    changes = [s - 1.0 for s in scales if s is not None]
    return y * (functools.reduce(torch.add, changes) + 1.0).to(y.dtype) if changes else y


def scaled_up(slot: LoRASlot, scale: Tensor | None) -> Tensor:
    """U, its rows times ρ."""
    if scale is None:
        return slot.up
    return slot.up * scale.view(-1, *[1] * (slot.up.dim() - 1)).to(slot.up.dtype)
