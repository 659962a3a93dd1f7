"""Which module each change of a file is for, and whether a LoRA of PEFT can be it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastlora.adapters.fitting import oriented, require_shape, reshaped
from fastlora.adapters.loading import problems_of
from fastlora.adapters.planning import Plan, located, unambiguous
from fastlora.adapters.slots import shapes_lora
from fastlora.adapters.specs import AdapterError, LoRA
from fastlora.formats.changes import AdapterFile, Change, LowRank, Target
from fastlora.formats.files import FormatError
from fastlora.formats.peft_layers import layers_of

Fitted = tuple[dict[Target, Change] | None, AdapterError | None, bool]


def fitted(models: Mapping[str, nn.Module], file: AdapterFile, source: str, way_on: str) -> Fitted:
    """All changes by component and path in the models, in the shapes that PEFT's layers have.

    Instead of them the AdapterError that says what does not fit, and whether nothing does. `way_on`
    is its last line where something fits the models, but no LoRA of PEFT.
    """
    plan = Plan(file)
    modules = {c: dict(m.named_modules(remove_duplicate=False)) for c, m in models.items()}
    places = dict(located(plan, models, modules, file.changes))
    found: dict[Target, Change] = {}
    foreign = False
    for target, place in unambiguous(plan, places, file.changes):
        change = file.changes[target]
        layer = base_layer(modules[place.component][place.path])
        if place in found:
            plan.refuse(target, change, f"{place}: the file has several names for it")
            continue
        try:
            found[place] = as_lora(layer, place, change)
        except FormatError as error:
            foreign = True
            plan.refuse(target, change, str(error), str(place))
        except AdapterError as error:
            plan.refuse(target, change, str(error), str(place))
    if not plan.unused and found:
        return found, None, False
    lines = [f"{source}: {len(plan.unused)} keys of this {file.format} file do not fit"]
    lines += problems_of(file, plan)
    lines += [way_on] * foreign
    return None, AdapterError("\n".join(lines)), not found and not foreign


def as_lora(layer: nn.Module, place: Target, change: Change) -> Change:
    """The change in the shapes of PEFT's parameters beside the layer.

    Raises FormatError where no LoRA of PEFT is such a change, AdapterError where it does not fit
    the layer.
    """
    if not isinstance(change.weight, LowRank):
        raise FormatError(f"PEFT's LoRA cannot hold it: it is {change.kind}")
    if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
        raise AdapterError(f"a {type(layer).__name__} cannot take a LoRA of PEFT")
    own = layers_of({place: change}, "PEFT's LoRA")[place]
    low = oriented(layer, own.weight)
    weight: Any = layer.weight
    shapes = shapes_lora(layer, weight, LoRA(low.rank, dora=own.magnitude is not None))
    low = replace(low, down=_shaped("down", low.down, shapes), up=_shaped("up", low.up, shapes))
    if own.magnitude is not None:
        require_shape("magnitude", own.magnitude, shapes["magnitude"])
    return replace(change, weight=low, rows=None)


def _shaped(key: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    tensor = reshaped(tensor, shapes[key])
    require_shape(key, tensor, shapes[key])
    return tensor.contiguous()


def base_layer(module: nn.Module) -> nn.Module:
    """The layer inside of PEFT's."""
    get = getattr(module, "get_base_layer", None)
    return module if get is None else get()
