"""Low-rank approximations of changes: the truncated singular value decomposition, and its error.

Best in the Frobenius norm (Eckart, Young 1936). Where a change is a product or a Kronecker product
it is decomposed through its factors, and no matrix of the weight's size is made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.formats.changes import Change, Hadamard, Kronecker, LowRank, Shift
from fastlora.formats.files import FormatError
from fastlora.formats.measures import (
    common_dtype,
    groups_of,
    product_norm,
    shape_of,
    widened,
    working_dtype,
)
from fastlora.formats.svd import Decomposition, truncated_svd


class Compressed(NamedTuple):
    weight: LowRank
    lost: float  # Frobenius norm of what is missing
    norm: float  # and of the whole update

    @property
    def error(self) -> float:
        return self.lost / self.norm if self.norm else 0.0


def compress(
    change: Change, rank: int, dtype: torch.dtype | None = None, kernel: tuple[int, ...] = ()
) -> Compressed:
    """A LoRA of at most `rank` nearest to the change, without its bias and magnitude.

    Computed in float32 (float64 for such parts) and written in `dtype`, the parts' own if None;
    `lost` has that rounding in it. The ratio is 1, singular values are shared evenly by both
    factors. A LoRA that has the rank already stays as it is. `kernel`: of the convolution, where
    the parts do not say it.

    Raises FormatError for shifts, biases, vectors and grouped convolutions.
    """
    weight = change.weight
    if weight is None or isinstance(weight, Shift):
        raise FormatError(f"a change of kind {change.kind} has no low-rank form")
    if isinstance(weight, LowRank):
        if groups_of(weight) > 1:
            raise FormatError("a grouped convolution's LoRA cannot be compressed")
        if weight.rank <= rank and weight.mid is None:
            own = widened(weight)
            size = abs(own.ratio) * product_norm(own.up.flatten(1), own.down.flatten(1))
            return Compressed(weight, 0.0, size)
    # Rows of a fused module stay rows of it.
    shape = shape_of(Change(weight))
    if len(shape) < 2:
        raise FormatError(f"a vector {list(shape)} has no low-rank form")
    parts = list(weight.tensors().values())
    found = _decompose(weight, shape, rank, working_dtype(*parts))
    root = found.s.sqrt()
    up, down = found.u * root, root[:, None] * found.v
    if isinstance(weight, LowRank) and weight.embedding:
        shape = shape[::-1]
    elif len(shape) == 2 and kernel:
        shape = (shape[0], shape[1] // math.prod(kernel), *kernel)
    dtype = dtype or common_dtype(parts)
    written = LowRank(
        down.to(dtype).reshape(-1, *shape[1:]),
        up.to(dtype).reshape(*up.shape, *[1] * len(shape[2:])),
        embedding=isinstance(weight, LowRank) and weight.embedding,
    )
    # Orthogonal to what was cut off, but for second order: squares add.
    rounding = _difference(up, down, written)
    total = float(found.s.double().square().sum()) + found.rest
    return Compressed(written, math.hypot(math.sqrt(found.rest), rounding), math.sqrt(total))


def as_product(weight: object, dtype: torch.dtype) -> LowRank | None:
    """A LoHa as the LoRA that it is, of rank r₁ r₂; None if that is above half of the full rank.

    `(A₁ B₁) ∘ (A₂ B₂)` is the product of the columns `a₁ᵢ ∘ a₂ⱼ` and the rows `b₁ᵢ ∘ b₂ⱼ`.
    """
    if not isinstance(weight, Hadamard) or weight.t1 is not None or weight.t2 is not None:
        return None
    rank = weight.w1_b.shape[0] * weight.w2_b.shape[0]
    if 2 * rank > min(weight.w1_a.shape[0], weight.w1_b.shape[1]):
        return None
    w1_a, w2_a = weight.w1_a.to(dtype), weight.w2_a.to(dtype)
    w1_b, w2_b = weight.w1_b.to(dtype), weight.w2_b.to(dtype)
    up = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
    down = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    return LowRank(down, up, weight.ratio * rank)


def _decompose(
    weight: object, shape: tuple[int, ...], rank: int, dtype: torch.dtype
) -> Decomposition:
    product = weight if isinstance(weight, LowRank) else as_product(weight, dtype)
    if product is not None:
        whole = widened(product)
        up, down = whole.up.flatten(1).to(dtype), whole.down.flatten(1).to(dtype)
        return _of_product(up * whole.ratio, down, rank)
    if isinstance(weight, Kronecker):
        return _of_kronecker(weight, dtype, rank)
    dense = weight.delta(shape, dtype).flatten(1)  # type: ignore[attr-defined]
    return truncated_svd(dense, rank)


def _of_product(up: Tensor, down: Tensor, rank: int) -> Decomposition:
    """Of `up [out, r] · down [r, in]`: `Q_U (R_U R_Dᵀ) Q_Dᵀ`, where the middle is r × r."""
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.t())
    u, s, v, rest = truncated_svd(r_up @ r_down.t(), rank)
    return Decomposition(q_up @ u, s, v @ q_down.t(), rest)


def _of_kronecker(weight: Kronecker, dtype: torch.dtype, rank: int) -> Decomposition:
    """Singular values of a Kronecker product are all products of the factors', and so on."""
    one = torch.ones(1, 1, dtype=dtype)
    first = Kronecker(weight.w1, weight.w1_a, weight.w1_b, w2=one)
    second = Kronecker(one, w2=weight.w2, w2_a=weight.w2_a, w2_b=weight.w2_b, t2=weight.t2)
    (u1, s1, v1), (u2, s2, v2) = (
        torch.linalg.svd(w.delta(shape_of(Change(w)), dtype).flatten(1), full_matrices=False)
        for w in (first, second)
    )
    s = torch.outer(s1, s2).flatten() * abs(weight.ratio)
    order = s.argsort(descending=True)
    i, j = order[:rank] // len(s2), order[:rank] % len(s2)
    u = (u1[:, None, i] * u2[None, :, j]).flatten(0, 1) * math.copysign(1, weight.ratio)
    v = (v1[i, :, None] * v2[j, None, :]).flatten(1)
    return Decomposition(u, s[order[:rank]], v, float(s[order[rank:]].double().square().sum()))


def _difference(up: Tensor, down: Tensor, written: LowRank) -> float:
    """`‖up down - written‖` as the product of `[up - u, u]` and `[down; down - d]`."""
    u, d = written.up.flatten(1).to(up.dtype), written.down.flatten(1).to(down.dtype)
    if torch.equal(u, up) and torch.equal(d, down):
        return 0.0
    return product_norm(torch.cat([up - u, u], 1), torch.cat([down, down - d]))
