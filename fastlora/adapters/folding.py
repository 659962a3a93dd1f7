"""`fold` writes the adapters into weights of their own; the pristine ones stay where they are."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastlora import ops
from fastlora.adapters.adapted import (
    Adapted,
    adapted_class,
    adapted_layers,
    base_class,
    layers_of,
    unwrapped,
)
from fastlora.adapters.arena import Arena, Scale
from fastlora.adapters.dora import row_scale
from fastlora.adapters.layers import AdaptedConv2d, AdaptedEmbedding, AdaptedLinearLike
from fastlora.adapters.slots import LoRASlot
from fastlora.adapters.specs import AdapterError


def fold(model: nn.Module, permanent: bool = False) -> None:
    """`W' = W + U diag(g) D` (or its spectral form) for every adapted layer, in one grouped call.

    The folded weights are buffers beside the pristine ones (one more copy of the adapted weights in
    memory), which `.weight` and `state_dict()` go on showing; `unfold` is therefore exact. Changing
    a scale of a folded model folds it again into the same buffers, and so does `load_state_dict`;
    after other changes of parameters (training) fold again. `permanent=True` writes into `.weight`
    instead and removes the adapters.

    Raises AdapterError where a strength differs per sample, a layer has no plain weight, or
    (permanent) a weight is shared with another layer. The model is unchanged then.
    """
    layers = adapted_layers(model)
    if not layers:
        raise AdapterError("fold: the model has no adapters")
    for path, layer in layers.items():
        check_plain(path, layer)
    check_strengths(layers.values())
    if permanent:
        check_unshared(model, layers)
    fold_layers(layers.values())
    if permanent:
        from fastlora.adapters.control import known_names
        from fastlora.adapters.inject import remove

        with torch.no_grad():
            for layer in layers.values():
                layer.weight.copy_(layer.folded())
        unfold(model)
        for name in known_names(model):
            remove(model, name)


def unfold(model: nn.Module) -> None:
    """Back to pristine weights plus adapters. The buffers stay for the next fold."""
    for layer in layers_of(model):
        layer._state.merged = layer._state.stale = False
        layer._state.forget()


def is_folded(model: nn.Module) -> bool:
    return any(layer._state.merged for layer in layers_of(model))


def folded_by(arenas: Iterable[Arena]) -> list[Adapted]:
    """The folded layers that take their gates from these arenas."""
    return [layer for arena in arenas for layer in arena.layers() if layer._state.merged]


@contextmanager
def refolding(model: nn.Module) -> Iterator[None]:
    """Adapters that come or go inside show up in folded weights, which are folded again after."""
    folded = is_folded(model)
    yield
    layers = layers_of(model)
    arenas = {id(m._state.arena): m._state.arena for m in layers}
    again = {id(m): m for m in (*folded_by(arenas.values()), *(layers if folded else ()))}
    fold_layers(again.values())


def check_plain(path: str, layer: nn.Module) -> None:
    """Raises AdapterError for a layer, adapted or about to be, that has no plain weight."""
    kind = type(layer) if isinstance(layer, Adapted) else adapted_class(type(layer))
    assert kind is not None
    if issubclass(kind, AdaptedLinearLike) or layer._parameters.get("weight") is None:
        raise AdapterError(
            f"fold: {path}: a {base_class(kind).__name__} computes with its weight in a way of its "
            "own; only plain Linear, Conv2d, Embedding and norms can be folded"
        )


def check_strengths(
    layers: Iterable[Adapted],
    scales: Mapping[str, Scale] | None = None,
    enabled: Mapping[str, bool] | None = None,
) -> None:
    """Raises AdapterError where a strength would differ per sample after such a change."""
    for layer in layers:
        arena = layer._state.arena
        new, on = {**arena.scales, **(scales or {})}, {**arena.enabled, **(enabled or {})}
        rows = [n for n in layer.fastlora if on[n] and isinstance(new[n], Tensor)]
        if rows:
            raise AdapterError(
                f"fold: the strength of {rows[0]!r} differs per sample, which no single weight can "
                "follow; unfold the model, or set a number"
            )


def check_unshared(model: nn.Module, layers: Mapping[str, Adapted]) -> None:
    owners: dict[int, list[str]] = {}
    for path, module in unwrapped(model).named_modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    for path, layer in layers.items():
        same = owners[id(layer.weight)]
        if len(same) > 1:
            raise AdapterError(
                f"fold: {path}: {' and '.join(same)} are one parameter; folding for good would "
                "change both. Give the layer a weight of its own first"
            )


# What is made here under inference mode has to serve training later.
@torch.inference_mode(False)
@torch.no_grad()
def fold_layers(layers: Iterable[Adapted]) -> None:
    """Writes the folded weights. Low-rank parts of all layers go through one call of `ops.fold`."""
    terms: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for layer in layers:
        layer.refresh()
        out = buffer(layer)
        active = layer._state.active
        weight = layer.spectral(active)
        weight = limited(layer, layer.weight.detach() if weight is None else weight)
        slots = layer.low_rank_slots(active)
        if any(s.spec.dora for s, _ in slots):
            out.copy_(dora_weight(layer, weight, slots))
        elif not slots:
            out.copy_(weight)
        else:
            terms += parts(layer, weight, slots, out)
        layer._state.merged, layer._state.stale = True, False
        layer._state.forget()
    if terms:
        ops.fold(*([t[i] for t in terms] for i in range(5)))


def buffer(layer: Adapted) -> Tensor:
    """The layer's folded weight, at the same address as long as it fits."""
    weight, old = layer.weight, layer.fastlora.folded_weight
    fits = old is not None and old.is_contiguous() and old.shape == weight.shape
    if old is None or not fits or old.dtype != weight.dtype or old.device != weight.device:
        old = torch.empty_like(weight, memory_format=torch.contiguous_format)
        layer.fastlora.folded_weight = old
    return old


def limited(layer: Adapted, weight: Tensor) -> Tensor:
    """An embedding's weight with the rows that a look-up would shorten to max_norm."""
    if not isinstance(layer, AdaptedEmbedding) or layer.max_norm is None:
        return weight
    rows = torch.arange(len(weight), device=weight.device)
    return torch.embedding_renorm_(weight.clone(), rows, layer.max_norm, layer.norm_type)


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
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return torch.cat([t.to(dtype) for t in tensors], dim)


def dora_weight(layer: Adapted, weight: Tensor, slots: list[tuple[LoRASlot, Tensor]]) -> Tensor:
    """`W' = W + Σ (ρ (W + U g D) - W)` with DoRA's row scales ρ (1 for LoRA), rounded once."""
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
