"""Slots with given values, after checks that they fit the layer: what loading a file builds."""

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted, adapted_class
from fastlora.adapters.base_hash import base_hash, same_base
from fastlora.adapters.building import dtypes_beside, parameter_dtype, shift_count
from fastlora.adapters.deltas import Delta, DeltaSlot, mapped, tensors_of
from fastlora.adapters.factorising import full_rank
from fastlora.adapters.selecting import NORMS, unsuitable
from fastlora.adapters.slots import LoRASlot, Slot, SpectralSlot, shapes_lora
from fastlora.adapters.specs import AdapterError, LoRA, Spectral, fits_float32
from fastlora.adapters.tensors import too_large
from fastlora.formats.changes import Change, Dense, LowRank, Shift
from fastlora.formats.files import FormatError

ANY_LORA, DORA = LoRA(), LoRA(dora=True)


def slot_from(layer: nn.Module, change: Change, any_base: bool = False) -> Slot:
    """The slot that computes a Change in the layer at its best: a LoRASlot where its ΔW is a
    low-rank part (with `mid` the product of mid and down), a SpectralSlot for shifts, else a
    DeltaSlot.

    The parameters keep the Change's dtype where the layer can use it (`fitting_dtype`), and share
    its memory then, unless it is one of several modules that have parts of the same tensors. Shifts
    of another base are refused unless `any_base`. Raises AdapterError (expected, got, without the
    layer's path, which the caller knows) where the Change does not fit the layer, or the layer is
    none that can be adapted; FormatError for tensors that are not floating.
    """
    require_floating(tensors_of(change))
    part = change.weight
    if isinstance(part, Shift):
        spec = Spectral(part.norms)  # type: ignore[arg-type]  # which is checked
        return spectral_slot(layer, spec, part.tensors(), part.base_hash, any_base)
    if change.rows is not None:
        change = own_rows(layer, change)
    if isinstance(change.weight, LowRank):
        dora = change.magnitude is not None
        refuse_unsuitable(layer, DORA if dora and is_lora(layer, change) else ANY_LORA)
        if is_lora(layer, change):
            return lora_slot(layer, change, change.weight)
    return delta_slot(layer, change)


def lora_slot(layer: nn.Module, change: Change, part: LowRank) -> LoRASlot:
    """The LoRASlot of a low-rank Change. Raises AdapterError where it does not fit the layer."""
    weight: Any = layer.weight
    if part.mid is not None:
        require_update(change, shape_of(layer))
    part = oriented(layer, part.without_mid())
    if isinstance(layer, nn.Conv2d) and part.rank % layer.groups:
        raise AdapterError(f"rank {part.rank} is not divisible by {layer.groups} groups")
    dora = change.magnitude is not None
    spec = lora_of(part.rank, part.alpha, part.rank_stabilized, part.dropout, dora)
    tensors = {"down": part.down, "up": part.up}
    if change.magnitude is not None:
        tensors["magnitude"] = change.magnitude
    shapes, at = shapes_lora(layer, weight, spec), {}
    for key, tensor in tensors.items():
        require_range(key, tensor, fitting_dtype(weight, tensor.dtype))
        at[key] = reshaped(placed(weight, tensor), shapes[key])
        require_shape(key, at[key], shapes[key])
    return LoRASlot(spec, at["down"], at["up"], at.get("magnitude"))


@lru_cache(typed=True)
def lora_of(*settings: Any) -> LoRA:
    """`LoRA(*settings)`, whose checks take longer than all else about a layer."""
    return LoRA(*settings)


def spectral_slot(
    layer: nn.Module,
    spec: Spectral,
    tensors: Mapping[str, Tensor],
    known: Any,
    any_base: bool = False,
) -> SpectralSlot:
    """A SpectralSlot with `shift`, of the base whose hash is `known`. Raises AdapterError where it
    does not fit the layer or, without `any_base`, is of another base, FormatError where it is
    missing or not floating."""
    refuse_unsuitable(layer, spec)
    require_floating(tensors)
    require_shifts(layer, spec, tensors.get("shift"))
    weight: Any = layer.weight
    require_range("shift", tensors["shift"], fitting_dtype(weight, tensors["shift"].dtype))
    got = base_hash(weight)
    if not any_base and not same_base(known, got):
        raise AdapterError(
            "spectral shifts belong to the weight that they were trained on, and this is another "
            "one; any_base=True loads them all the same"
        )
    return SpectralSlot(spec, placed(weight, tensors["shift"]))


