"""The parameters that adapters add to a layer, kept in the layer's child module `fastlora`.

A slot's protocol: `owned` (names of its parameters), `kind`, `width` (its entries in the arena) and
`ratio` (its gate at scale 1).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.specs import LoRA, Spectral


class Slot(nn.Module):
    """One named adapter of one layer."""

    owned: tuple[str, ...]
    kind: str
    width: int
    ratio: float

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A plain base checkpoint knows nothing of adapters: it loads under strict=True and leaves
        # them as they are. One that has some of this slot's keys must have all of them.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )


class LoRASlot(Slot):
    """down [rank, in], up [out, rank]; convolutions [rank, in/groups, kh, kw] and
    [out, rank/groups, 1, 1]; embeddings [rank, vocabulary], [dim, rank]. DoRA adds magnitude [out].
    """

    magnitude: nn.Parameter | None

    def __init__(
        self, spec: LoRA, down: Tensor, up: Tensor, magnitude: Tensor | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.register_parameter("magnitude", None if magnitude is None else nn.Parameter(magnitude))

    @property
    def owned(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self._parameters) if self.spec.dora else ("down", "up")

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "dora" if self.spec.dora else "lora"

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.down.shape[0]

    @property
    def ratio(self) -> float:  # type: ignore[override]
        return self.spec.ratio

    def extra_repr(self) -> str:
        return f"rank={self.width}, ratio={self.ratio:g}, kind={self.kind}"


class SpectralSlot(Slot):
    """shift [rank] of a matrix's singular values, [dim] or [1] added to a norm's weight."""

    owned = ("shift",)
    kind = "spectral"
    width = 1
    ratio = 1.0

    def __init__(self, spec: Spectral, shift: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.shift = nn.Parameter(shift)

    def extra_repr(self) -> str:
        return f"shifts={self.shift.numel()}, norms={self.spec.norms}"


class Slots(nn.ModuleDict):
    """The slots of a layer by adapter name, with what they share, never part of a state dict:
    the singular value decomposition of the base weight, and the folded weight."""

    svd_u: Tensor | None  # [out, rank]
    svd_s: Tensor | None  # [rank]
    svd_vh: Tensor | None  # [rank, in]
    folded_weight: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        for name in ("svd_u", "svd_s", "svd_vh", "folded_weight"):
            self.register_buffer(name, None, persistent=False)

    def decompose(self, matrix: Tensor) -> None:
        """Keeps the singular value decomposition of `matrix [out, in]`."""
        self.svd_u, self.svd_s, self.svd_vh = factors(matrix)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        values = self.svd_s
        result = super()._apply(fn, recurse)
        if values is not None and self.svd_s is not None and self.svd_u is not None:
            # Like the gates, the singular values stay float32 beside 16-bit weights.
            wide = torch.float64 if self.svd_u.dtype == torch.float64 else torch.float32
            if self.svd_s.dtype != wide:
                self.svd_s = values.to(self.svd_s.device, wide)
        return result


@torch.no_grad()
def factors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced SVD of `matrix [out, in]`, computed in float32 (float64 stays): U and Vᵀ in the
    matrix's dtype, the singular values as they were computed."""
    wide = matrix.dtype if matrix.dtype == torch.float64 else torch.float32
    u, s, vh = torch.linalg.svd(matrix.detach().to(wide), full_matrices=False)
    return u.to(matrix.dtype).contiguous(), s, vh.to(matrix.dtype).contiguous()


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator, **kwargs: Any) -> Tensor:
    """U(-1/√fan_in, 1/√fan_in): `kaiming_uniform_(a=√5)`, drawn on the CPU so that a seed means the
    same numbers on every device."""
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32) * (2 * bound) - bound
    return drawn.to(**kwargs)
