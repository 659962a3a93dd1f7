"""What an adapter file says of a model's layers, in the terms that all formats share.

A format's reader turns a file's tensors and metadata into an `AdapterFile`: a `Change` for each
`Target`. Nothing here knows a model; the shapes of its weights come in where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastlora.formats.files import FormatError


class Target(NamedTuple):
    """Which weight is meant: a part of a pipeline and a module's path in it."""

    component: str  # "unet", "transformer", "text_encoder", "text_encoder_2", ...; "": the model
    path: str  # "down_blocks.0.attentions.0.proj_in", or as `flat` says
    flat: bool = False  # dots are underscores, as in kohya's names: one path for each model

    def __str__(self) -> str:
        return ".".join(filter(None, (self.component, self.path)))


class Parts:
    """What the classes below share: they say what is added to a weight at strength 1.

    `delta(shape, dtype)` is the dense update in the weight's shape, computed in `dtype` on the
    parts' device; it raises FormatError where the parts do not make such a shape.
    """

    def tensors(self) -> dict[str, Tensor]:
        """The parts by field name."""
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}


@dataclass(frozen=True)
class LowRank(Parts):
    """`ΔW = ratio · up down`; with `mid` (Tucker) `ratio · up mid down`, which is low rank too.

    A Linear's `down [rank, in]`, `up [out, rank]`; a convolution's `[rank, in/groups, kh, kw]` and
    `[out, rank/groups, 1, 1]`, with mid `[rank, rank, kh, kw]` and down `[rank, in, 1, 1]`; an
    embedding's `[rank, vocabulary]` and `[dim, rank]`, whose product is the weight transposed.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None  # None: rank
    rank_stabilized: bool = False  # ratio = alpha / sqrt(rank)
    mid: Tensor | None = None
    embedding: bool = False
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def ratio(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def without_mid(self, dtype: torch.dtype | None = None) -> LowRank:
        """The same update with `down [rank, in, kh, kw]`, of that dtype or its own, and no mid."""
        if self.mid is None:
            return self
        wide = dtype or torch.promote_types(self.down.dtype, torch.float32)
        mid, down = self.mid.to(wide), self.down.to(wide).flatten(1)
        down = torch.einsum("rs...,si->ri...", mid, down).to(dtype or self.down.dtype)
        return replace(self, down=down, mid=None)

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        whole = self.without_mid(dtype)
        down, up = whole.down.to(dtype), whole.up.to(dtype)
        width = up.flatten(1).shape[1]  # rank / groups
        groups = down.shape[0] // width if width else 0
        if not groups or groups * width != down.shape[0] or up.shape[0] % groups:
            raise FormatError(f"down {list(down.shape)} and up {list(up.shape)} have no product")
        pairs = zip(up.flatten(1).chunk(groups), down.flatten(1).chunk(groups), strict=True)
        product = torch.cat([u @ d for u, d in pairs])
        return _shaped((product.t() if self.embedding else product) * self.ratio, shape)


@dataclass(frozen=True)
class Hadamard(Parts):
    """LoHa: `ΔW = alpha/rank · (w1_a w1_b) ∘ (w2_a w2_b)`; w?_a [out, rank], w?_b [rank, in·kh·kw].

    With t1, t2 (Tucker, [rank, rank, kh, kw]) w?_a is [rank, out], w?_b [rank, in] and a factor is
    `einsum("ij..., ip, jr -> pr...", t, w_a, w_b)`. Hyeon-Woo et al. 2022, arXiv 2108.06098.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float | None = None
    t1: Tensor | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def ratio(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        first = _factor(self.w1_a, self.w1_b, self.t1, dtype)
        second = _factor(self.w2_a, self.w2_b, self.t2, dtype)
        return _shaped(first * second * self.ratio, shape)


@dataclass(frozen=True)
class Kronecker(Parts):
    """LoKr: `ΔW = ratio · kron(w1, w2)`, either factor whole or as `w?_a w?_b` (w2 with t2: Tucker,
    as in LoHa). `ratio = alpha / rank`, and 1 whatever alpha says where both are whole.

    w1 [l, m], w2 [k, n] or [k, n, kh, kw]: weight [l·k, m·n, kh, kw]. LyCORIS, arXiv 2309.14859.
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    alpha: float | None = None
    t2: Tensor | None = None

    @property
    def rank(self) -> int | None:
        factor = self.w2_b if self.w2_b is not None else self.w1_b
        return None if factor is None else factor.shape[0]

    @property
    def ratio(self) -> float:
        if self.rank is None or self.alpha is None:
            return 1.0
        return self.alpha / self.rank

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        w1 = (
            self.w1.to(dtype) if self.w1 is not None else _factor(self.w1_a, self.w1_b, None, dtype)
        )
        w2 = (
            self.w2.to(dtype)
            if self.w2 is not None
            else _factor(self.w2_a, self.w2_b, self.t2, dtype)
        )
        w1 = w1.reshape(*w1.shape, *[1] * (w2.dim() - w1.dim()))
        return _shaped(torch.kron(w1, w2.contiguous()) * self.ratio, shape)


@dataclass(frozen=True)
class Dense(Parts):
    """`ΔW` itself: LyCORIS' full and norm updates."""

    diff: Tensor

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return _shaped(self.diff.to(dtype), shape)


@dataclass(frozen=True)
class Shift(Parts):
    """Shifts of the singular values (SVDiff): no update by itself, it needs the base weight."""

    shift: Tensor
    norms: str = "elementwise"
    base_hash: Any = None


@dataclass(frozen=True)
class Change:
    """What a file changes in one module, at strength 1."""

    weight: LowRank | Hadamard | Kronecker | Dense | Shift | None
    bias: Tensor | None = None  # added to the bias, [out]
    magnitude: Tensor | None = None  # DoRA: [out], or [in] as `axis` says
    axis: Literal["out", "in"] = "out"  # which norms of W + ΔW the magnitude replaces
    rows: tuple[int, int, int] | None = None  # the module has rows [first, last) of so many
    keys: tuple[str, ...] = ()  # of the file

    @property
    def kind(self) -> str:
        names = {
            LowRank: "lora",
            Hadamard: "loha",
            Kronecker: "lokr",
            Dense: "full",
            Shift: "svdiff",
        }
        name = "bias" if self.weight is None else names[type(self.weight)]
        return name if self.magnitude is None else f"{name} (dora)"

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW in the shape of the module's weight, without the magnitude. Raises FormatError."""
        if self.weight is None:
            return torch.zeros(shape, dtype=dtype)
        if isinstance(self.weight, Shift):
            raise FormatError("spectral shifts have no update without the base weight")
        if self.rows is None:
            return self.weight.delta(shape, dtype)
        first, last, total = self.rows
        if shape[0] != last - first:
            raise FormatError(f"expected {last - first} rows, got {list(shape)}")
        return self.weight.delta((total, *shape[1:]), dtype)[first:last]

    def changed(self, weight: Tensor, strength: float | Tensor = 1.0) -> Tensor:
        """W' of a weight, computed in its dtype: `V = W + strength ΔW`, with a magnitude
        `V · magnitude / ‖V‖`. The norm carries no gradient (DoRA's section 4.3), and a strength of
        exactly zero means no change. Raises FormatError where the shapes do not fit."""
        whole = weight
        if self.weight is not None:
            update = self.delta(tuple(weight.shape), weight.dtype)
            whole = weight + strength * update.to(weight.device)
        return whole if self.magnitude is None else whole * self._rescaling(whole, strength)

    def _rescaling(self, whole: Tensor, strength: float | Tensor) -> Tensor:
        """`magnitude / ‖V‖`, [out, 1, ...] or [1, in, 1, ...]; ones at strength zero."""
        assert self.magnitude is not None
        length = norms(whole.detach(), self.axis)
        if self.magnitude.numel() != length.numel():
            got = [*self.magnitude.shape]
            raise FormatError(f"expected a magnitude of {length.numel()}, got {got}")
        ratio = self.magnitude.to(whole).view(length.shape) / length
        # No `if`: a strength that is a tensor may be on a GPU, or a traced one.
        return torch.where(torch.as_tensor(strength == 0, device=whole.device), 1.0, ratio)


@dataclass(frozen=True)
class AdapterFile:
    """A whole file."""

    format: str  # "fastlora", "peft", "diffusers", "kohya", "lycoris"
    changes: dict[Target, Change]
    unused: dict[str, str] = field(default_factory=dict)  # keys that mean nothing here, and why
    metadata: Mapping[str, str] = field(default_factory=dict)


class Packed(NamedTuple):
    """What a writer makes of changes: a safetensors file, and for PEFT adapter_config.json."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None = None


def norms(weight: Tensor, axis: Literal["out", "in"]) -> Tensor:
    """DoRA's norms, [out, 1, ...] or [1, in, 1, ...]: over all dimensions but one."""
    kept = 0 if axis == "out" else 1
    others = [d for d in range(weight.dim()) if d != kept]
    return (
        weight.square().sum(others, keepdim=True).sqrt().clamp_min(torch.finfo(weight.dtype).tiny)
    )


def _factor(a: Tensor | None, b: Tensor | None, core: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert a is not None and b is not None
    if core is None:
        return a.to(dtype) @ b.to(dtype)
    return torch.einsum("ij...,ip,jr->pr...", core.to(dtype), a.to(dtype), b.to(dtype))


def _shaped(update: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A matrix [out, everything else] may stand for a convolution's weight, and the reverse."""
    if update.numel() != math.prod(shape) or update.shape[:1] != shape[:1]:
        raise FormatError(f"expected an update of {list(shape)}, got {list(update.shape)}")
    return update.reshape(shape)
