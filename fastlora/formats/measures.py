"""What can be told of a change from its parts: the weight's shape, and the norm of the update."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from fastlora.formats.changes import Change, Dense, Hadamard, Kronecker, LowRank, Shift, Target
from fastlora.formats.files import FormatError

# diffusers' UNets have no others.
_CONVOLUTIONS = {(3, 3): re.compile(r"conv(1|2|_in|_out)?"), (1, 1): re.compile("conv_shortcut")}


def shape_of(change: Change) -> tuple[int, ...]:
    """The shape of the module's weight as far as the parts say it.

    LoHa and LoKr of a convolution without a Tucker core say [out, in·kh·kw]; a grouped one's second
    number is in/groups. Raises FormatError for shifts and for a change of the bias alone.
    """
    whole = _whole_shape(change)
    return whole if change.rows is None else (change.rows[1] - change.rows[0], *whole[1:])


def kernel_of(target: Target, change: Change) -> tuple[int, ...]:
    """Of a UNet's convolution whose parts say [out, in·kh·kw], by the module's name; else ()."""
    shape = shape_of(change)
    if len(shape) == 2 and not target.flat:
        for kernel, name in _CONVOLUTIONS.items():
            fits = shape[1] % math.prod(kernel) == 0
            if fits and name.fullmatch(target.path.rpartition(".")[2]):
                return kernel
    return ()


def groups_of(weight: LowRank) -> int:
    """Of the convolution: `down [rank, ...]` and `up [out, rank/groups, 1, 1]`."""
    return max(weight.rank // max(weight.up.flatten(1).shape[1], 1), 1)


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype that all of them have, else float32, or float64 where one has that."""
    found = {t.dtype for t in tensors}
    if len(found) == 1:
        return found.pop()
    return torch.float64 if torch.float64 in found else torch.float32


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """What to compute in: float32, or float64 where a tensor has it."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def norm(change: Change) -> float:
    """`‖ΔW‖` (Frobenius) at strength 1, without DoRA's magnitude and without a bias.

    Of a low-rank change from its factors, `‖U D‖² = Σ (UᵀU) ∘ (D Dᵀ)`, so that nothing of the
    weight's size is made. Of spectral shifts it is the norm of the shifts, which is right as long
    as none of them makes a singular value negative.
    """
    weight = change.weight
    if weight is None:
        return 0.0
    if isinstance(weight, Shift):
        return _vector_norm(weight.shift)
    if isinstance(weight, LowRank):
        return _low_rank_norm(own_rows(weight, change.rows))
    if isinstance(weight, Kronecker) and change.rows is None and weight.t2 is None:
        first = _factor_norm(weight.w1, weight.w1_a, weight.w1_b)
        return abs(weight.ratio) * first * _factor_norm(weight.w2, weight.w2_a, weight.w2_b)
    return _vector_norm(change.delta(shape_of(change), working_dtype(*weight.tensors().values())))


def own_rows(weight: LowRank, rows: tuple[int, int, int] | None) -> LowRank:
    """The change of rows [first, last) alone. Raises FormatError for a grouped convolution."""
    if rows is None:
        return weight
    if groups_of(weight) > 1:
        raise FormatError("expected a module without groups as a part of a fused one")
    return dataclasses.replace(weight, up=weight.up[rows[0] : rows[1]])


def widened(weight: LowRank) -> LowRank:
    """Without a Tucker core: `down [rank, in, kh, kw]`, in float32 (float64) if there was one."""
    if weight.mid is None:
        return weight
    dtype = working_dtype(*weight.tensors().values())
    return weight.without_mid(dtype)


def product_norm(up: Tensor, down: Tensor) -> float:
    """`‖U D‖` (Frobenius) of `up [out, rank]`, `down [rank, in]`."""
    dtype = working_dtype(up, down)
    up, down = up.to(dtype), down.to(dtype)
    square = float(((up.t() @ up).double() * (down @ down.t()).double()).sum())
    return max(square, 0.0) ** 0.5  # a sum of rounded products may be below zero


def _low_rank_norm(weight: LowRank) -> float:
    whole = widened(weight)
    groups = groups_of(whole)
    ups, downs = whole.up.flatten(1).chunk(groups), whole.down.flatten(1).chunk(groups)
    squares = [product_norm(u, d) ** 2 for u, d in zip(ups, downs, strict=True)]
    return abs(whole.ratio) * sum(squares) ** 0.5


def _factor_norm(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> float:
    if whole is not None:
        return _vector_norm(whole)
    assert a is not None and b is not None
    return product_norm(a, b.flatten(1))


def _vector_norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.to(working_dtype(tensor))))


def _whole_shape(change: Change) -> tuple[int, ...]:
    weight = change.weight
    if isinstance(weight, LowRank):
        kernel = weight.down.shape[2:] if weight.mid is None else weight.mid.shape[2:]
        out, inputs = weight.up.shape[0], weight.down.shape[1]
        return (inputs, out) if weight.embedding else (out, inputs, *kernel)
    if isinstance(weight, Hadamard):
        return _factor_shape(None, weight.w1_a, weight.w1_b, weight.t1)
    if isinstance(weight, Kronecker):
        first = _factor_shape(weight.w1, weight.w1_a, weight.w1_b, None)
        second = _factor_shape(weight.w2, weight.w2_a, weight.w2_b, weight.t2)
        return (first[0] * second[0], first[1] * second[1], *second[2:])
    if isinstance(weight, Dense):
        return tuple(weight.diff.shape)
    raise FormatError(f"a change of kind {change.kind} does not say the weight's shape")


def _factor_shape(
    whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None
) -> tuple[int, ...]:
    if whole is not None:
        return tuple(whole.shape)
    assert a is not None and b is not None
    if core is None:
        return (a.shape[0], *b.shape[1:])
    return (a.shape[1], b.shape[1], *core.shape[2:])
