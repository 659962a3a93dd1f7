"""What to add to a layer: `LoRA` and `Spectral` describe an adapter, `inject` builds it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max


class AdapterError(ValueError):
    """A request about adapters that cannot be carried out; nothing was changed."""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def fits_float32(number: float) -> bool:
    """Finite, and still so in float32, the dtype of strengths."""
    try:
        return abs(float(number)) <= FLOAT32_MAX  # which NaN is not
    except OverflowError:  # an integer beyond float64
        return False


@dataclass(frozen=True)
class LoRA:
    """`W' = W + (alpha / rank) U D`, `D [rank, in]` Kaiming uniform, `U [out, rank]` zero.

    Hu et al. 2021, arXiv 2106.09685. `alpha=None` means `alpha = rank`; `rank_stabilized` scales by
    `alpha / sqrt(rank)` (arXiv 2312.03732); `dropout` acts on the adapter's input in training;
    `dora` adds a trained magnitude, `W' = m (W + sUD) / ‖W + sUD‖` per output row with the norm
    detached (arXiv 2402.09353). `ranks` and `alphas` override rank and alpha for single module
    paths. Raises AdapterError for a setting of the wrong type or out of range.
    """

    rank: int = 16
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    dora: bool = False
    ranks: dict[str, int] | None = None
    alphas: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for field in ("rank_stabilized", "dora"):
            value = getattr(self, field)
            if not isinstance(value, bool):  # 'no' would be taken as yes
                raise AdapterError(f"LoRA: {field}: expected True or False, got {value!r}")
        for field in ("ranks", "alphas"):
            value = getattr(self, field)
            paths = isinstance(value, Mapping) and all(isinstance(path, str) for path in value)
            if value is not None and not paths:
                raise AdapterError(f"LoRA: {field}: expected a dict by module path, got {value!r}")
        for rank in (self.rank, *(self.ranks or {}).values()):
            if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 2**31:
                raise AdapterError(
                    f"LoRA: rank: expected an integer >= 1 and below 2^31, got {rank!r}"
                )
        for alpha in (self.alpha, *(self.alphas or {}).values()):
            # Zero would train nothing (and means rank in other formats). Finite in float32, as the
            # gate alpha / rank has to be, which is no larger.
            if alpha is not None and not (is_number(alpha) and fits_float32(alpha) and alpha != 0):
                raise AdapterError(
                    f"LoRA: alpha: expected a finite number (float32) that is not 0, got {alpha!r}"
                )
        if not (is_number(self.dropout) and 0.0 <= self.dropout < 1.0):
            raise AdapterError(f"LoRA: dropout: expected a value in [0, 1), got {self.dropout!r}")

    def at(self, path: str) -> "LoRA":
        """This configuration with the rank and alpha of the module at `path`."""
        rank = (self.ranks or {}).get(path, self.rank)
        alpha = (self.alphas or {}).get(path, self.alpha)
        return replace(self, rank=rank, alpha=alpha, ranks=None, alphas=None)

    @property
    def ratio(self) -> float:
        """The factor on U D at scale 1: `alpha / rank`, or `alpha / sqrt(rank)`."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclass(frozen=True)
class Spectral:
    """`W' = U diag(relu(σ + strength δ)) Vᵀ` in residual form: only the shifts δ are trained.

    SVDiff, Han et al. 2023, arXiv 2303.11305. `norms` says what happens to one-dimensional weights
    of normalisation layers: a shift per element, one shift per layer, or none at all.
    """

    norms: Literal["elementwise", "scalar", "skip"] = "elementwise"

    def __post_init__(self) -> None:
        if self.norms not in ("elementwise", "scalar", "skip"):
            raise AdapterError(
                f"Spectral: norms: expected 'elementwise', 'scalar' or 'skip', got {self.norms!r}"
            )


@dataclass(frozen=True)
class AdapterInfo:
    """One named adapter of a model, as `fastlora.adapters(model)` reports it."""

    kind: str  # "lora", "dora", "spectral", "loha", "lokr", "full", ...; several: "lora+full"
    modules: tuple[str, ...]  # paths of the adapted layers, of several models "unet.down..."
    rank: int | None  # the largest over the modules; None where none has a rank
    parameters: int  # numbers that the adapter adds
    # A tensor [batch]: one strength per sample. By component where those of several models differ.
    scale: float | Tensor | dict[str, float | Tensor]
    enabled: bool | dict[str, bool]
