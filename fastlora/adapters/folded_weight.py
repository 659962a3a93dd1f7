"""`W' = W + U diag(g) D`, or its other forms, in a weight of its own beside W."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapters.changed_weight import changed_weight, recipe_of
from fastlora.adapters.deltas import updated_bias, updates_of
from fastlora.adapters.dora import row_scale
from fastlora.adapters.slots import LoRASlot
from fastlora.adapters.spectral import operands, write_weights
from fastlora.adapters.tensors import same_start


# What is made here under inference mode has to serve training later.
@torch.inference_mode(False)
@torch.no_grad()
def fold_layers(layers: Iterable[Any]) -> None:
    """Writes the folded weights and biases. Spectral shifts of all layers go through one call of
    `ops.spectral_weights`, low-rank parts through one of `ops.fold`."""
    layers = list(layers)
    for layer in layers:
        layer.refresh()
    changed = changed_weights(layers)
    terms: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for layer in layers:
        out = buffer(layer, "folded_weight", layer.weight)
        weight = layer.limited(changed.get(layer, layer.weight.detach()))
        slots = layer.low_rank_slots(layer._state.active)
        if any(s.spec.dora for s, _ in slots):
            out.copy_(dora_weight(layer, weight, slots))
        elif slots:
            terms += parts(layer, weight, slots, out)
        elif weight is not out:
            out.copy_(weight)
        fold_bias(layer)
        layer._state.merged, layer._state.stale = True, False
        layer._state.arena.folded = True
        layer._state.forget()
    if terms:
        ops.fold(*([t[i] for t in terms] for i in range(5)))


def changed_weights(layers: Iterable[Any]) -> dict[Any, Tensor]:
    """The weights of the layers that adapters change before low-rank parts, in the layers' buffers;
    those under nothing but spectral shifts in one call."""
    found: dict[Any, Tensor] = {}
    terms: list[tuple[Tensor, ...]] = []
    for layer in layers:
        recipe = recipe_of(layer, layer._state.active)
        if recipe is None or (recipe.shift is None and not recipe.weight_updates):
            continue
        weight, matrix = layer.weight, layer.matrix()
        out = found[layer] = buffer(layer, "folded_weight", weight)
        plain = matrix.is_contiguous() and same_start(weight, matrix)
        if recipe.shift is None or recipe.weight_updates or layer.is_norm() or not plain:
            out.copy_(changed_weight(layer, recipe))
            continue
        matrix, *factors = operands(layer, recipe.shift)
        terms.append((matrix.detach(), *factors, out.view(matrix.shape)))
    write_weights(terms)
    return found


def fold_bias(layer: Any) -> None:
    """Writes b' where the layer has slots that change it. Also where they are off: a graph may read
    it there when they are on again."""
    slots = [(n, s) for n, s in layer.fastlora.items() if "bias" in s.owned]
    bias = updated_bias(layer.bias_or_none(), layer.weight.dtype, updates_of(layer, slots))
    if not slots:
        layer.fastlora.folded_bias = None
    else:
        buffer(layer, "folded_bias", bias).copy_(bias)


def buffer(layer: Any, name: str, like: Tensor) -> Tensor:
    """The layer's folded weight or bias, at the same address as long as it fits."""
    old = getattr(layer.fastlora, name)
    fits = old is not None and old.is_contiguous() and old.shape == like.shape
    if old is None or not fits or old.dtype != like.dtype or old.device != like.device:
        old = torch.empty_like(like, memory_format=torch.contiguous_format)
        setattr(layer.fastlora, name, old)
    return old


def parts(
    layer: Any, weight: Tensor, slots: list[tuple[LoRASlot, Tensor]], out: Tensor
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """(W, D, U, g, W') as matrices, one for each group of a convolution."""
    downs, ups = [s.down.detach() for s, _ in slots], [s.up.detach() for s, _ in slots]
    if layer.transposed:
        downs, ups = [u.t() for u in ups], [d.t() for d in downs]
    groups = getattr(layer, "groups", 1)
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
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return torch.cat([t.to(dtype) for t in tensors], dim)


def dora_weight(layer: Any, weight: Tensor, slots: list[tuple[LoRASlot, Tensor]]) -> Tensor:
    """`W' = W + Σ (ρ (W + U g D) - W)` with DoRA's row scales ρ (1 for LoRA), rounded once."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    transposed = layer.transposed
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
