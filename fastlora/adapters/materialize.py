"""How long training keeps the weights under spectral shifts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastlora.adapters.components import Models, as_one
from fastlora.adapters.lookup import arenas
from fastlora.adapters.specs import AdapterError


@contextmanager
def materialize(model: Models, when: Literal["forward", "step"] = "forward") -> Iterator[Any]:
    """How the weights `W'` under spectral shifts are made where gradients are recorded.

    "forward", which also is what happens outside of such a block: in each layer when it is called.
    W' is not saved for the backward pass but made again there, so that at any time there is one
    layer's. Linear layers with few tokens make no W' at all (`ops.spectral_linear`) where that
    takes fewer multiplications. Memory beside the activations is that of the weights and their
    factors U and V, in the weights' dtype.

    "step": all layers' W' together in one call (`ops.spectral_weights`), kept until the shifts, a
    strength or a weight change, which an optimiser's step does: one more copy of the adapted
    weights, in their dtype, for W' made once a step instead of twice a pass. Worth it where the
    memory is there, the more so with several passes a step. Changes are seen by version counters,
    which writing through `.data` does not raise; an optimiser's step in the block raises those of
    its parameters.

    Both compute the same: a layer has the same bits in either unless it is a linear layer with few
    tokens. Blocks nest, the innermost one counts; what "step" keeps is freed at its end.
    What is compiled or captured in a CUDA graph makes W' at every call, and so do norms, layers
    with updates of other kinds (loha, full, ...) beside the shifts, and layers whose strengths
    require a gradient. Raises AdapterError for another `when`.
    """
    if when not in ("forward", "step"):
        raise AdapterError(f"materialize: expected 'forward' or 'step', got {when!r}")
    before = [(arena, arena.materialize) for arena in arenas(as_one(model, "materialize"))]
    if not before:
        raise AdapterError("materialize: the model has no adapters; inject them first")
    watch = register_optimizer_step_post_hook(_raise_versions) if when == "step" else None
    try:
        for arena, _ in before:
            arena.materialize = when
        yield model
    finally:
        if watch is not None:
            watch.remove()
        for arena, setting in before:
            arena.materialize = setting
            if setting != "step":
                for layer in arena.layers():
                    layer._state.step = None


def _raise_versions(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """torch's fused optimisers, and those of other libraries' kernels, write without doing so."""
    trained = (p for group in optimizer.param_groups for p in group["params"])
    increment_version([p for p in trained if p.grad is not None])
