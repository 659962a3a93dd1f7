"""`reserve`: room in a model's layers for adapters that come and go while all else stays."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.arena import Arena
from fastlora.adapters.inject import Where, parameter_dtype, select
from fastlora.adapters.lookup import arenas, layers_of, unwrapped
from fastlora.adapters.slots import LoRASlot, shapes_lora
from fastlora.adapters.specs import AdapterError, LoRA
from fastlora.adapters.surgery import (
    adapt,
    check_mergeable,
    forget_walks,
    freeze_base,
    merge,
    restore,
    set_fused_encoders,
    thaw,
)
from fastlora.adapters.tensors import COMPUTED


@dataclass(frozen=True)
class ReserveInfo:
    """What `reserve` holds ready: layers by path, ranks in each, and the memory of D and U."""

    modules: tuple[str, ...]
    rank: int
    bytes: int


# What is made under inference mode has to serve training later.
@torch.inference_mode(False)
def reserve(
    model: nn.Module,
    rank: int,
    where: Where = None,
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> ReserveInfo:
    """Gives the layers that `where` selects (as in `inject`) room for adapters of `rank` together.

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
    model = unwrapped(model)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        raise AdapterError(f"reserve: rank: expected an integer >= 0, got {rank!r}")
    chosen = select(model, LoRA(max(rank, 1)), where, "reserve")
    grouped = [p for p, m in chosen.items() if getattr(m, "groups", 1) != 1]
    if grouped and where is not None:
        raise AdapterError(f"reserve: where: {grouped[0]} is a grouped convolution and has none")
    chosen = {path: m for path, m in chosen.items() if path not in grouped}
    for path, module in chosen.items():
        check_fits(path, module, rank)
    if rank == 0:
        chosen = {p: m for p, m in chosen.items() if isinstance(m, Adapted) and m.fastlora.capacity}
    buffers = {path: room(path, module, rank, dtype) for path, module in chosen.items()}
    found = arenas(model)
    check_mergeable(found, {})
    arena = merge(found) if found else Arena()
    if freeze and rank:
        freeze_base(model)
        arena.reserve_froze = True
    for path, module in chosen.items():
        layer = adapt(module, path, arena)
        layer.fastlora.set_reserve(*buffers[path])
        if not len(layer.fastlora) and rank == 0:
            restore(layer)
    arena.layout()
    set_fused_encoders(model)
    thaw(model, [arena])
    if not layers_of(model):
        forget_walks(model)
    size = sum(t.numel() * t.element_size() for pair in buffers.values() for t in pair if rank)
    return ReserveInfo(tuple(chosen), rank, size)


def check_fits(path: str, module: nn.Module, rank: int) -> None:
    """Raises AdapterError where the adapters of a layer have more ranks than that."""
    if not isinstance(module, Adapted) or rank == 0:
        return
    slots = [s for s in module.fastlora.values() if isinstance(s, LoRASlot) and not s.spec.dora]
    needed = sum(slot.width for slot in slots)
    if needed > rank:
        raise AdapterError(
            f"reserve: rank: {path} has adapters of rank {needed} together, got {rank}"
        )


def room(path: str, module: Any, rank: int, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Zeros for D and U of a layer; (None, None) for no rank."""
    if rank == 0:
        return None, None
    weight: Tensor = module.weight
    if dtype is None and weight.dtype in COMPUTED:
        dtype = weight.dtype
    at = {"dtype": parameter_dtype(path, weight, dtype, "reserve"), "device": weight.device}
    shapes = shapes_lora(module, weight, LoRA(rank))
    return torch.zeros(shapes["down"], **at), torch.zeros(shapes["up"], **at)
