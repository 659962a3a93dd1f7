"""The weight under spectral shifts, and that of all layers made once a step."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora import ops
from fastlora.adapters.deltas import DeltaSlot
from fastlora.adapters.slots import SpectralSlot
from fastlora.adapters.state import in_graph, interposed
from fastlora.adapters.tensors import full_precision, memory
from fastlora.ops._spectral import shift_gradients
from fastlora.ops.spectral_linear import activations_are_cheaper
from fastlora.ops.spectral_weight import dots_of


class Shift(NamedTuple):
    """`σ + strength · value`; for a norm `w + value`."""

    value: Tensor
    strength: Tensor  # []


def shift_of(layer: Any, active: Iterable[tuple[str, Any]]) -> Shift | None:
    """The active shifts of a layer as one: several add up under one relu. None without any.
    Raises AdapterError for a strength per sample."""
    slots = [(name, s) for name, s in active if isinstance(s, SpectralSlot)]
    if not slots:
        return None
    strengths: list[Tensor] = [layer.strength(name) for name, _ in slots]
    if len(slots) == 1 and not layer.is_norm():
        return Shift(slots[0][1].shift, strengths[0])
    with full_precision(layer.weight.device):
        products = [g * s.shift for g, (_, s) in zip(strengths, slots, strict=True)]
        return Shift(functools.reduce(torch.add, products), torch.ones_like(strengths[0]))


def operands(layer: Any, shift: Shift) -> tuple[Tensor, ...]:
    """The arguments of `ops.spectral_weight`."""
    factors = layer.fastlora
    return layer.matrix(), factors.svd_u, factors.svd_s, factors.svd_vh, *shift


def shifted_weight(layer: Any, shift: Shift, dtype: torch.dtype | None = None) -> Tensor:
    """W', made now, in the weight's dtype or a wider one."""
    dtype = dtype or layer.weight.dtype
    with full_precision(layer.weight.device):
        if layer.is_norm():
            return (layer.weight + shift.value).to(dtype)
        arguments: Any = operands(layer, shift)
        if dtype != layer.weight.dtype:  # 16 bits: the strength is float32
            arguments = [argument.to(dtype) for argument in arguments]
        return layer.from_matrix(ops.spectral_weight(*arguments))


def in_activations(layer: Any, x: Tensor) -> bool:
    """Whether a linear layer is computed by `spectral_linear` for this input: where W' would be
    made for this call alone and that takes more multiplications."""
    backward, state = torch.is_grad_enabled(), layer._state
    out, features = layer.upright(layer.weight).shape
    if x.shape[-1] != features:
        return False
    if not in_graph():
        if interposed():
            return False
        if state.arena.materialize == "step":
            return False
        if not backward and (state.arena.steady[False] or layer.weight.device.type == "cpu"):
            return False  # it is kept
    tokens, rank = x.numel() // max(features, 1), layer.fastlora.svd_s.shape[0]
    return activations_are_cheaper(tokens, features, out, rank, backward=backward)


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
        if any(isinstance(slot, DeltaSlot) for _, slot in state.active):
            continue  # its weight has more in it
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
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        u, s, vh, shift, strength = ctx.saved_tensors
        d_shift = None
        if ctx.needs_input_grad[5]:
            d_shift, _ = shift_gradients(dots_of(grad, u, vh), s, shift, strength)
        d_weight = grad if ctx.needs_input_grad[1] else None
        return None, d_weight, None, None, None, d_shift, None
