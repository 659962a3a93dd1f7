"""A layer whose weight is changed before use: when W' is made, how long it is kept, when it is made
again."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.adapters.deltas import Update, updated_bias, updated_weight, updates_of
from fastlora.adapters.spectral import Shift, shift_of, shifted_weight, step_weight
from fastlora.adapters.state import in_graph, interposed
from fastlora.adapters.tensors import full_precision

Maker = Callable[[], Tensor]


class Recipe(NamedTuple):
    """What W' and b' are made of: spectral shifts first, then updates."""

    shift: Shift | None
    updates: tuple[Update, ...]

    @property
    def weight_updates(self) -> tuple[Update, ...]:
        """Those that do not change the bias alone."""
        return tuple(update for update in self.updates if update.changes_weight)

    def tensors(self) -> list[Tensor]:
        shift = [] if self.shift is None else list(self.shift)
        return shift + [t for update in self.updates for t in update.tensors()]

    def detached(self) -> "Recipe":
        shift = None if self.shift is None else Shift(*(t.detach() for t in self.shift))
        return Recipe(shift, tuple(update.detached() for update in self.updates))


def recipe_of(layer: Any, active: Iterable[tuple[str, Any]]) -> Recipe | None:
    """What the active slots change a layer's weight and bias by; None: low-rank parts alone."""
    shift, updates = shift_of(layer, active), updates_of(layer, active)
    return Recipe(shift, updates) if shift is not None or updates else None


def changed_weight(layer: Any, recipe: Recipe) -> Tensor:
    """W', made now: computed in at least float32 and rounded once to the weight's dtype."""
    weight, updates = layer.weight, recipe.weight_updates
    with full_precision(weight.device):
        if not updates:
            return weight if recipe.shift is None else shifted_weight(layer, recipe.shift)
        wide = torch.promote_types(weight.dtype, torch.float32)
        if recipe.shift is None:
            start = weight.to(wide)
        else:
            start = shifted_weight(layer, recipe.shift, wide)
        return layer.upright(updated_weight(layer.upright(start), updates)).to(weight.dtype)


def changed_bias(layer: Any, recipe: Recipe) -> Tensor | None:
    """b', in b's dtype, or the weight's where the layer has none."""
    if not recipe.updates:
        return layer.bias_or_none()
    with full_precision(layer.weight.device):
        return updated_bias(layer.bias_or_none(), layer.weight.dtype, recipe.updates)


@contextmanager
def weight_under(layer: Any, recipe: Recipe) -> Iterator[Tensor]:
    """W' for the layer's forward pass, which is to run inside.

    Without gradients it may be one that is kept: for an optimiser's step (`materialize`, spectral
    shifts alone), in a `steady` block, on the CPU while nothing changes. With gradients autograd
    keeps a note of how it was made instead of itself, and it is made again in the backward pass.
    """
    arena, shift, updates = layer._state.arena, recipe.shift, recipe.weight_updates
    eager, grad = not in_graph() and not interposed(), torch.is_grad_enabled()
    make = functools.partial(changed_weight, layer, recipe)
    stepped = arena.materialize == "step" and not arena.learned and not layer.is_norm()
    if shift is None and not updates:
        yield layer.weight
    elif eager and stepped and shift is not None and not updates:
        yield step_weight(layer, shift)
    elif not grad:
        if eager and arena.steady[False]:
            yield layer.kept("weight", make, arena.stamp(layer.weight.device))
        else:
            yield layer.cached("weight", recipe.tensors(), make)
    elif layer.is_norm() or interposed():
        yield make()
    else:
        cast = autocast_dtype(layer)
        weight = make() if cast is None else make().to(cast)
        with made_again(weight, layer, recipe):
            yield weight


class Again(NamedTuple):
    """In place of a tensor that autograd would save: how to make it."""

    make: Maker
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def made_again(weight: Tensor, layer: Any, recipe: Recipe) -> Iterator[None]:
    """Within it autograd saves no view of `weight`, W', but what it takes to make it again."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009 (not in its type stub)
    if not autograd._saved_tensors_hooks_is_enabled():
        yield
        return
    outer = autograd._top_saved_tensors_default_hooks(False)  # checkpointing's, perhaps
    start, dtype = weight.untyped_storage().data_ptr(), weight.dtype
    base, recipe = as_it_is(layer), recipe.detached()
    sources = [base.weight, *recipe.tensors()]
    versions = [t._version for t in sources]

    @torch.no_grad()
    def make() -> Tensor:
        for source, version in zip(sources, versions, strict=True):
            require_same(source, version)
        return changed_weight(base, recipe).to(dtype)

    def pack(saved: Tensor) -> Any:
        if saved.numel() and saved.untyped_storage().data_ptr() == start:
            return Again(make, saved.size(), saved.stride(), int(saved.storage_offset()))
        # Torch compares no versions where there are hooks.
        return outer[0](saved) if outer else (saved, saved._version)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Again):
            return packed.make().as_strided(packed.size, packed.stride, packed.offset)
        if outer:
            return outer[1](packed)
        require_same(*packed)
        return packed[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def as_it_is(layer: Any) -> Any:
    """What `changed_weight` asks of a layer, as of now: until the backward pass adapters may be
    removed, and a weight that was exchanged (`functional_call`) be put back."""
    factors, matrix = layer.fastlora, layer.matrix().detach()
    found = SimpleNamespace(svd_u=factors.svd_u, svd_s=factors.svd_s, svd_vh=factors.svd_vh)
    return SimpleNamespace(
        weight=layer.weight.detach(),
        matrix=lambda: matrix,
        from_matrix=layer.from_matrix,
        upright=layer.upright,
        is_norm=lambda: False,
        fastlora=found,
    )


def require_same(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {tensor.dtype} {list(tensor.shape)} is at version {tensor._version}; "
            f"expected version {version} instead"
        )


def autocast_dtype(layer: Any) -> torch.dtype | None:
    """What autocast will compute with, which would be a copy of W' that autograd keeps."""
    device, weight, active = layer.weight.device.type, layer.weight, layer._state.active
    products = isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
    if not products or weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    if any(getattr(slot.spec, "dora", False) for _, slot in active):
        return None  # its norms are those of W' in full
    return torch.get_autocast_dtype(device)
