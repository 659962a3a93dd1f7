"""An adapted layer is its base layer under another class: same object, same parameters, same keys.

`adapted_class(type(module))` gives a subclass of the base's class; `module.__class__ = ...` adapts it
and taking the class back restores it. The adapters' parameters live in the child module `fastlora`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.adapters.arena import Arena
from fastlora.adapters.dora import row_scale
from fastlora.adapters.slots import LoRASlot, Slots, SpectralSlot
from fastlora.adapters.specs import AdapterError
from fastlora.ops import lora_add_, lora_linear, spectral_weight

_lora_linear, _is_compiling = lora_linear.eager, torch.compiler.is_compiling


class LayerState:
    """What an adapted layer caches; rebuilt when the arena's epoch moves on."""

    __slots__ = ("arena", "offset", "path", "merged", "epoch", "fast", "active", "cache")

    def __init__(self, arena: Arena, path: str) -> None:
        self.arena, self.path = arena, path
        self.offset = 0
        self.merged = False
        self.forget()

    def forget(self) -> None:
        self.epoch = -1
        self.fast: Any = None  # (parameters of the only slot, gate): the shortest way through
        self.active: tuple[tuple[str, Any], ...] = ()
        self.cache: dict[str, tuple[Any, Any]] = {}

    def __getstate__(self) -> Any:
        return self.arena, self.path, self.offset, self.merged

    def __setstate__(self, state: Any) -> None:
        self.arena, self.path, self.offset, self.merged = state
        self.forget()