def delta_slot(layer: nn.Module, change: Change) -> DeltaSlot:
    """A DeltaSlot of a Change. Raises AdapterError where it does not fit the layer, FormatError
    where a tensor is not floating."""
    refuse_unsuitable(layer, Delta.of(change))
    weight: Any = layer.weight
    if change.weight is not None:
        require_update(change, shape_of(layer))
        ratio = getattr(change.weight, "ratio", 1.0)
        if not fits_float32(ratio):
            raise AdapterError(f"alpha / rank: expected a finite number (float32), got {ratio!r}")
    require_bias(layer, change.bias)
    require_magnitude(layer, change)
    for key, tensor in tensors_of(change).items():
        require_range(key, tensor, fitting_dtype(weight, tensor.dtype))
    # What is added as it is becomes the layer's dtype with the sum.
    if isinstance(change.weight, Dense):
        require_range("diff", change.weight.diff, weight.dtype)
    if change.bias is not None:
        own = layer._parameters.get("bias")
        require_range("bias", change.bias, (weight if own is None else own).dtype)
    return DeltaSlot(mapped(change, lambda tensor: placed(weight, tensor)))


# --- what a Change means for a layer --------------------------------------------------------------


def is_lora(layer: nn.Module, change: Change) -> bool:
    """Whether the low-rank update of a Change is what a LoRASlot computes."""
    part: Any = change.weight
    if change.bias is not None or part.up.dim() < 2 or part.down.dim() < 2:
        return False
    if part.up.shape[1] * getattr(layer, "groups", 1) != part.down.shape[0]:
        return False  # a grouped convolution whose groups all have the same D
    if change.magnitude is None:
        return True
    # A LoRASlot's magnitude is of the outputs, which are the columns of an embedding's weight.
    outputs = "in" if isinstance(layer, nn.Embedding) else "out"
    return part.mid is None and change.axis == outputs


def oriented(layer: nn.Module, part: LowRank) -> LowRank:
    """With the factors of the weight transposed beside an embedding. Raises AdapterError for an
    embedding's factors beside another layer."""
    embedding = isinstance(layer, nn.Embedding)
    if part.embedding == embedding:
        return part
    if part.embedding:
        raise AdapterError(f"expected factors of a {type(layer).__name__}, got an Embedding's")
    down, up = part.up.t().contiguous(), part.down.t().contiguous()
    return dataclasses.replace(part, down=down, up=up, embedding=True)


