"""Which layers of a model are meant, and whether they can be adapted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fastlora.adapters.adapted import Adapted, adapted_class, base_class
from fastlora.adapters.deltas import Delta
from fastlora.adapters.hooked import is_bypassed
from fastlora.adapters.layers import LinearForward
from fastlora.adapters.lookup import (
    base_modules,
    modules_by_path,
)
from fastlora.adapters.specs import AdapterError, LoRA, Spectral
from fastlora.adapters.tensors import COMPUTED, is_plain

Where = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
PLAIN = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class NoLayer(AdapterError):
    """Nothing is selected, which is no error where another model of several has what is meant."""


def select(
    model: nn.Module,
    spec: LoRA | Spectral,
    where: Where,
    what: str = "inject",
    meta: bool = False,
) -> dict[str, nn.Module]:
    """The layers that `where` names, each of which `spec` can adapt; `what` is for messages. With
    `meta` they need no values."""
    matches = matcher(where, what)
    base = {id(module) for _, module in base_modules(model)}
    chosen: dict[str, nn.Module] = {}
    refused: list[str] = []
    taken: set[int] = set()
    for path, module in modules_by_path(model).items():
        if id(module) not in base or not matches(path, module):
            continue
        reason = unsuitable(module, spec)
        if reason is None:
            if id(module) not in taken:
                chosen[path] = module
            taken.add(id(module))
        elif reason and is_layer(module):
            refused.append(f"{path} ({type(module).__name__}): {reason}")
    if refused and where is not None:
        raise AdapterError(
            f"{what}: where selects layers that cannot be adapted: " + "; ".join(refused)
        )
    if not chosen:
        candidates = [p for p, m in base_modules(model) if unsuitable(m, spec) is None][:5]
        raise NoLayer(
            f"{what}: where: {where!r} matches no layer that {type(spec).__name__} can adapt; "
            f"this model has for example {candidates}" + "".join(f"; {r}" for r in refused[:1])
        )
    empty = [p for p, m in chosen.items() if any(q.is_meta for q in m.parameters(recurse=False))]
    if empty and not meta:
        raise AdapterError(
            f"{what}: {empty[0]}: the model is on the meta device and has no weights to adapt; "
            "load it first (model.to_empty and load_state_dict)"
        )
    return chosen


def select_each(
    parts: Mapping[str, nn.Module], spec: LoRA | Spectral, where: Where, what: str
) -> dict[str, dict[str, nn.Module]]:
    """`select` in each of several models, by component; those in which `where` matches nothing are
    left out. Raises AdapterError, as `select`, if it matches nothing in any."""
    chosen: dict[str, dict[str, nn.Module]] = {}
    nothing: list[NoLayer] = []
    for component, part in parts.items():
        named = f"{what}: {component}" if component else what
        try:
            chosen[component] = select(part, spec, where, named)
        except NoLayer as error:
            nothing.append(error)
    if not chosen:
        raise nothing[0]
    return chosen


def check_paths(spec: LoRA | Spectral, chosen: Iterable[str], what: str) -> None:
    """Raises AdapterError where a LoRA has settings for layers that are not adapted."""
    if isinstance(spec, LoRA):
        strangers = sorted({*(spec.ranks or ()), *(spec.alphas or ())} - set(chosen))
        if strangers:
            raise AdapterError(
                f"{what}: ranks, alphas: expected paths of adapted layers, got {strangers[:5]}"
            )


def is_layer(module: nn.Module) -> bool:
    """Not a container, and not an activation or a dropout: somebody may have meant to adapt it."""
    leaf = isinstance(module, Adapted) or not any(module.children())
    return leaf and any(t is not None for t in (*module._parameters.values(), *module.buffers()))


def matcher(where: Where, what: str) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda path, module: True
    if isinstance(where, str):
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise AdapterError(f"{what}: where: {where!r} is not a regex: {error}") from None
        return lambda path, module: pattern.fullmatch(path) is not None
    if callable(where):
        return where
    if not isinstance(where, Iterable):
        raise AdapterError(
            f"{what}: where: expected a regex, suffixes, a predicate or None, got {where!r}"
        )
    suffixes = list(where)
    return lambda path, module: any(path == s or path.endswith("." + s) for s in suffixes)


def unsuitable(module: nn.Module, spec: LoRA | Spectral | Delta) -> str | None:
    """None if `spec` can adapt the module, else why not; empty if nobody needs to be told."""
    base = base_class(type(module)) if isinstance(module, Adapted) else type(module)
    if issubclass(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention reads this layer's weight and never calls it"
    kind = adapted_class(base)
    if kind is None:
        if is_peft(module):
            return (
                f"it is PEFT's ({base.__module__}); first fastlora.accelerate(model), after which "
                "its base layer can be adapted, or model.unload()"
            )
        if issubclass(base, nn.Linear):
            return (
                f"this kind of layer is not supported: {base.__module__} made it of classes that "
                "cannot be exchanged; quantise with torchao or bitsandbytes instead"
            )
        return "this kind of layer is not supported"
    if is_bypassed(module):
        return (
            "its forward was put on the object itself and goes past its class, so past adapters; "
            "undo that first"
        )
    if any(is_lazy(p) for p in module._parameters.values() if p is not None):
        return "its weight has no shape yet; run the model once first"
    if base in NORMS:
        if isinstance(spec, LoRA):
            return "LoRA needs a matrix"
        if isinstance(spec, Delta):
            return None if module.weight is not None else "it has no weight"
        return None if spec.norms != "skip" and module.weight is not None else ""
    weight: Any = module.weight
    if not weight.numel():
        return "its weight is empty"
    if weight.is_complex():
        return "its weight is complex"
    if base in PLAIN and weight.is_floating_point() and weight.dtype not in COMPUTED:
        return (
            f"its weight is {weight.dtype}, in which no layer computes: what converts it at every "
            "call (layerwise casting) would round the adapter to it; quantise the model instead "
            "(torchao, bitsandbytes), or load it in 16 bits"
        )
    if isinstance(spec, LoRA) and issubclass(base, nn.ConvTranspose2d):
        return "LoRA of transposed convolutions is not supported; spectral shifts of them are"
    # Who needs the whole weight, not just its product.
    needs = "spectral shifts need" if isinstance(spec, Spectral) else "differences of a weight need"
    if isinstance(spec, LoRA):
        needs = "DoRA needs" if spec.dora else ""
    whole = base in PLAIN or issubclass(kind, LinearForward)
    if needs and (not whole or not is_plain(module._parameters.get("weight"))):
        return (
            f"{needs} the plain weight of a Linear, Conv2d, ConvTranspose2d or Embedding; beside a "
            "quantised one goes LoRA, or fold(model, permanent=True) before quantising"
        )
    if needs and getattr(module, "sparse", False):
        return f"{needs} dense gradients, and the embedding's are sparse"
    rows = needs and not isinstance(spec, Spectral)
    if rows and getattr(module, "max_norm", None) is not None:
        return f"{needs} rows that do not change, and max_norm changes them at every look-up"
    return None


def is_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"
