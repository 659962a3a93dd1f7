"""`W' = W + U diag(g) D`, or its DoRA and spectral forms, in a weight of its own beside W."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapters.dora import row_scale
from fastlora.adapters.slots import LoRASlot
from fastlora.adapters.spectral import changed_weight, operands, shift_of, write_weights
from fastlora.adapters.tensors import same_start


# What is made here under inference mode has to serve training later.
@torch.inference_mode(False)
@torch.no_grad()
def fold_layers(layers: Iterable[Any]) -> None:
    """Writes the folded weights. Spectral shifts of all layers go through one call of
    `ops.spectral_weights`, low-rank parts through one of `ops.fold`."""
    layers = list(layers)
    for layer in layers:
        layer.refresh()
    shifted = shifted_weights(layers)
    terms: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for layer in layers:
        out = buffer(layer)
        weight = layer.limited(shifted.get(layer, layer.weight.detach()))
        slots = layer.low_rank_slots(layer._state.active)
        if any(s.spec.dora for s, _ in slots):
            out.copy_(dora_weight(layer, weight, slots))
        elif slots:
            terms += parts(layer, weight, slots, out)
        elif weight is not out:
            out.copy_(weight)
        layer._state.merged, layer._state.stale = True, False
        layer._state.arena.folded = True
        layer._state.forget()
    if terms:
        ops.fold(*([t[i] for t in terms] for i in range(5)))


def shifted_weights(layers: Iterable[Any]) -> dict[Any, Tensor]:
    """The weights under spectral shifts of the layers that have them: in one call, in the layers'
    buffers."""
    found: dict[Any, Tensor] = {}
    terms: list[tuple[Tensor, ...]] = []
    for layer in layers:
        shift = shift_of(layer, layer._state.active)
        if shift is None:
            continue
        weight = layer.weight
        if layer.is_norm() or not weight.is_contiguous() or not same_start(weight, layer.matrix()):
            found[layer] = changed_weight(layer, shift)
            continue
        matrix, *factors = operands(layer, shift)
        found[layer] = buffer(layer)
        terms.append((matrix.detach(), *factors, found[layer].view(matrix.shape)))
    write_weights(terms)
    return found


def buffer(layer: Any) -> Tensor:
    """The layer's folded weight, at the same address as long as it fits."""
    weight, old = layer.weight, layer.fastlora.folded_weight
    fits = old is not None and old.is_contiguous() and old.shape == weight.shape
    if old is None or not fits or old.dtype != weight.dtype or old.device != weight.device:
        old = torch.empty_like(weight, memory_format=torch.contiguous_format)
        layer.fastlora.folded_weight = old
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