def shape_of(layer: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's weight as updates mean it; quantised ones pack it into another."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    kind = type(layer) if isinstance(layer, Adapted) else adapted_class(type(layer))
    weight: Any = layer.weight
    return tuple(kind.upright(weight).shape)  # type: ignore[union-attr]  # there is one


def own_rows(layer: nn.Module, change: Change) -> Change:
    """The rows that the module has, where the parts have rows; else all parts in memory of their
    own: other modules have theirs from the same tensors."""
    assert change.rows is not None
    first, last, total = change.rows
    shape = shape_of(layer)
    if change.magnitude is not None and change.axis == "in":
        raise AdapterError(
            f"a magnitude over inputs is of all {total} rows, and the module has {last - first}"
        )
    part = change.weight
    if isinstance(part, LowRank | Dense):
        name = "up" if isinstance(part, LowRank) else "diff"
        whole = getattr(part, name)
        if len(whole) != total or shape[0] != last - first:
            raise AdapterError(
                f"{name}: expected {total} rows, {last - first} of them for {list(shape)}, "
                f"got {list(whole.shape)}"
            )
        part = dataclasses.replace(part, **{name: whole[first:last]})
        change = dataclasses.replace(change, weight=part, rows=None)
    return mapped(change, Tensor.clone)


def reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A matrix may stand for a convolution's weight, and the reverse."""
    if tensor.shape == shape:
        return tensor
    same = tensor.shape[:1] == shape[:1] and tensor.numel() == math.prod(shape)
    return tensor.reshape(shape) if same else tensor


# --- checks ---------------------------------------------------------------------------------------


def refuse_unsuitable(layer: nn.Module, spec: LoRA | Spectral | Delta) -> None:
    reason = unsuitable(layer, spec)
    if reason is not None:
        reason = reason or "it has no weight to shift"
        raise AdapterError(f"a {type(layer).__name__} cannot take it: {reason}")
    weight: Any = layer.weight
    if weight.is_meta:
        raise AdapterError("the model is on the meta device; load its weights first")


def require_floating(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise FormatError(f"{key}: expected floating values, got {tensor.dtype}")


def require_range(key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises AdapterError where a value would be infinite in `dtype`."""
    largest = too_large(tensor, dtype)
    if largest is not None:
        raise AdapterError(
            f"{key}: expected values of at most {torch.finfo(dtype).max:.6g}, which {dtype} can "
            f"hold, got {largest:.6g}"
        )


def placed(weight: Tensor, tensor: Tensor) -> Tensor:
    """The tensor on the weight's device in a dtype that goes with it."""
    return tensor.to(weight.device, fitting_dtype(weight, tensor.dtype))


def fitting_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The file's dtype if the operators take it beside this weight, else what inject chooses."""
    return dtype if dtype in dtypes_beside(weight) else parameter_dtype("", weight, None)


def require_shifts(layer: nn.Module, spec: Spectral, shift: Tensor | None) -> None:
    count = shift_count(layer, spec)
    if not isinstance(layer, NORMS) and shift is not None and shift.dim() == 1:
        full, got = full_rank(layer), len(shift)
        if got != count and 1 <= got <= full:
            raise AdapterError(
                f"shift: expected [{count}], the rank of the layer's decomposition, got [{got}]: "
                f"shifts of another one; first decompose(model, rank={got}, where=...)"
            )
    require_shape("shift", shift, (count,))


def require_shape(key: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is None:
        raise FormatError(f"{key}: expected {list(expected)}, got nothing")
    if tuple(tensor.shape) != expected:
        raise AdapterError(f"{key}: expected {list(expected)}, got {list(tensor.shape)}")


def require_update(change: Change, shape: tuple[int, ...]) -> None:
    """Raises AdapterError unless the parts make an update of that shape; no value is computed."""
    try:
        mapped(change, lambda tensor: tensor.detach().to("meta")).delta(shape)
    except (FormatError, ArithmeticError, IndexError, RuntimeError, ValueError) as error:
        parts = {} if change.weight is None else change.weight.tensors()
        got = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in parts.items())
        raise AdapterError(f"expected an update of {list(shape)}, got {got}: {error}") from None


def require_bias(layer: nn.Module, bias: Tensor | None) -> None:
    if bias is None:
        return
    if isinstance(layer, nn.Embedding | nn.RMSNorm):
        raise AdapterError(f"bias: expected none for a {type(layer).__name__}, got one")
    if isinstance(layer, nn.ConvTranspose2d):
        require_shape("bias", bias, (layer.out_channels,))
    else:
        shape = shape_of(layer)
        require_shape("bias", bias, shape if isinstance(layer, nn.LayerNorm) else shape[:1])


def require_magnitude(layer: nn.Module, change: Change) -> None:
    if change.magnitude is None:
        return
    weight: Any = layer.weight
    if weight.dim() < 2 or isinstance(layer, nn.ConvTranspose2d):
        raise AdapterError(f"magnitude: expected none for a {type(layer).__name__}, got one")
    size = shape_of(layer)[0 if change.axis == "out" else 1]
    require_shape("magnitude", change.magnitude, (size,))
