"""Truncated singular value decompositions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = 2048  # that are float64 at a time


class Decomposition(NamedTuple):
    """`U diag(S) V`: the largest singular values, and the sum of the others' squares."""

    u: Tensor  # [out, rank]
    s: Tensor  # [rank], descending
    v: Tensor  # [rank, in]
    rest: float


def truncated_svd(matrix: Tensor, rank: int) -> Decomposition:
    """The `rank` largest singular values and vectors of a matrix, all of a smaller one.

    float32: by the eigenvectors of A Aᵀ (or AᵀA, the smaller) in float64, `A Aᵀ U = U S²`, and
    `V = S⁻¹ Uᵀ A`. That takes a small part of the time of `torch.linalg.svd` and is closer to the
    exact ones: squares are exact in float64 and eigenvalues right to 1e-15 of the largest, singular
    values to 1e-8, where float32 has 1e-7. Smaller ones than that are zeros, with zeros for their
    vectors on the longer side. float64: by `torch.linalg.svd`.
    """
    if matrix.dtype == torch.float64:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        rest = float(s[rank:].square().sum())
        return Decomposition(u[:, :rank], s[:rank], v[:rank], rest)
    if matrix.shape[0] > matrix.shape[1]:
        u, s, v, rest = truncated_svd(matrix.t(), rank)
        return Decomposition(v.t(), s, u.t(), rest)
    squares, vectors = torch.linalg.eigh(gram(matrix))
    rest = float(squares[:-rank].clamp_min(0).sum())
    squares, vectors = squares[-rank:].flip(0), vectors[:, -rank:].flip(1)
    noise = squares[:1].clamp_min(0) * len(matrix) * torch.finfo(torch.float64).eps
    s = squares.where(squares > noise, 0).sqrt()
    inverse = torch.where(s > 0, 1 / s, 0)
    u = vectors.to(matrix.dtype)
    v = (vectors * inverse).t().to(matrix.dtype) @ matrix
    return Decomposition(u, s.to(matrix.dtype), v, rest)


def gram(matrix: Tensor) -> Tensor:
    """`A Aᵀ` in float64."""
    total = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64, device=matrix.device)
    for columns in matrix.split(COLUMNS, 1):
        wide = columns.double()
        total.addmm_(wide, wide.t())
    return total
