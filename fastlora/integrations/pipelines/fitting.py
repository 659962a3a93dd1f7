"""Which module each change of a file is for, and whether a LoRA of PEFT can be it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastlora.adapters.fitting import oriented, require_shape, reshaped
from fastlora.adapters.loading import problems_of
from fastlora.adapters.planning import Plan, apart, located, unambiguous
from fastlora.adapters.slots import shapes_lora
from fastlora.adapters.specs import AdapterError, LoRA
from fastlora.formats.changes import AdapterFile, Change, LowRank, Target
from fastlora.formats.files import FormatError
from fastlora.formats.peft_writing import layers_of


class Unfit(AdapterError):
    """A file, or a part of it, that PEFT's layers beside a model cannot take."""

    nothing_fits = False  # its names are those of another model, or of another format


def fitted(
    models: Mapping[str, nn.Module], file: AdapterFile, source: str, way_on: str
) -> dict[Target, Change]:
    """All changes by component and path in the models, in the shapes that PEFT's layers have.

    Raises Unfit that says what does not fit. `way_on`: a call of fastlora.load without its end,
    which does take what is no LoRA of PEFT.
    """
    plan = Plan(file)
    modules = {c: dict(m.named_modules(remove_duplicate=False)) for c, m in models.items()}
    places = dict(located(plan, models, modules, file.changes))
    found: dict[Target, Change] = {}
    seen: set[int] = set()  # modules that were one in the file have factors in common
    foreign = False
    for target, place in unambiguous(plan, places, file.changes):
        change = apart(file.changes[target], seen)
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
        return found
    lines = [f"{source}: {len(plan.unused)} keys of this {file.format} file do not fit"]
    lines += problems_of(file, plan)
    if foreign:
        lines.append(f"{way_on}) loads it")
    elif found:
        lines.append(f"{way_on}, strict=False) loads the {len(found)} modules that do fit")
    error = Unfit("\n".join(lines))
    error.nothing_fits = not found and not foreign
    raise error


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
