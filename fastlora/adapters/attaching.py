"""Slots go into the layers of a model and out, all or none."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.arena import Arena, Scale, require_finite
from fastlora.adapters.building import needs_factors
from fastlora.adapters.control import adapters
from fastlora.adapters.factor_cache import FactorCache, folder_of
from fastlora.adapters.factorising import HELD, factorise
from fastlora.adapters.folding import (
    check_plain,
    check_strengths,
    differs_per_sample,
    folded_by,
    is_folded,
    refolding,
)
from fastlora.adapters.lookup import (
    arenas,
    known_names,
    layers_of,
    modules_by_path,
)
from fastlora.adapters.slots import (
    Slot,
    Slots,
    SpectralSlot,
    one_strength,
)
from fastlora.adapters.specs import AdapterError, AdapterInfo
from fastlora.adapters.surgery import (
    adapt,
    check_mergeable,
    forget_walks,
    freeze_base,
    merge,
    restore,
    tell_neighbours,
    thaw,
)
from fastlora.adapters.tensors import too_large


def check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(Slots(), name):
        reserved = " (reserved)" if isinstance(name, str) and name and "." not in name else ""
        raise AdapterError(f"adapter name: expected a word without dots, got {name!r}{reserved}")
    if name in known_names(model):
        raise AdapterError(f"adapter name: {name!r} exists already; remove it first")


def attach(
    model: nn.Module,
    slots: dict[str, Slot],
    name: str,
    *,
    freeze: bool = True,
    scale: Scale | None = None,
) -> AdapterInfo:
    """Puts ready slots into the layers at their paths, with a strength (a checked one; None: what
    the name has, or 1); raises AdapterError before the first change or never."""
    modules = modules_by_path(model)
    found = arenas(model)
    new = {} if scale is None else {name: scale}
    check_mergeable(found, new)
    check_strengths(folded_by(found), new)
    if scale is not None:
        require_finite(name, scale, max(abs(slot.ratio) for slot in slots.values()))
    kept = (arena.scales.get(name) for arena in found)
    if any(isinstance(s, Tensor) for s in (scale, *kept)):
        check_per_sample(name, slots)
    for path, slot in slots.items():
        check_room(path, modules[path], slot)
    undecomposed = {
        path: modules[path]
        for path, slot in slots.items()
        if isinstance(slot, SpectralSlot) and needs_factors(modules[path])
    }
    cache = FactorCache(folder_of(True), writes=False)
    tasks = factorise(undecomposed, None, cache, "inject")
    if found and is_folded(model):
        if isinstance(scale, Tensor):
            raise differs_per_sample(name)
        for path in slots:
            check_plain(path, modules[path])
    with refolding(model) if found else nullcontext():
        arena = merge(found) if found else Arena()
        if freeze:
            freeze_base(model)
            arena.froze.add(name)
        for path, slot in slots.items():
            layer = adapt(modules[path], path, arena)
            holder = layer.fastlora
            factors = tasks[path].found if path in tasks else None
            if factors is not None:
                holder.svd_u, holder.svd_s, holder.svd_vh = factors[:3]
                vars(layer).pop(HELD, None)
            holder[name] = slot
            if holder.takes(slot):
                holder.enter(name)
            slot.train(layer.training)
        arena.scales |= new
        arena.layout()
    tell_neighbours(model)
    cache.warn()
    return adapters(model)[name]


def check_per_sample(name: str, slots: Mapping[str, Slot]) -> None:
    """Raises AdapterError for the first slot whose strength cannot differ per sample."""
    for path, slot in slots.items():
        if slot.whole:
            raise AdapterError(one_strength(path, name, slot))


def check_room(path: str, module: nn.Module, slot: Slot, without: str = "") -> None:
    """Raises AdapterError where the layer has a reserve and the slot does not fit into it, for its
    rank or the range of its values; `without` is an adapter that leaves."""
    if isinstance(module, Adapted) and module.fastlora.takes(slot):
        holder = module.fastlora
        room = holder.room(without)
        if slot.width > room:
            raise AdapterError(
                f"{path}: its reserve of rank {holder.capacity} has room for {room} more and the "
                f"adapter has rank {slot.width}; reserve more, or remove an adapter"
            )
        for key in slot.owned:
            largest = too_large(getattr(slot, key), holder.reserved_down.dtype)
            if largest is not None:
                raise AdapterError(
                    f"{path}: {key}: its reserve is {holder.reserved_down.dtype}, which cannot "
                    f"hold {largest:.6g}; reserve with dtype=torch.float32"
                )


def take_out(model: nn.Module, name: str) -> None:
    with refolding(model):
        found = arenas(model)
        for layer in layers_of(model):
            if name in layer.fastlora:
                take_slot(layer, name)
        for arena in found:
            arena.layout()
    tell_neighbours(model)
    thaw(model, found)
    if not layers_of(model):
        forget_walks(model)


def take_slot(layer: Adapted, name: str, keep: bool = False) -> None:
    """Takes an adapter out of one layer, which is the plain one again where nothing else is in it
    unless another is about to come (`keep`). The arena keeps its entries until it is laid out."""
    holder = layer.fastlora
    if name in holder.reserved_rows:
        holder.leave(name)
    del holder[name]
    if not holder.shifted():
        holder.svd_u = holder.svd_s = holder.svd_vh = None
    if not keep and not len(holder) and not holder.capacity:
        restore(layer)
