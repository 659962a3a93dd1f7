"""`fold` writes the adapters into weights of their own; the pristine ones stay where they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted, adapted_class, base_class
from fastlora.adapters.arena import Arena, Scale
from fastlora.adapters.components import Models, as_one
from fastlora.adapters.folded_weight import fold_layers
from fastlora.adapters.lookup import adapted_layers, arenas, layers_of, unwrapped, walked
from fastlora.adapters.specs import AdapterError
from fastlora.adapters.surgery import remove_all
from fastlora.adapters.tensors import is_plain


def fold(model: Models, permanent: bool = False) -> None:
    """`W' = W + U diag(g) D` (or its spectral form) for every adapted layer, in one grouped call,
    of all components that have adapters.

    The folded weights are buffers beside the pristine ones (one more copy of the adapted weights in
    memory), which `.weight` and `state_dict()` go on showing; `unfold` is therefore exact. Changing
    a scale of a folded model folds it again into the same buffers, and so does `load_state_dict`;
    after other changes of parameters (training) fold again. While a model is folded no gradient
    reaches its adapters: unfold it to train. `permanent=True` writes into `.weight` instead and
    removes the adapters. A bias that adapters change is folded likewise.

    Raises AdapterError where a strength differs per sample, a layer has no plain weight, or
    (permanent) what would be written is shared with another layer, or is the bias of a layer that
    has none: give it one of zeros first, which changes the keys of its state dict. The model is
    unchanged then.
    """
    # A layer with nothing but a reserve is the plain one.
    one = as_one(model, "fold")
    layers = {path: layer for path, layer in adapted_layers(one).items() if len(layer.fastlora)}
    if not layers:
        raise AdapterError("fold: the model has no adapters")
    for path, layer in layers.items():
        check_plain(path, layer)
    check_strengths(layers.values())
    if permanent:
        check_biases(layers)
        check_unshared(one, layers)
    fold_layers(layers.values())
    if permanent:
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.copy_(layer.folded())
                bias, folded = layer.bias_or_none(), layer.folded_bias()
                if bias is not None and folded is not None and changes_bias(layer):
                    bias.copy_(folded)
        unfold(one)
        remove_all(unwrapped(one))


def unfold(model: Models) -> None:
    """Back to pristine weights plus adapters. The buffers stay for the next fold."""
    one = as_one(model, "unfold")
    for layer in layers_of(one):
        layer._state.merged = layer._state.stale = False
        layer._state.forget()
    for arena in arenas(one):
        arena.folded = any(layer._state.merged for layer in arena.layers())


def is_folded(model: nn.Module) -> bool:
    return any(layer._state.merged for layer in layers_of(model))


def folded_by(found: Iterable[Arena]) -> list[Adapted]:
    """The folded layers that take their gates from these arenas."""
    candidates = [layer for arena in found if arena.folded for layer in arena.layers()]
    return [layer for layer in candidates if layer._state.merged]


@contextmanager
def refolding(model: nn.Module) -> Iterator[None]:
    """Adapters that come or go inside show up in folded weights, which are folded again after."""
    folded = is_folded(model)
    yield
    found = walked(model)
    layers = [layer for layer in found.layers if len(layer.fastlora)] if folded else []
    again = {id(m): m for m in (*folded_by(found.arenas), *layers)}
    fold_layers(again.values())


def check_plain(path: str, layer: nn.Module) -> None:
    """Raises AdapterError for a layer, adapted or about to be, that has no plain weight."""
    kind = type(layer) if isinstance(layer, Adapted) else adapted_class(type(layer))
    assert kind is not None
    if kind.beside or not is_plain(layer._parameters.get("weight")):
        base = type(layer.base_module) if kind.foreign else base_class(kind)
        raise AdapterError(
            f"fold: {path}: a {base.__name__} computes with its weight in a way of its "
            "own; only plain Linear, Conv2d, Embedding and norms can be folded. Leave a quantised "
            "model unfolded, or fold(model, permanent=True) before quantising"
        )


def check_strengths(
    layers: Iterable[Adapted],
    scales: Mapping[str, Scale] | None = None,
    enabled: Mapping[str, bool] | None = None,
) -> None:
    """Raises AdapterError where a strength would differ per sample after such a change."""
    for layer in layers:
        arena = layer._state.arena
        new, on = {**arena.scales, **(scales or {})}, {**arena.enabled, **(enabled or {})}
        rows = [n for n in layer.fastlora if on[n] and isinstance(new[n], Tensor)]
        if rows:
            raise differs_per_sample(rows[0])


def differs_per_sample(name: str) -> AdapterError:
    return AdapterError(
        f"fold: the strength of {name!r} differs per sample, which no single weight can follow; "
        "unfold the model, or set a number"
    )


def changes_bias(layer: Adapted) -> bool:
    return any("bias" in slot.owned for slot in layer.fastlora.values())


def check_biases(layers: Mapping[str, Adapted]) -> None:
    """Raises AdapterError where an adapter that is on would bring a bias."""
    for path, layer in layers.items():
        adding = [n for n, s in layer.fastlora.items() if "bias" in s.owned]
        adding = [name for name in adding if not layer._state.arena.off(name)]
        if adding and layer.bias_or_none() is None:
            raise AdapterError(
                f"fold: {path}: {adding[0]!r} adds a bias, and the layer has none to write it "
                "into; give it one first: layer.bias = torch.nn.Parameter(torch.zeros(...))"
            )


def check_unshared(model: nn.Module, layers: Mapping[str, Adapted]) -> None:
    owners: dict[int, list[str]] = {}
    for path, module in unwrapped(model).named_modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    for path, layer in layers.items():
        bias = layer.bias_or_none() if changes_bias(layer) else None
        for parameter in (layer.weight, *(() if bias is None else (bias,))):
            same = owners[id(parameter)]
            if len(same) > 1:
                raise AdapterError(
                    f"fold: {path}: {' and '.join(same)} are one parameter; folding for good would "
                    "change both. Give the layer one of its own first"
                )
