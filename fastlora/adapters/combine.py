"""`combine`: several adapters as a new one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.attaching import attach, check_name
from fastlora.adapters.building import parameter_dtype
from fastlora.adapters.components import (
    Models,
    all_or_none,
    as_one,
    components_of,
    info_of_parts,
    path_in,
)
from fastlora.adapters.control import apply
from fastlora.adapters.inject import remove
from fastlora.adapters.lookup import adapted_layers, arenas, require_known
from fastlora.adapters.selecting import Where, matcher
from fastlora.adapters.slots import LoRASlot, Slot, SpectralSlot
from fastlora.adapters.specs import AdapterError, AdapterInfo, LoRA, fits_float32, is_number

Parts = list[tuple[Any, float]]  # slots of a layer with their weights


# What is made under inference mode has to serve training later.
@torch.inference_mode(False)
@torch.no_grad()
def combine(
    model: Models,
    weights: Mapping[str, float],
    rule: Literal["add", "interpolate"] = "add",
    *,
    where: Mapping[str, Where] | None = None,
    name: str = "combined",
) -> AdapterInfo:
    """Makes the adapter `name` out of those in `weights`, `{"dog": 1.0, "statue": 0.8}`.

    Spectral shifts, under one relu: `W' = U diag(relu(σ + δ)) Vᵀ` with "add" `δ = Σ w_i δ_i`, with
    "interpolate" `δ = Σ w_i δ_i / Σ w_i`, for two `α δ_1 + (1 - α) δ_2`. Norms likewise; an adapter
    without shifts in a layer has δ = 0 there. LoRAs: their factors one after another, `w_i α_i/r_i`
    in U, which is `Σ w_i α_i/r_i U_i D_i` exactly; the rank is the sum of the ranks.

    Style mixing: `where={"style": r"up_blocks\\..*"}` takes the layers that it selects (a regex,
    suffixes or a predicate, as for `inject`) from "style", and from nobody else; adapters that are
    not in `where` have all other layers. The weights that "interpolate" divides by are those of the
    adapters that a layer is taken from. In each of several components alike, paths being those
    within it.

    The new adapter has strength 1 and can be scaled, saved, trained and removed like any other. The
    combined ones stay as they are, switched off (`enable` brings them back); their strengths of
    `set_scale` do not count here, nor does dropout. SVDiff (Han et al. 2023, arXiv 2303.11305):
    sums of δ interfere more than sums of whole weight differences, because all adapters share the
    directions U and V; subjects that were trained apart may bleed into one another.

    Raises AdapterError for unknown names, weights that are not finite or sum to 0 ("interpolate"),
    another rule, a taken name, adapters of both kinds, DoRA (its norm is not a sum) and updates of
    other kinds (loha, full, ...), a layer that cannot take the new one, and a selection in `where`
    without any layer of its adapter. The model is unchanged then.
    """
    if rule not in ("add", "interpolate"):
        raise AdapterError(f"combine: rule: expected 'add' or 'interpolate', got {rule!r}")
    check_weights(weights)
    one = as_one(model, "combine")
    require_known(one, *weights)
    check_name(one, name)
    parts = components_of(model, "combine")
    slots: dict[str, dict[str, Slot]] = {}
    for component, path, layer, names in taken(parts, list(weights), where or {}):
        total = sum(weights[n] for n in names) if rule == "interpolate" else 1.0
        if abs(total) < 1e-12:
            full = path_in(component, path)
            raise AdapterError(f"combine: {full}: the weights of {names} sum to 0; use rule='add'")
        used = [(layer.fastlora[n], weights[n] / total) for n in names if n in layer.fastlora]
        if used:
            slots.setdefault(component, {})[path] = combined(path, layer, used)
    if len({type(slot) for layers in slots.values() for slot in layers.values()}) > 1:
        raise AdapterError("combine: expected adapters of one kind, got LoRA and spectral shifts")

    def add(component: str) -> AdapterInfo:
        part = parts[component]
        froze = any(n in arena.froze for arena in arenas(part) for n in weights)
        return attach(part, slots[component], name, freeze=froze, scale=1.0)

    infos = all_or_none(slots, add, undo=lambda component: remove(parts[component], name))
    apply(one, {}, dict.fromkeys(weights, False))
    return info_of_parts(infos)


def check_weights(weights: Any) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError(f"combine: expected weights by adapter name, got {weights!r}")
    for name, weight in weights.items():
        if not is_number(weight) or not fits_float32(weight):
            raise AdapterError(
                f"combine: weight of {name!r}: expected a finite number, got {weight!r}"
            )


def taken(
    parts: Mapping[str, nn.Module], names: list[str], where: Mapping[str, Where]
) -> list[tuple[str, str, Adapted, list[str]]]:
    """(component, path, layer, the adapters that it is taken from) of all layers that have any of
    `names`."""
    if not isinstance(where, Mapping) or set(where) - set(names):
        raise AdapterError(
            f"combine: where: expected selections for some of {names}, got {where!r}"
        )
    selections = {name: matcher(selection, "combine") for name, selection in where.items()}
    found, used = [], set()
    for component, part in parts.items():
        for path, layer in adapted_layers(part).items():
            if not any(name in layer.fastlora for name in names):
                continue
            own = [n for n, selects in selections.items() if selects(path, layer)]
            used.update(n for n in own if n in layer.fastlora)
            others = [n for n in names if n not in selections]
            found.append((component, path, layer, own or others))
    for name in selections:
        if name not in used:
            raise AdapterError(
                f"combine: where: {where[name]!r} selects no layer that {name!r} adapts"
            )
    return found


def combined(path: str, layer: Any, parts: Parts) -> Slot:
    """One slot for those of a layer."""
    low_rank = all(isinstance(slot, LoRASlot) and not slot.spec.dora for slot, _ in parts)
    if not low_rank and not all(isinstance(slot, SpectralSlot) for slot, _ in parts):
        kinds = {slot.kind for slot, _ in parts}
        raise AdapterError(
            f"combine: {path}: expected spectral shifts or LoRA without DoRA, all of one kind, got "
            f"{' and '.join(sorted(kinds))}"
        )
    weight: Tensor = layer.weight
    dtype = parameter_dtype(path, weight, None)
    if low_rank:
        return concatenated(layer, parts, dtype)
    shifts = [w * slot.shift.to(dtype) for slot, w in parts]  # norms: [1] spreads over [dim]
    largest = max((slot for slot, _ in parts), key=lambda slot: slot.shift.numel())
    return SpectralSlot(largest.spec, functools.reduce(torch.add, shifts))


def concatenated(layer: Any, parts: Parts, dtype: torch.dtype) -> LoRASlot:
    """D and U one after another along the rank, within each group of a convolution."""
    groups = getattr(layer, "groups", 1)
    downs = [s.down.to(dtype).unflatten(0, (groups, -1)) for s, _ in parts]
    ups = [s.up.to(dtype) * (w * s.ratio) for s, w in parts]
    down, up = torch.cat(downs, 1).flatten(0, 1), torch.cat(ups, 1)
    return LoRASlot(LoRA(rank=len(down)), down.contiguous(), up.contiguous())
