"""The weight under spectral shifts: when it is made, how long it is kept, when it is made again."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora import ops
from fastlora.adapters.slots import SpectralSlot
from fastlora.adapters.specs import AdapterError
from fastlora.adapters.state import in_graph, interposed
from fastlora.adapters.tensors import full_precision, memory
from fastlora.ops._spectral import shift_gradients
from fastlora.ops.spectral_linear import activations_are_cheaper

Maker = Callable[[], Tensor]


class Shift(NamedTuple):
    """`σ + strength · value`; for a norm `w + value`."""

    value: Tensor
    strength: Tensor  # []


def shift_of(layer: Any, active: Iterable[tuple[str, Any]]) -> Shift | None:
    """The active shifts of a layer as one: several add up under one relu. None without any."""
    slots = [(name, s) for name, s in active if isinstance(s, SpectralSlot)]
    if not slots:
        return None
    gates: list[Tensor] = [layer.gate(name) for name, _ in slots]
    if any(g.dim() == 2 for g in gates):
        raise AdapterError(
            f"{layer._state.path}: a spectral shift changes the weight itself, so its strength "
            "cannot differ per sample; use a number for its scale"
        )
    strength = gates[0].reshape(())
    if len(slots) == 1 and not layer.is_norm():
        return Shift(slots[0][1].shift, strength)
    with full_precision(layer.weight.device):
        products = [g * s.shift for g, (_, s) in zip(gates, slots, strict=True)]
        return Shift(functools.reduce(torch.add, products), torch.ones_like(strength))


def operands(layer: Any, shift: Shift) -> tuple[Tensor, ...]:
    """The arguments of `ops.spectral_weight`."""
    factors = layer.fastlora
    return layer.matrix(), factors.svd_u, factors.svd_s, factors.svd_vh, *shift


def changed_weight(layer: Any, shift: Shift) -> Tensor:
    """W', made now."""
    with full_precision(layer.weight.device):
        if layer.is_norm():
            return (layer.weight + shift.value).to(layer.weight.dtype)
        return layer.from_matrix(ops.spectral_weight(*operands(layer, shift)))


def in_activations(layer: Any, x: Tensor) -> bool:
    """Whether a linear layer is computed by `spectral_linear` for this input: where W' would be
    made for this call alone and that takes more multiplications."""
    backward, state = torch.is_grad_enabled(), layer._state
    if x.shape[-1:] != layer.weight.shape[1:]:
        return False
    if not in_graph():
        if interposed():
            return False
        if state.arena.materialize == "step":
            return False
        if not backward and (state.arena.steady[False] or layer.weight.device.type == "cpu"):
            return False  # it is kept
    out, features = layer.weight.shape
    tokens, rank = x.numel() // max(features, 1), layer.fastlora.svd_s.shape[0]
    return activations_are_cheaper(tokens, features, out, rank, backward=backward)


@contextmanager
def weight_under(layer: Any, shift: Shift) -> Iterator[Tensor]:
    """W' for the layer's forward pass, which is to run inside.

    Without gradients it may be one that is kept: for an optimiser's step (`materialize`), in a
    `steady` block, on the CPU while nothing changes. With gradients autograd keeps a note of how it
    was made instead of itself, and it is made again in the backward pass.
    """
    arena = layer._state.arena
    eager, grad = not in_graph() and not interposed(), torch.is_grad_enabled()
    make = functools.partial(changed_weight, layer, shift)
    if eager and arena.materialize == "step" and not arena.learned and not layer.is_norm():
        yield step_weight(layer, shift)
    elif not grad:
        if eager and arena.steady[False]:
            yield layer.kept("spectral", make, arena.stamp(layer.weight.device))
        else:
            yield layer.cached("spectral", list(shift), make)
    elif layer.is_norm() or interposed():
        yield make()
    else:
        cast = autocast_dtype(layer)
        weight = make() if cast is None else make().to(cast)
        with made_again(weight, layer, shift):
            yield weight


# --- made again in the backward pass --------------------------------------------------------------


