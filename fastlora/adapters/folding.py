"""`fold` writes the adapters into weights of their own; the pristine ones stay where they are."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastlora import ops
from fastlora.adapters.dora import row_scale
from fastlora.adapters.layers import (
    Adapted,
    AdaptedConv2d,
    AdaptedEmbedding,
    AdaptedLinearLike,
    adapted_layers,
)
from fastlora.adapters.slots import LoRASlot
from fastlora.adapters.specs import AdapterError


def fold(model: nn.Module, permanent: bool = False) -> None:
    """`W' = W + U diag(g) D` (or its spectral form) for every adapted layer, in one grouped operator.

    The folded weights are buffers beside the pristine ones (one more copy of the adapted weights in
    memory), which `.weight` and `state_dict()` go on showing; `unfold` is therefore exact. Changing
    a scale of a folded model folds it again into the same buffers. `permanent=True` writes into
    `.weight` instead and removes the adapters.

    Raises AdapterError where a strength differs per sample or a layer has no plain weight.
    """
    layers = adapted_layers(model)
    if not layers:
        raise AdapterError("fold: the model has no adapters")
    check_foldable(layers)
    fold_layers(layers.values())
    if permanent:
        from fastlora.adapters.control import known_names
        from fastlora.adapters.inject import remove

        with torch.no_grad():
            for layer in layers.values():
                layer.weight.copy_(layer.fastlora.folded_weight)
        unfold(model)
        for name in known_names(model):
            remove(model, name)


def unfold(model: nn.Module) -> None:
    """Back to pristine weights plus adapters. The buffers stay for the next fold."""
    for layer in adapted_layers(model).values():
        layer._state.merged = False
        layer._state.forget()


def is_folded(model: nn.Module) -> bool:
    return any(layer._state.merged for layer in adapted_layers(model).values())


@contextmanager
def refolding(model: nn.Module) -> Iterator[None]:
    """Changes inside show up in a folded model's weights: it is folded again at the end."""
    if not is_folded(model):
        yield
        return
    yield
    layers = adapted_layers(model)
    try:
        check_foldable(layers)
    except AdapterError:
        unfold(model)
        raise
    fold_layers(layers.values())


def check_foldable(layers: dict[str, Adapted]) -> None:
    for path, layer in layers.items():
        if isinstance(layer, AdaptedLinearLike):
            raise AdapterError(
                f"fold: {path}: a {type(layer).__mro__[2].__name__} computes with its weight in a way "
                "of its own; only plain Linear, Conv2d, Embedding and norms can be folded"
            )
        if layer._state.arena.batch is not None:
            raise AdapterError(
                "fold: a strength that differs per sample has no single weight; set a number first"
            )


@torch.no_grad()
def fold_layers(layers: Iterable[Adapted]) -> None:
    """Writes the folded weights. Low-rank parts of all layers go through one call of `ops.fold`."""
    terms: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for layer in layers:
        layer.refresh()
        holder = layer.fastlora
        if holder.folded_weight is None:
            holder.folded_weight = torch.empty_like(layer.weight)
        out = holder.folded_weight
        active = layer._state.active
        weight = layer.spectral(active) if holder.svd_s is not None or layer.is_norm() else None
        weight = layer.weight.detach() if weight is None else weight
        slots = [(s, layer.gate(n)) for n, s in active if isinstance(s, LoRASlot)]
        if any(s.spec.dora for s, _ in slots):
            out.copy_(dora_weight(layer, weight, slots))
        elif not slots:
            out.copy_(weight)
        else:
            terms += parts(layer, weight, slots, out)
        layer._state.merged = True
        layer._state.forget()
    if terms:
        ops.fold(*([t[i] for t in terms] for i in range(5)))


def parts(
    layer: Adapted, weight: Tensor, slots: list[tuple[LoRASlot, Tensor]], out: Tensor
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """(W, D, U, g, W') as matrices, one for each group of a convolution."""
    downs, ups = [s.down.detach() for s, _ in slots], [s.up.detach() for s, _ in slots]
    if isinstance(layer, AdaptedEmbedding):  # rows are the vocabulary: Wᵀ is what adapts
        downs, ups = [u.t() for u in ups], [d.t() for d in downs]
    groups = layer.groups if isinstance(layer, AdaptedConv2d) else 1
    matrices = (weight.flatten(1), out.view(out.shape[0], -1))
    split = [[t.flatten(1).chunk(groups) for t in factors] for factors in (downs, ups)]
    gates = [g.chunk(groups) for _, g in slots]
    terms = []
    for i, (w, o) in enumerate(zip(*(m.chunk(groups) for m in matrices), strict=True)):
        down, up = ([t[i] for t in factors] for factors in split)
        gate = [g[i] for g in gates]
        terms.append((w, joined(down, 0), joined(up, 1), joined(gate, 0), o))
    return terms


def joined(tensors: list[Tensor], dim: int) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    wide = max((t.dtype for t in tensors), key=lambda d: d.itemsize)
    return torch.cat([t.to(wide) for t in tensors], dim)


def dora_weight(layer: Adapted, weight: Tensor, slots: list[tuple[LoRASlot, Tensor]]) -> Tensor:
    """`W' = W + Σ (ρ (W + U g D) - W)` with DoRA's row scales ρ (ρ = 1 for plain LoRA), rounded once."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    transposed = isinstance(layer, AdaptedEmbedding)
    base = weight.to(wide)
    result = base.clone()
    for slot, gate in slots:
        adapted = torch.empty_like(base)
        terms = parts(layer, base, [(slot, gate)], adapted)
        ops.fold(*([t[i] if i in (0, 3, 4) else t[i].to(wide) for t in terms] for i in range(5)))
        if slot.spec.dora:
            rho = row_scale(layer, weight.t() if transposed else weight, slot, gate)
            adapted *= rho if transposed else rho.view(-1, *[1] * (weight.dim() - 1))
        result += adapted - base
    return result.to(weight.dtype)
