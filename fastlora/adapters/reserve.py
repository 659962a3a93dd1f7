"""`reserve`: room in a model's layers for adapters that come and go while all else stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.arena import Arena
from fastlora.adapters.building import parameter_dtype
from fastlora.adapters.components import Models, adaptable, path_in
from fastlora.adapters.lookup import arenas, layers_of
from fastlora.adapters.selecting import Where, select_each
from fastlora.adapters.slots import LoRASlot, shapes_lora
from fastlora.adapters.specs import AdapterError, LoRA
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
from fastlora.adapters.tensors import COMPUTED

Room = tuple[nn.Module, Tensor | None, Tensor | None]  # a layer, its D and U


@dataclass(frozen=True)
class ReserveInfo:
    """What `reserve` holds ready: layers by path (of several models "unet.down..."), ranks in each,
    and the memory of D and U."""

    modules: tuple[str, ...]
    rank: int
    bytes: int


# What is made under inference mode has to serve training later.
@torch.inference_mode(False)
def reserve(
    model: Models,
    rank: int,
    where: Where = None,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> ReserveInfo:
    """Gives the layers that `where` selects (as in `inject`) room for adapters of `rank` together.

    `model`: a module, a dict of them by component, or a pipeline: of that its denoisers and text
    encoders, the components that adapter files are for; give a dict to choose others. `where` looks
    at paths within each component, and those in which it selects nothing are left as they are.

    Each layer gets D `[rank, in]`, U `[out, rank]` and gates `[rank]` of zeros. The LoRAs of the
    layer, those that are there and those that `inject` and `load` bring later, live in them one
    after another, and without gradients the layer computes one low-rank product of them all. So
    nothing is concatenated at a call; a compiled model and a captured CUDA graph follow adapters
    that come, go and change their strengths, without compiling or capturing again; and they compute
    `rank` ranks, whatever is there. Eager calls leave out what follows the last active adapter, and
    call the plain layer where none is active.

    `dtype` of D and U: the layer's by default, float32 is allowed beside 16-bit layers; adapters
    take it on when they enter. Their parameters are then views of the buffers (`up` is strided), so
    that what an optimiser or an average writes is seen. `.clone()` what `state_dict` gives before
    adapters come or go, for others will have the memory; safetensors wants it `.contiguous()`;
    fused optimisers refuse such parameters. With gradients the adapters are computed as without a
    reserve, and so are parameters that somebody has exchanged for others. DoRA and spectral shifts
    stay outside of it, and grouped convolutions have none.

    `freeze` stops gradients of the model's own parameters, as `inject` does, so that bringing the
    first adapter changes nothing that a compiled graph looks at.

    Again with another rank: more or less room, at other addresses; 0 gives the memory back. Raises
    AdapterError, and changes nothing, where `where` selects what cannot have a reserve or the rank
    is less than the adapters of a layer have.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        raise AdapterError(f"reserve: rank: expected an integer >= 0, got {rank!r}")
    parts = adaptable(model, "reserve")
    chosen = select_each(parts, LoRA(max(rank, 1)), where, "reserve")
    # All is checked, and all memory there, before the first component is changed.
    rooms = {c: rooms_of(c, layers, rank, where, dtype) for c, layers in chosen.items()}
    for component in rooms:
        check_mergeable(arenas(parts[component]), {})
    for component, layers in rooms.items():
        install(parts[component], layers, freeze and rank > 0)
    paths = tuple(path_in(c, path) for c, layers in rooms.items() for path in layers)
    buffers = [t for layers in rooms.values() for _, *pair in layers.values() for t in pair]
    return ReserveInfo(paths, rank, sum(t.nbytes for t in buffers if t is not None))


def rooms_of(
    component: str,
    chosen: dict[str, nn.Module],
    rank: int,
    where: Where,
    dtype: torch.dtype | None,
) -> dict[str, Room]:
    """A reserve for each layer that can have one, and for rank 0 for each that has one."""
    grouped = [path for path, module in chosen.items() if getattr(module, "groups", 1) != 1]
    if grouped and where is not None:
        path = path_in(component, grouped[0])
        raise AdapterError(f"reserve: where: {path} is a grouped convolution and has none")
    plain = {path: module for path, module in chosen.items() if path not in grouped}
    if rank == 0:
        reserved = [p for p, m in plain.items() if isinstance(m, Adapted) and m.fastlora.capacity]
        return {path: (plain[path], None, None) for path in reserved}
    for path, module in plain.items():
        check_fits(path_in(component, path), module, rank)
    return {p: (m, *room(path_in(component, p), m, rank, dtype)) for p, m in plain.items()}


def install(model: nn.Module, rooms: dict[str, Room], freeze: bool) -> None:
    """Puts the reserves of a model's layers there, or takes them away."""
    found = arenas(model)
    arena = merge(found) if found else Arena()
    if freeze:
        freeze_base(model)
        arena.reserve_froze = True
    for path, (module, down, up) in rooms.items():
        layer = adapt(module, path, arena)
        layer.fastlora.set_reserve(down, up)
        if not len(layer.fastlora) and down is None:
            restore(layer)
    arena.layout()
    tell_neighbours(model)
    thaw(model, [arena])
    if not layers_of(model):
        forget_walks(model)


def check_fits(path: str, module: nn.Module, rank: int) -> None:
    """Raises AdapterError where the adapters of a layer have more ranks than that."""
    if not isinstance(module, Adapted):
        return
    slots = [s for s in module.fastlora.values() if isinstance(s, LoRASlot) and not s.spec.dora]
    needed = sum(slot.width for slot in slots)
    if needed > rank:
        raise AdapterError(
            f"reserve: rank: {path} has adapters of rank {needed} together, got {rank}"
        )


def room(path: str, module: Any, rank: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Zeros for D and U of a layer."""
    weight: Tensor = module.weight
    if dtype is None and weight.dtype in COMPUTED:
        dtype = weight.dtype
    at = {"dtype": parameter_dtype(path, weight, dtype, "reserve"), "device": weight.device}
    shapes = shapes_lora(module, weight, LoRA(rank))
    return torch.zeros(shapes["down"], **at), torch.zeros(shapes["up"], **at)
