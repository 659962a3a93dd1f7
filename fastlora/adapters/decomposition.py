"""The reduced singular value decomposition of one matrix, and how much of it is kept."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.adapters.specs import AdapterError, is_number
from fastlora.adapters.tensors import full_precision

LinAlgError = torch.linalg.LinAlgError  # type: ignore[reportPrivateImportUsage]
NOT_FINITE = "it has NaN or infinite values"


@dataclass(frozen=True)
class Settings:
    """How a matrix is decomposed: in which dtype, and what is kept of it.

    `rank` keeps so many of the largest singular values, `energy` as few as have that share of
    `Σ σ²`. Raises AdapterError for a value of the wrong type or out of range, and for both.
    """

    dtype: torch.dtype = torch.float32
    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        rank, energy = self.rank, self.energy
        if self.dtype not in (torch.float32, torch.float64):
            raise AdapterError(
                f"decompose: dtype: expected torch.float32 or torch.float64, got {self.dtype!r}"
            )
        if rank is not None and energy is not None:
            raise AdapterError("decompose: rank, energy: expected one of them, got both")
        integer = isinstance(rank, int) and not isinstance(rank, bool)
        if rank is not None and not (integer and rank >= 1):
            raise AdapterError(f"decompose: rank: expected an integer >= 1, got {rank!r}")
        if energy is not None and not (is_number(energy) and 0 < energy <= 1):
            raise AdapterError(f"decompose: energy: expected a value in (0, 1], got {energy!r}")

    def of(self, matrix: Tensor) -> "Settings":
        """The same for this matrix, written as it is for all that come to the same."""
        dtype = self.dtype if matrix.dtype != torch.float64 else torch.float64
        rank = self.rank if self.rank is not None and self.rank < min(matrix.shape) else None
        return replace(self, dtype=dtype, rank=rank)

    def kept(self, s: Tensor) -> int:
        """How many of the falling singular values `s [rank]` stay."""
        if self.rank is not None:
            return min(self.rank, len(s))
        if self.energy is None:
            return len(s)
        sums = s.cpu().double().square().cumsum(0)
        return min(int((sums < self.energy * sums[-1]).sum()) + 1, len(s))


class Factors(NamedTuple):
    """`W ≈ U diag(σ) Vᵀ` with `error = ‖W - UσVᵀ‖ / ‖W‖` (Frobenius; 0 for W = 0), `norm = ‖W‖`."""

    u: Tensor  # [out, rank], the matrix's dtype
    s: Tensor  # [rank], falling; float32, float64 beside a float64 matrix
    vh: Tensor  # [rank, in], the matrix's dtype
    error: float
    norm: float

    def to(self, device: torch.device) -> "Factors":
        return self._replace(u=self.u.to(device), s=self.s.to(device), vh=self.vh.to(device))


@torch.no_grad()
def factors(matrix: Tensor, settings: Settings, device: torch.device | None = None) -> Factors:
    """Decomposes `matrix [out, in]` on `device` (None: where it is), where the factors stay.

    Computed in `settings.dtype` (a float64 matrix always in float64), once more in float64 where
    that fails; the factors are then rounded to the matrix's dtype. `error` is measured, so that it
    has what truncation and rounding leave out. Raises LinAlgError where there is no decomposition.
    """
    matrix = matrix.detach().to(device or matrix.device)
    with full_precision(matrix.device):
        wide = matrix.to(torch.promote_types(matrix.dtype, settings.dtype))
        u, s, vh = svd(wide)
        kept = settings.kept(s)
        u, vh = u[:, :kept].to(matrix.dtype).contiguous(), vh[:kept].to(matrix.dtype).contiguous()
        s = s[:kept].to(torch.promote_types(matrix.dtype, torch.float32)).contiguous()
    return Factors(u, s, vh, *error_of(wide, u, s, vh))


@torch.no_grad()
def error_of(matrix: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> tuple[float, float]:
    """`‖W - UσVᵀ‖ / ‖W‖` (0 for W = 0) and `‖W‖`."""
    with full_precision(matrix.device):
        # GPUs may multiply float32 in TF32, and then the error would be that of the product.
        wide = torch.promote_types(matrix.dtype, torch.float64 if matrix.is_cuda else s.dtype)
        residual = torch.addmm(matrix.to(wide), u.to(wide) * s.to(wide), vh.to(wide), alpha=-1)
    norm = length(matrix)
    return length(residual) / norm if norm else 0.0, norm


def length(t: Tensor) -> float:
    """The Frobenius norm; squares of float32 may not fit into one."""
    return torch.linalg.vector_norm(t, dtype=torch.float64).item()


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not torch.isfinite(matrix).all():
        raise LinAlgError(NOT_FINITE)
    if matrix.shape[0] < matrix.shape[1]:  # LAPACK takes up to six times as long for a wide matrix
        u, s, vh = svd(matrix.mT)
        return vh.mT, s, u.mT
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        if torch.isfinite(s).all():  # which not every driver checks by itself
            return u, s, vh
        problem = "its singular values are not finite"
    except LinAlgError as error:
        problem = str(error)
    if matrix.dtype == torch.float64:
        raise LinAlgError(problem)
    u, s, vh = svd(matrix.double())
    return u.to(matrix.dtype), s.to(matrix.dtype), vh.to(matrix.dtype)
