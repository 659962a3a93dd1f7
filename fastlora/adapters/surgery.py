"""What adapters change in a model beside their own parameters, and how it is put back."""

import itertools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastlora.adapters.adapted import Adapted, adapted_class, base_class
from fastlora.adapters.arena import Arena, Scale
from fastlora.adapters.lookup import (
    HOST,
    WALK,
    adapted_layers,
    arenas,
    base_modules,
    layers_of,
)
from fastlora.adapters.slots import Slots
from fastlora.adapters.specs import AdapterError
from fastlora.adapters.state import LayerState

log = logging.getLogger("fastlora")

FROZEN = "_fastlora_frozen"  # on a module: names of its parameters that injecting froze
FUSED = "_fastlora_fused"  # on a TransformerEncoder(Layer): what the attribute in charge was


def adapt(module: nn.Module, path: str, arena: Arena) -> Adapted:
    if not isinstance(module, Adapted):
        adapted = adapted_class(type(module))
        assert adapted is not None
        module.__class__ = adapted
        module.__dict__["_state"] = LayerState(arena, path)
        module._modules["fastlora"] = Slots().train(module.training)
        arena.join(module)
    assert isinstance(module, Adapted)
    return module


def restore(layer: Adapted) -> None:
    """The plain layer again."""
    del layer._modules["fastlora"]
    del layer.__dict__["_state"]
    layer.__class__ = base_class(type(layer))  # type: ignore[reportAttributeAccessIssue]


def remove_all(model: nn.Module) -> None:
    """The plain model again."""
    found = arenas(model)
    for layer in layers_of(model):
        if not layer.foreign:
            restore(layer)
    for arena in found:
        arena.layout()
    tell_neighbours(model)
    unfreeze_base(model)
    forget_walks(model)


def freeze_base(model: nn.Module) -> None:
    """Stops gradients of all that is not an adapter's; each module remembers which it had."""
    count = 0
    for _, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
                module.__dict__[FROZEN] = (*vars(module).get(FROZEN, ()), name)
                count += 1
    if count:
        log.info("inject froze %d base parameters; remove gives them back", count)


def thaw(model: nn.Module, found: list[Arena]) -> None:
    """Gives back what was frozen, where nobody asks for a frozen base any more."""
    if not layers_of(model) or not any(a.froze or a.reserve_froze for a in found):
        unfreeze_base(model)


def unfreeze_base(model: nn.Module) -> None:
    for _, module in base_modules(model):
        for name in vars(module).pop(FROZEN, ()):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(True)


def forget_walks(model: nn.Module) -> None:
    """Parts of a model that somebody has asked about keep what was found."""
    for _, module in base_modules(model):
        vars(module).pop(WALK, None)


def check_mergeable(found: list[Arena], new: Mapping[str, Scale]) -> None:
    """Raises AdapterError where parts of a model disagree about an adapter that they share, or they
    and the strengths in `new` about the batch size of strengths per sample."""
    for arena, other in itertools.combinations(found, 2):
        for name in set(arena.scales) & set(other.scales):
            a, b = arena.scales[name], other.scales[name]
            if arena.enabled[name] != other.enabled[name] or not torch.equal(
                *map(torch.as_tensor, (a, b))
            ):
                raise AdapterError(
                    f"parts of the model have different strengths of {name!r}: {a} and {b}; "
                    "set_scale and enable make them equal"
                )
    merged: dict[str, Any] = {}
    for arena in found:
        merged |= arena.scales
    Arena().check({**merged, **new})


def merge(found: list[Arena]) -> Arena:
    """One arena for a model whose parts were adapted separately before."""
    first = found[0]
    for other in found[1:]:
        first.scales |= other.scales
        first.enabled |= other.enabled
        first.froze |= other.froze
        first.reserve_froze |= other.reserve_froze
        first.folded |= other.folded
        for layer in other.layers():
            layer._state.arena = first
            first.join(layer)
    return first


def tell_neighbours(model: nn.Module) -> None:
    """Who has to know that layers have been adapted, or are plain again.

    The inference path of nn.TransformerEncoderLayer reads the weights of its layers and never calls
    them: where layers are adapted it is switched off, and on again where none is left. Hosts
    compute in the place of their base layer, as that would.
    """
    for _, module in base_modules(model):
        if HOST in module.__dict__:
            module.follow_base()  # type: ignore[reportCallIssue]
        if isinstance(module, nn.TransformerEncoderLayer):
            switch = "activation_relu_or_gelu"
        elif isinstance(module, nn.TransformerEncoder):
            switch = "use_nested_tensor"
        else:
            continue
        own = vars(module)
        if adapted_layers(module):
            own.setdefault(FUSED, own[switch])
            own[switch] = 0
        elif FUSED in own:
            own[switch] = own.pop(FUSED)
