"""`accelerate_layers` and `restore_layers`: PEFT's layers of a model, fused and back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft.tuners.lora import layer as lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from fastlora.adapters.arena import Arena
from fastlora.adapters.hooked import rebind
from fastlora.adapters.lookup import HOST, arenas, unwrapped
from fastlora.adapters.specs import AdapterError
from fastlora.adapters.surgery import check_mergeable, forget_walks, merge
from fastlora.integrations.peft.hosts import host_class
from fastlora.integrations.peft.layers import PRISTINE, FastLayer, fast_class, owned

LINEAR = ("Linear", "Linear8bitLt", "Linear4bit", "TorchaoLoraLinear")
MARK = "_fastlora_accelerated"  # on a model whose layers are accelerated, also those to come


def accelerate_layers(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Makes PEFT's LoRA layers of a model compute fused: the same objects, under another class.

    All that PEFT and others read and do on them stays (adapters, scalings, merging, deleting,
    saving), and unmerging becomes exact. Layers that PEFT puts into the model later are accelerated
    too. Other types of adapters, and layers of PEFT's for which there is no fused way, are left as
    they are and named. Raises AdapterError, and changes nothing, where parts of the model that were
    accelerated before have different strengths of one adapter.
    """
    model = unwrapped(model)
    left, new = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, FastLayer) or not isinstance(module, BaseTunerLayer):
            continue
        try:
            new[path] = module, host_of(module)
        except AdapterError as error:
            left[path] = str(error)
    found = arenas(model)
    check_mergeable(found, {})
    vars(model)[MARK] = True
    if not new:
        return [], left
    arena = merge(found) if found else Arena()
    for path, (layer, make) in new.items():
        vars(layer)[HOST] = make(layer.base_layer, arena, path)
        vars(layer)["scaling"] = owned(layer.scaling, layer)
        before = type(layer).forward
        layer.__class__ = fast_class(type(layer))
        rebind(layer, before)
        layer.synchronise()
    arena.layout()
    return list(new), left


def host_of(layer: Any) -> Callable[..., Any]:
    """The class of a layer's host. Raises AdapterError for a layer that stays as it is."""
    cls = type(layer)
    if not isinstance(layer, LoraLayer):
        raise AdapterError(f"a {cls.__module__.rpartition('.')[0].rpartition('.')[2]} adapter")
    own = cls.__module__.startswith("peft.")  # others may compute in other ways under these names
    if not (own and cls.__name__ in LINEAR) and cls not in (lora.Conv2d, lora.Embedding):
        raise AdapterError(f"{cls.__module__}.{cls.__name__} has no fused form")
    return host_class(layer.base_layer, layer)


def restore_layers(model: nn.Module) -> list[str]:
    """PEFT's layers as they were, the same objects, with what PEFT has done to them since; their
    paths.

    Adapters that are merged stay merged, and are unmerged as PEFT does it.
    """
    whole, model = model, unwrapped(model)
    paths, found = [], arenas(model)
    for path, module in model.named_modules():
        vars(module).pop(MARK, None)
        if isinstance(module, FastLayer):
            before = type(module).forward
            module.__class__ = type(module).__mro__[2]
            rebind(module, before)
            own = vars(module)
            own["scaling"] = dict(own["scaling"])
            for name in (HOST, PRISTINE, "_fastlora_plan"):
                own.pop(name, None)
            paths.append(path)
    for arena in found:
        arena.layout()
    forget_walks(whole)  # which would keep the hosts
    return paths


def is_accelerated(model: nn.Module) -> bool:
    """Whether PEFT's layers that come into the model are to be accelerated."""
    return any(MARK in vars(module) or isinstance(module, FastLayer) for module in model.modules())


def install() -> None:
    """Makes PEFT's one way to put adapters into a model accelerate them in models that are."""
    inject = BaseTuner.inject_adapter
    if hasattr(inject, MARK):
        return

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        inject(self, model, *args, **kwargs)
        if is_accelerated(model):
            accelerate_layers(model)

    setattr(inject_adapter, MARK, True)
    BaseTuner.inject_adapter = inject_adapter