class Adapted(nn.Module):
    """What all adapted layers share. Subclasses say how their base uses a weight."""

    fastlora: Slots
    _state: LayerState

    # --- what a base class provides ---------------------------------------------------------------

    def base(self, x: Tensor, *args: Any) -> Tensor:
        """The base layer alone."""
        return super().forward(x, *args)

    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The base layer's forward with another weight and bias."""
        raise NotImplementedError

    def low_rank(self, x: Tensor, weight: Tensor | None, slots: list[tuple[LoRASlot, Tensor]]) -> Tensor:
        """The base (on `weight`, None: its own) plus the slots' low-rank parts with their gates."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """The weight as `[out, everything else]`, a view."""
        return self.weight.reshape(self.weight.shape[0], -1)

    # --- the forward pass -------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        state = self._state
        if state.merged:
            return self.with_weight(x, self.fastlora.folded_weight, self.bias_or_none())
        if torch.compiler.is_compiling():
            active = tuple(self.fastlora.items())
        else:
            self.refresh()
            active = state.active
        if not active:
            return self.base(x, *args)
        weight = self.spectral(active) if self.fastlora.svd_s is not None or self.is_norm() else None
        slots = [(s, self.gate(name)) for name, s in active if isinstance(s, LoRASlot)]
        if slots:
            return self.low_rank(x, weight, slots)
        if weight is None:
            return self.base(x, *args)
        return self.with_weight(x, weight, self.bias_or_none())

    def refresh(self) -> None:
        """Takes up what changed in the arena since the last call."""
        state = self._state
        if state.epoch == state.arena.epoch:
            return
        state.forget()
        state.epoch = state.arena.epoch
        state.active = tuple(
            (name, slot) for name, slot in self.fastlora.items() if not state.arena.off(name)
        )
        state.fast = self.shortcut()

    def shortcut(self) -> Any:
        return None

    def bias_or_none(self) -> Tensor | None:
        return self._parameters.get("bias")

    def is_norm(self) -> bool:
        return False

    def gate(self, name: str) -> Tensor:
        """The gates `[width]` or `[batch, width]` of one slot: float32, float64 beside float64."""
        state, offset = self._state, self._state.offset
        for other, slot in self.fastlora.items():
            if other == name:
                gate = state.arena.gate(self.weight.device, offset, slot.width)
                return gate.double() if self.weight.dtype == torch.float64 else gate
            offset += slot.width
        raise AdapterError(f"{state.path}: no adapter named {name!r}; it has {list(self.fastlora)}")

    def spectral(self, active: Any) -> Tensor | None:
        """The weight under the active spectral shifts; None without any. Kept while nothing changes."""
        slots = [(n, s) for n, s in active if isinstance(s, SpectralSlot)]
        if not slots:
            return None
        gates = [self.gate(n) for n, _ in slots]
        if any(g.dim() == 2 for g in gates):
            raise AdapterError(
                f"{self._state.path}: a spectral shift changes the weight itself, so its strength "
                "cannot differ per sample; use a number for its scale"
            )
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.spectral_now(slots, gates)
        key = [self.weight, *(s.shift for _, s in slots), *gates]
        return self.cached("spectral", key, lambda: self.spectral_now(slots, gates))

    def spectral_now(self, slots: Any, gates: list[Tensor]) -> Tensor:
        factors = self.fastlora
        if factors.svd_s is None:  # a norm: w + strength δ
            shift = sum(g.to(s.shift.dtype) * s.shift for g, (_, s) in zip(gates, slots, strict=True))
            return (self.weight + shift).to(self.weight.dtype)
        if len(slots) == 1:
            shift, strength = slots[0][1].shift, gates[0].reshape(())
        else:  # several shifts of one layer add up under one relu
            shift = sum(g.to(s.shift.dtype) * s.shift for g, (_, s) in zip(gates, slots, strict=True))
            strength = torch.ones_like(gates[0].reshape(()))
        folded = spectral_weight(self.matrix(), factors.svd_u, factors.svd_s, factors.svd_vh, shift, strength)
        return folded.view(self.weight.shape)

    def cached(self, name: str, key: list[Tensor], make: Any) -> Any:
        """`make()`, remembered as long as the tensors in `key` are the same at the same version."""
        stamp = [(id(t), t.data_ptr(), t._version) for t in key if not t.is_inference()]
        found = self._state.cache.get(name)
        if found is not None and found[0] == stamp and len(stamp) == len(key):
            return found[1]
        made = make()
        self._state.cache[name] = (stamp, made)
        return made

    # --- what torch does to modules -----------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        merged, self._state.merged = self._state.merged, False
        if merged:
            self.fastlora.folded_weight = None
        result = super()._apply(fn, recurse)
        self._state.forget()  # the shortcut holds what may just have been replaced
        self._state.arena.prepare(self.weight.device)
        if merged:  # the fold of the converted weight, not the conversion of the fold
            from fastlora.adapters.folding import fold_layers

            fold_layers([self])
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Adapted classes may be made at run time; pickle and deepcopy find them through the base.
        return _blank, (base_class(type(self)),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


class AdaptedLinear(Adapted, nn.Linear):
    def forward(self, x: Tensor, *args: Any) -> Tensor:
        state = self._state
        fast = state.fast
        if fast is None or state.epoch != state.arena.epoch or _is_compiling():
            return super().forward(x, *args)
        slot, gate, own = fast
        return _lora_linear(x, own["weight"], own["bias"], slot["down"], slot["up"], gate, None)

    def shortcut(self) -> Any:
        if len(self._state.active) != 1 or self._state.merged:
            return None
        name, slot = self._state.active[0]
        plain = isinstance(slot, LoRASlot) and not slot.spec.dora and slot.spec.dropout == 0.0
        own = self._parameters
        if not plain or own.get("weight") is None or self.weight.dtype == torch.float64:
            return None
        return slot._parameters, self.gate(name), own

    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def low_rank(self, x: Tensor, weight: Tensor | None, slots: list[tuple[LoRASlot, Tensor]]) -> Tensor:
        weight = self.weight if weight is None else weight
        dora = [s for s, _ in slots if s.spec.dora]
        dropout = self.training and any(s.spec.dropout for s, _ in slots)
        if not dropout and (not dora or len(slots) == 1):
            down, up, gate = self.packed(slots)
            scale = row_scale(self, weight, *slots[0]) if dora else None
            return lora_linear(x, weight, self.bias, down, up, gate, scale)
        # Dropout needs the adapter's own input; several DoRA share no single row scale.
        y = F.linear(x, weight)
        total, parts = None, []
        for slot, gate in slots:
            part = dropped(slot, x, self.training)
            scale = row_scale(self, weight, slot, gate) if slot.spec.dora else None
            if scale is not None:
                total = scale - 1.0 if total is None else total + (scale - 1.0)
            parts.append((slot, gate, part, scale))
        if total is not None:
            y = y * (1.0 + total).to(y.dtype)
        for slot, gate, part, scale in parts:
            up = slot.up if scale is None else slot.up * scale[:, None].to(slot.up.dtype)
            lora_add_(y, part, slot.down, up, gate)
        return y if self.bias is None else y + self.bias

    def packed(self, slots: list[tuple[LoRASlot, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """D, U and g of all slots, concatenated along rank; a copy only where there are several."""
        if len(slots) == 1:
            return slots[0][0].down, slots[0][0].up, slots[0][1]
        dtype = self.weight.dtype if self.weight.is_floating_point() else slots[0][0].down.dtype

        def make() -> tuple[Tensor, Tensor]:
            downs, ups = [s.down.to(dtype) for s, _ in slots], [s.up.to(dtype) for s, _ in slots]
            return torch.cat(downs), torch.cat(ups, 1)

        if len(slots) == len(self.fastlora) and dtype != torch.float64:  # neighbours in the arena
            state, total = self._state, sum(s.width for s, _ in slots)
            gate = state.arena.gate(self.weight.device, state.offset, total)
        else:
            gate = torch.cat([g for _, g in slots], -1)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return *make(), gate
        key = [p for s, _ in slots for p in (s.down, s.up)]
        return *self.cached("packed", key, make), gate


class AdaptedLinearLike(Adapted):
    """A subclass of nn.Linear that computes in a way of its own (quantised, parametrised): its own
    forward, then the low-rank part added in place."""

    def low_rank(self, x: Tensor, weight: Tensor | None, slots: list[tuple[LoRASlot, Tensor]]) -> Tensor:
        y = self.base(x)
        for slot, gate in slots:
            h = dropped(slot, x, self.training).to(y.dtype)
            lora_add_(y, h, slot.down, slot.up, gate)
        return y


class AdaptedConv2d(Adapted, nn.Conv2d):
    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def low_rank(self, x: Tensor, weight: Tensor | None, slots: list[tuple[LoRASlot, Tensor]]) -> Tensor:
        weight = self.weight if weight is None else weight
        if x.dim() == 3:  # a single image without a batch dimension
            return self.low_rank(x[None], weight, slots)[0]
        dora = any(s.spec.dora for s, _ in slots)
        y = self._conv_forward(x, weight, None if dora else self.bias)
        scales = [row_scale(self, weight, s, g) if s.spec.dora else None for s, g in slots]
        if dora:
            total = 1.0 + sum(s - 1.0 for s in scales if s is not None)
            y = y * total.to(y.dtype)[:, None, None]
        for (slot, gate), scale in zip(slots, scales, strict=True):
            h = self._conv_forward(dropped(slot, x, self.training), slot.down.to(x.dtype), None)
            up = slot.up if scale is None else slot.up * scale[:, None, None, None].to(slot.up.dtype)
            y = self.add_up(y, h, up, gate)
        return y + self.bias[:, None, None] if dora and self.bias is not None else y

    def add_up(self, y: Tensor, h: Tensor, up: Tensor, gate: Tensor) -> Tensor:
        if self.groups == 1:
            lora_add_(y.movedim(1, -1), h.movedim(1, -1), None, up.flatten(1), gate)
            return y
        h = (h.to(gate.dtype) * gate[..., None, None]).to(y.dtype)
        return y + F.conv2d(h, up.to(y.dtype), groups=self.groups)


class AdaptedEmbedding(Adapted, nn.Embedding):
    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(
            x, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq,
            self.sparse,
        )  # fmt: skip

    def low_rank(self, x: Tensor, weight: Tensor | None, slots: list[tuple[LoRASlot, Tensor]]) -> Tensor:
        weight = self.weight if weight is None else weight
        y = self.with_weight(x, weight, None)
        scales = [row_scale(self, weight.t(), s, g) if s.spec.dora else None for s, g in slots]
        if any(s is not None for s in scales):
            y = y * (1.0 + sum(s - 1.0 for s in scales if s is not None)).to(y.dtype)
        for (slot, gate), scale in zip(slots, scales, strict=True):
            h = F.embedding(x, slot.down.t(), self.padding_idx).to(y.dtype)
            up = slot.up if scale is None else slot.up * scale[:, None].to(slot.up.dtype)
            lora_add_(y, h, None, up, gate)
        return y


class AdaptedNorm(Adapted):
    def is_norm(self) -> bool:
        return True


class AdaptedLayerNorm(AdaptedNorm, nn.LayerNorm):
    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class AdaptedGroupNorm(AdaptedNorm, nn.GroupNorm):
    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class AdaptedRMSNorm(AdaptedNorm, nn.RMSNorm):
    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def dropped(slot: LoRASlot, x: Tensor, training: bool) -> Tensor:
    return F.dropout(x, slot.spec.dropout, training) if slot.spec.dropout else x


_ADAPTED: dict[type, type[Adapted]] = {
    nn.Linear: AdaptedLinear,
    nn.Conv2d: AdaptedConv2d,
    nn.Embedding: AdaptedEmbedding,
    nn.LayerNorm: AdaptedLayerNorm,
    nn.GroupNorm: AdaptedGroupNorm,
    nn.RMSNorm: AdaptedRMSNorm,
}
_BASE: dict[type, type[nn.Module]] = {adapted: base for base, adapted in _ADAPTED.items()}


def adapted_class(base: type[nn.Module]) -> type[Adapted] | None:
    """The class that adapts modules of exactly type `base`; None if there is none."""
    if base not in _ADAPTED and issubclass(base, nn.Linear):
        # A subclass may compute in any way, so its own forward stays in charge.
        made = type(f"Adapted{base.__name__}", (AdaptedLinearLike, base), {})
        _ADAPTED[base], _BASE[made] = made, base
    return _ADAPTED.get(base)


def base_class(adapted: type) -> type[nn.Module]:
    return _BASE[adapted]


def _blank(base: type[nn.Module]) -> Adapted:
    adapted = adapted_class(base)
    assert adapted is not None
    return adapted.__new__(adapted)


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers of a model by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Adapted)}