class Again(NamedTuple):
    """In place of a tensor that autograd would save: how to make it."""

    make: Maker
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def made_again(weight: Tensor, layer: Any, shift: Shift) -> Iterator[None]:
    """Within it autograd saves no view of `weight`, W', but what it takes to make it again."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009 (not in its type stub)
    if not autograd._saved_tensors_hooks_is_enabled():
        yield
        return
    outer = autograd._top_saved_tensors_default_hooks(False)  # checkpointing's, perhaps
    start, dtype = weight.untyped_storage().data_ptr(), weight.dtype
    shift = Shift(*(t.detach() for t in shift))
    sources = [layer.weight.detach(), *shift]
    versions = [t._version for t in sources]

    @torch.no_grad()
    def make() -> Tensor:
        for source, version in zip(sources, versions, strict=True):
            require_same(source, version)
        return changed_weight(layer, shift).to(dtype)

    def pack(saved: Tensor) -> Any:
        if saved.numel() and saved.untyped_storage().data_ptr() == start:
            return Again(make, saved.size(), saved.stride(), int(saved.storage_offset()))
        # Torch compares no versions where there are hooks.
        return outer[0](saved) if outer else (saved, saved._version)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Again):
            return packed.make().as_strided(packed.size, packed.stride, packed.offset)
        if outer:
            return outer[1](packed)
        require_same(*packed)
        return packed[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def require_same(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {tensor.dtype} {list(tensor.shape)} is at version {tensor._version}; "
            f"expected version {version} instead"
        )


def autocast_dtype(layer: Any) -> torch.dtype | None:
    """What autocast will compute with, which would be a copy of W' that autograd keeps."""
    device, weight, active = layer.weight.device.type, layer.weight, layer._state.active
    products = isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
    if not products or weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    if any(getattr(slot.spec, "dora", False) for _, slot in active):
        return None  # its norms are those of W' in full
    return torch.get_autocast_dtype(device)


# --- made once a step -----------------------------------------------------------------------------


def step_weight(layer: Any, shift: Shift) -> Tensor:
    """W' of the layer as of the latest shifts; those of all layers are made together."""
    state, found = layer._state, layer._state.step
    if found is None or found[0] != sources_of(layer):
        make_step(state.arena)
        found = state.step
    weight: Tensor = found[1]
    if torch.is_grad_enabled():
        weight = _Kept.apply(weight, *operands(layer, shift))  # type: ignore[assignment]
    return layer.from_matrix(weight)


def sources_of(layer: Any) -> tuple[Any, ...]:
    """Where all that makes W' is, and the versions of it."""
    state, weight = layer._state, layer.weight
    shifts = [s.shift for _, s in state.active if isinstance(s, SpectralSlot)]
    used = (weight, layer.fastlora.svd_u, *shifts)
    return weight.dtype, state.arena.stamp(weight.device), *map(memory, used)


# What is made here under inference mode has to serve training later.
@torch.inference_mode(False)
@torch.no_grad()
def make_step(arena: Any) -> None:
    """Writes W' of all layers whose shifts have changed, in one call."""
    terms: list[tuple[Tensor, ...]] = []
    for layer in arena.layers():
        layer.refresh()
        state = layer._state
        if layer.is_norm() or state.merged:
            continue
        shift = shift_of(layer, state.active)
        sources = None if shift is None else sources_of(layer)
        if shift is None or (state.step is not None and state.step[0] == sources):
            continue
        layer_operands = operands(layer, shift)
        matrix, out = layer_operands[0], None if state.step is None else state.step[1]
        like = (matrix.shape, matrix.dtype, matrix.device)
        if out is None or (out.shape, out.dtype, out.device) != like:
            out = torch.empty_like(matrix, memory_format=torch.contiguous_format)
        state.step = sources, out
        terms.append((*layer_operands, out))
    write_weights(terms)


def write_weights(terms: list[tuple[Tensor, ...]]) -> None:
    """`ops.spectral_weights` of layers that are tuples of its arguments."""
    if terms:
        with full_precision(terms[0][0].device):
            ops.spectral_weights(*([t[i] for t in terms] for i in range(7)))


class _Kept(torch.autograd.Function):
    """`ops.spectral_weight` where W' is there already."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, kept: Tensor, weight: Tensor, *factors: Tensor
    ) -> Tensor:
        *constant, strength = factors
        ctx.save_for_backward(*constant, strength.clone())
        return kept.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        u, s, vh, shift, strength = ctx.saved_tensors
        d_shift = None
        if ctx.needs_input_grad[5]:
            (dots,) = ops.spectral_dots([grad], [u], [vh])
            d_shift, _ = shift_gradients(dots, s, shift, strength)
        d_weight = grad if ctx.needs_input_grad[1] else None
        return None, d_weight, None, None, None, d_shift, None
