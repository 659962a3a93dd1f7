"""Adapters' changes written into weights, and into the files of a checkpoint.

    W' = W + Σ strength ΔW                            of updates
    W' = W + Σ (V m / ‖V‖ - W), V = W + strength ΔW   of DoRA
    W' = W + U diag(relu(σ + Σ strength δ) - σ) Vᵀ    of spectral shifts (SVDiff, arXiv 2303.11305)

Computed in float32 (float64 for such weights) and rounded once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.formats.changes import Change, LowRank, Shift, Target
from fastlora.formats.checkpoint_names import Slice
from fastlora.formats.checkpoints import Weights
from fastlora.formats.files import PIECE, FormatError, as_bytes, is_sound


class Edit(NamedTuple):
    """A change at a strength."""

    change: Change
    strength: float


class Written(NamedTuple):
    """What was done to one tensor, in squares of Frobenius norms."""

    before: float  # ‖W‖²
    change: float  # ‖W' - W‖², before it was rounded
    rounding: float  # ‖rounded W' - W'‖²


def folded(weight: Tensor, edits: Sequence[Edit]) -> Tensor:
    """W' of a weight, computed in its dtype. Raises FormatError where shapes do not fit."""
    shifts = [e for e in edits if isinstance(e.change.weight, Shift)]
    others = [e for e in edits if not isinstance(e.change.weight, Shift)]
    if len(edits) == len(others) == 1:
        return _changed(weight, others[0])
    total = shifted(weight, shifts) if shifts else weight
    for edit in others:
        total = total + (_changed(weight, edit) - weight)
    return total


def folded_bias(bias: Tensor, edits: Sequence[Edit]) -> Tensor:
    """`b + Σ strength Δb`. Raises FormatError where shapes do not fit."""
    for change, strength in edits:
        if change.bias is None:
            continue
        if change.bias.numel() != bias.numel():
            raise FormatError(f"expected a bias of {bias.numel()}, got {change.bias.numel()}")
        bias = bias + strength * change.bias.to(bias).view_as(bias)
    return bias


def shifted(weight: Tensor, edits: Sequence[Edit]) -> Tensor:
    """`W + U diag(relu(σ + Σ strength δ) - σ) Vᵀ` of W as [out, everything else], or for a vector
    `w + Σ strength δ`. With fewer shifts than singular values the smallest stay."""
    # SVD wants float32, and shifts may be small beside the singular values that they are added to.
    wide = torch.promote_types(weight.dtype, torch.float32)
    shifts = [e.strength * _shift(e).to(weight.device, wide) for e in edits]
    total = functools.reduce(torch.add, shifts)
    if weight.dim() < 2:
        if total.numel() not in (1, weight.numel()):
            raise FormatError(f"expected {weight.numel()} shifts or one, got {total.numel()}")
        return (weight + total).to(weight.dtype)
    u, s, vh = torch.linalg.svd(weight.flatten(1).to(wide), full_matrices=False)
    count = total.numel()
    if count > s.numel():
        raise FormatError(f"expected at most {s.numel()} shifts, got {count}")
    moved = (s[:count] + total).clamp_min(0) - s[:count]
    left, right = u[:, :count] * moved, vh[:count]
    return weight + (left.to(weight.dtype) @ right.to(weight.dtype)).view_as(weight)


def _shift(edit: Edit) -> Tensor:
    assert isinstance(edit.change.weight, Shift)
    return edit.change.weight.shift


def _changed(weight: Tensor, edit: Edit) -> Tensor:
    change, strength = edit
    if change.weight is None and change.magnitude is None:
        return weight
    return oriented(change, tuple(weight.shape)).changed(weight, strength)


def oriented(change: Change, shape: tuple[int, ...]) -> Change:
    """A LoRA [rank, vocabulary], [dim, rank] of a weight [vocabulary, dim] is an embedding's, also
    where its file does not tell."""
    low = change.weight
    if not isinstance(low, LowRank) or low.embedding or len(shape) != 2 or low.down.dim() != 2:
        return change
    got = low.up.shape[0], low.down.shape[1]
    if change.rows is not None or got == shape or got != shape[::-1]:
        return change
    return dataclasses.replace(change, weight=dataclasses.replace(low, embedding=True))


Edits = Mapping[Target, Sequence[Edit]]
Check = Callable[[Target, Change, Tensor], None]  # of a module's weight, before it is changed


def touched(weights: Weights, edits: Edits) -> dict[str, list[tuple[Target, str, Slice]]]:
    """The tensors that edits change, by key, and which modules' parameters they are.

    Raises FormatError for a module without the parameter that is to be changed.
    """
    found: dict[str, list[tuple[Target, str, Slice]]] = {}
    for target in weights.modules.keys() & edits.keys():
        own = weights.modules[target]
        changes = [e.change for e in edits[target]]
        wanted = {"weight": any(c.weight is not None or c.magnitude is not None for c in changes)}
        wanted["bias"] = any(c.bias is not None for c in changes)
        for name in (name for name, is_wanted in wanted.items() if is_wanted):
            if name not in own:
                raise FormatError(f"{target}: expected a {name} in the checkpoint, got {[*own]}")
            found.setdefault(own[name].key, []).append((target, name, own[name]))
    return {key: found[key] for key in weights.keys if key in found}


def rewritten(
    weights: Weights,
    key: str,
    places: Sequence[tuple[Target, str, Slice]],
    edits: Edits,
    check: Check,
) -> tuple[Tensor, Written]:
    """The new value of a tensor, in its dtype.

    Raises FormatError naming the module whose parts do not fit, for a quantised tensor, and for
    values beyond the dtype; whatever `check` raises.
    """
    old = weights.tensor(key)
    if not old.is_floating_point() or _is_scaled(weights, key):
        raise FormatError(f"{key}: expected floating-point weights, got quantised ones")
    wide = old.to(torch.float64 if old.dtype == torch.float64 else torch.float32, copy=True)
    new = wide.clone() if any(place.total > 1 for _, _, place in places) else None
    for target, name, place in places:
        before, own = place.of(wide), edits[target]
        try:
            if name == "weight":
                for edit in own:
                    check(target, edit.change, before)
            made = folded(before, own) if name == "weight" else folded_bias(before, own)
        except FormatError as error:
            raise FormatError(f"{target}: {error}") from None
        if new is None:
            new = made
        else:
            place.of(new).copy_(made)
    assert new is not None
    rounded = new.to(old.dtype)
    if not all(map(is_sound, rounded.flatten().split(PIECE))):
        raise FormatError(f"{key}: a value of {float(new.abs().max()):.3g} is beyond {old.dtype}")
    size = _square(wide)
    # In place: these tensors are the largest that there are.
    change = _square(wide.sub_(new)) if new is not wide else 0.0
    rounding = _square(new.sub_(rounded)) if rounded is not new else 0.0
    return rounded, Written(size, change, rounding)


def overwrite(path: Path, offset: int, tensor: Tensor) -> None:
    """The tensor's bytes at a place in a file that is there."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(as_bytes(tensor).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _is_scaled(weights: Weights, key: str) -> bool:
    """Whether the tensor has to be multiplied by another one, as in files of scaled float8."""
    start = key.removesuffix("weight")
    return any(f"{start}{name}" in weights for name in ("scale_weight", "weight_scale"))


def _square(tensor: Tensor) -> float:
    return math.pow(float(torch.linalg.vector_norm(tensor)), 2)
