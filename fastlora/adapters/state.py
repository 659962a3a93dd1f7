"""What an adapted layer remembers between calls, and whether a call becomes a graph."""

from typing import Any

import torch
from torch.autograd import forward_ad

from fastlora.adapters.arena import Arena
from fastlora.adapters.slots import Packed

_is_compiling = torch.compiler.is_compiling
_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 (not in its type stub)
is_capturing = (
    torch.cuda.is_current_stream_capturing if torch.backends.cuda.is_built() else lambda: False
)


def in_graph() -> bool:
    """Whether what runs now becomes a graph that is run again: compiled, or a CUDA graph. It has to
    follow strengths that change afterwards, so that adapters which are off now are computed too."""
    return _is_compiling() or is_capturing()


def interposed() -> bool:
    """Whether functorch or forward-mode differentiation looks on, which see formulas alone."""
    return _functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


class LayerState:
    """What an adapted layer caches; rebuilt when the arena's epoch moves on."""

    __slots__ = (
        "arena", "path", "offset", "offsets", "width", "parts", "outside", "rows", "merged",
        "stale", "epoch", "fast", "active", "packed", "cache", "kept", "step",
    )  # fmt: skip

    def __init__(self, arena: Arena, path: str) -> None:
        self.arena, self.path = arena, path
        self.offset = 0  # of the layer's gates in the arena
        self.offsets: dict[str, int] = {}  # of each adapter's, from there
        self.width = 0  # of all of them
        # Those of the arena's values by device: what a compiled graph reads. An offset would be a
        # number in it, other in every block of a model, and so one graph for each.
        self.parts: dict[torch.device, torch.Tensor] = {}
        self.outside: tuple[tuple[str, Any], ...] = ()  # the slots that are not in the reserve
        self.rows = False  # a strength in the reserve is per sample
        self.merged = False  # the folded weight is in use
        self.stale = False  # and has to be written again first
        self.forget()

    def forget(self) -> None:
        self.epoch = -1
        self.fast: Any = None  # (parameters of the only slot, gate): the shortest way through
        self.active: tuple[tuple[str, Any], ...] = ()
        self.packed: Packed | None = None  # the active ones of them as one LoRA
        self.forget_weights()

    def forget_weights(self) -> None:
        self.cache: dict[str, tuple[list[Any], Any]] = {}  # (made from, made)
        # What `steady` keeps: made outside of captures, and in one. Each (made for, made).
        self.kept: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        self.step: Any = None  # (made from, W'), kept for an optimiser's step

    def __getstate__(self) -> Any:
        kept = self.offset, self.offsets, self.width, self.outside
        return self.arena, self.path, *kept, self.rows, self.merged, self.stale

    def __setstate__(self, state: Any) -> None:
        self.arena, self.path, *kept = state
        self.offset, self.offsets, self.width, self.outside, *kept = kept
        self.rows, self.merged, self.stale = kept
        self.parts = {}
        self.forget()
