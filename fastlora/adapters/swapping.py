"""`prepare` and `swap`: adapters that are kept ready, and take the place of one another."""

import copy
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.arena import Scale, checked, require_finite, slots_of
from fastlora.adapters.attaching import attach, check_name, check_per_sample, check_room, take_slot
from fastlora.adapters.components import Models, components_of, same
from fastlora.adapters.control import apply
from fastlora.adapters.fitting import placed, require_range
from fastlora.adapters.folding import check_strengths, folded_by, refolding
from fastlora.adapters.inject import remove
from fastlora.adapters.load_report import Applied
from fastlora.adapters.loading import fitted
from fastlora.adapters.lookup import arenas, modules_by_path, walked
from fastlora.adapters.slots import LoRASlot, Slot, in_place
from fastlora.adapters.specs import AdapterError
from fastlora.adapters.surgery import check_mergeable, tell_neighbours

copy_each = getattr(torch, "_foreach_copy_")  # noqa: B009 (not in its type stub)


class Ready(NamedTuple):
    """What waits for one layer."""

    path: str
    layer: weakref.ref[nn.Module]
    slot: Slot  # nobody's: its values are copied


@dataclass(frozen=True)
class Prepared:
    """An adapter file that was read, checked and fitted to the layers of a model or pipeline, on
    their device and in the dtype that they compute in. `swap` copies it; it is never changed."""

    path: str
    format: str
    applied: tuple[Applied, ...]
    unused: Mapping[str, str]  # keys of the file, and why
    parts: Mapping[str, tuple[Ready, ...]]  # by component

    @property
    def bytes(self) -> int:
        """Of the memory that it takes."""
        slots = (ready.slot for part in self.parts.values() for ready in part)
        return sum(p.numel() * p.element_size() for slot in slots for p in slot.parameters())


# What is made under inference mode has to serve training later.
@torch.inference_mode(False)
def prepare(
    model: Models,
    path: str | os.PathLike[str],
    any_base: bool = False,
    strict: bool = True,
) -> Prepared:
    """Reads an adapter file for `swap`; the model stays as it is. Arguments and errors: `load`."""
    models = components_of(model, "prepare")
    file, plan = fitted(models, path, any_base, strict, "prepare")
    parts = {}
    for component, slots in plan.slots.items():
        modules = modules_by_path(models[component])
        for place, slot in slots.items():
            convert(place, modules[place], slot)
        parts[component] = tuple(
            Ready(place, weakref.ref(modules[place]), slot.requires_grad_(False))
            for place, slot in slots.items()
        )
    return Prepared(str(path), file.format, tuple(plan.applied), plan.unused, parts)


def convert(path: str, layer: nn.Module, slot: Slot) -> None:
    """Gives values that are for a reserve its dtype. Raises AdapterError where that cannot hold
    them."""
    if isinstance(layer, Adapted) and layer.fastlora.takes(slot):
        dtype = layer.fastlora.reserved_down.dtype
        for key, parameter in slot._parameters.items():
            if parameter is not None and parameter.dtype != dtype:
                require_range(f"{path}: {key}", parameter, dtype)
                parameter.data = parameter.to(dtype)


@torch.inference_mode(False)
def swap(model: Models, name: str, new: Prepared, scale: float | Tensor | None = None) -> None:
    """Puts `new` in the place of the adapter `name`, or in where there is none of that name.

    It keeps the strength and the switch that `name` has, or gets the strength `scale`; α/r is the
    new file's. Layers, ranks and formats may be other ones. In layers where both are LoRAs of one
    rank in a reserve, values are written into the parameters, which stay the same objects; in the
    others it is `remove` and `load` at once. Within a reserve, compiled and captured graphs follow.

    `model`: what `prepare` was given. A part of a pipeline that the new file has nothing for loses
    `name`, one that had nothing of it gets the strength of the others. Raises AdapterError, and
    changes nothing, for another model, where a reserve has no room, for a strength that `set_scale`
    would refuse, and where such a part would get one of several strengths.
    """
    models = components_of(model, "swap")
    if not isinstance(new, Prepared):
        raise TypeError(f"swap: new: expected what prepare returns, got {type(new).__name__}")
    scale = None if scale is None else checked(name, scale)
    absent = sorted(set(new.parts) - set(models))
    if absent:
        raise AdapterError(f"swap: {new.path} is for {absent[0]!r}, got {sorted(models)}")
    strengths = strengths_of(models, name, set(new.parts), scale)
    exchanges = [
        Exchange(part, name, new.parts.get(component, ()), *strengths[component])
        for component, part in models.items()
    ]
    for exchange in exchanges:
        exchange.run()


def strengths_of(
    models: Mapping[str, nn.Module], name: str, wanted: set[str], scale: Scale | None
) -> dict[str, tuple[Scale, bool]]:
    """The strength and the switch of an adapter after a swap, by component: those that it has, with
    the strength `scale` if there is one, and in components that have nothing of it those of the
    others. Raises AdapterError where these differ, and the component is one of those `wanted`."""
    own: dict[str, tuple[Scale, bool]] = {}
    for component, part in models.items():
        for arena in arenas(part):
            if name in arena.scales:
                kept = arena.scales[name] if scale is None else scale
                own.setdefault(component, (kept, arena.enabled[name]))
    default = next(iter(own.values()), (1.0 if scale is None else scale, True))
    new = sorted(wanted - set(own))
    if new and not all(same(s, default[0]) and on == default[1] for s, on in own.values()):
        raise AdapterError(
            f"swap: {name!r} has different strengths, or is on in some alone, of {sorted(own)}, "
            f"and comes to {new[0]!r} now; give it one first (set_scale, enable)"
        )
    return {component: own.get(component, default) for component in models}


class Exchange:
    """What a swap does to one model: found out, or refused, before anything is changed."""

    def __init__(
        self, model: nn.Module, name: str, ready: tuple[Ready, ...], scale: Scale, on: bool
    ) -> None:
        self.model, self.name, self.scale, self.on = model, name, scale, on
        self.arenas = [arena for arena in arenas(model) if name in arena.scales]
        if ready and not self.arenas:
            check_name(model, name)
        self.check_strength({path: slot for path, _, slot in ready})
        self.same: list[tuple[Any, Any]] = []  # LoRASlots: values are written over
        self.come: dict[str, tuple[Any, Slot]] = {}
        self.gone = {id(layer): layer for layer in walked(model).layers if has(layer, name)}
        if any(layer.foreign for layer in self.gone.values()):
            raise AdapterError(
                f"swap: {name!r} is PEFT's, which alone exchanges it: take another name"
            )
        for path, layer, slot in self.found(ready):
            old = written_over(layer, name, slot) if id(layer) in self.gone else None
            if old is None:
                check_room(path, layer, slot, name)
                self.come[path] = (layer, slot)
            else:
                self.same.append((old, slot))
            self.gone.pop(id(layer), None)

    def check_strength(self, slots: Mapping[str, Slot]) -> None:
        if not slots:
            return
        if isinstance(self.scale, Tensor):
            check_per_sample(self.name, slots)
        require_finite(self.name, self.scale, max(abs(slot.ratio) for slot in slots.values()))
        found = arenas(self.model)
        check_mergeable(found, {self.name: self.scale})
        check_strengths(folded_by(found), {self.name: self.scale} if self.arenas else {})

    def found(self, ready: tuple[Ready, ...]) -> list[tuple[str, Any, Slot]]:
        """The layers. Raises AdapterError where they are not the model's."""
        there = {id(layer) for layer in walked(self.model).layers}
        found = [(path, layer(), slot) for path, layer, slot in ready]
        if not all(id(layer) in there for _, layer, _ in found):
            there = {id(module) for module in self.model.modules()}
        for path, layer, _ in found:
            if id(layer) not in there:
                raise AdapterError(
                    f"swap: {path} is a layer of another model; prepare the file for this one"
                )
        return found

    @torch.no_grad()
    def run(self) -> None:
        if not (self.same or self.come):
            if self.arenas:
                remove(self.model, self.name)
            return
        with refolding(self.model):
            if self.come:
                self.exchange()
            for layer in self.gone.values():
                take_slot(layer, self.name)
            other_ratios = self.write_over()
            if self.gone:
                for arena in arenas(self.model):
                    arena.layout()
                tell_neighbours(self.model)
            elif other_ratios:
                for arena in arenas(self.model):
                    arena.renew_ratios(self.name)
        apply(self.model, {self.name: self.scale}, {self.name: self.on})

    def write_over(self) -> bool:
        """Values are written over; whether an α/r is another one."""
        for key in ("down", "up") if self.same else ():
            # Apart: those of D are dense, which is one launch on a GPU.
            values = [new._parameters[key] for _, new in self.same]
            copy_each([old._parameters[key] for old, _ in self.same], values)
        others = False
        for old, new in self.same:
            if old.spec is not new.spec:
                others |= old.ratio != new.ratio
                old.spec = new.spec
        return others

    def exchange(self) -> None:
        """Slots take the place of others, or come in where there was none. Raises what `attach`
        raises, and then all is as it was."""
        paths = {id(module): path for path, module in modules_by_path(self.model).items()}
        freeze = not self.arenas or any(self.name in arena.froze for arena in self.arenas)
        new = {paths[id(layer)]: fresh(layer, slot) for layer, slot in self.come.values()}
        before = {}
        for layer, _ in self.come.values():
            if isinstance(layer, Adapted) and has(layer, self.name):
                before[paths[id(layer)]] = layer.fastlora[self.name]
                take_slot(layer, self.name, keep=True)
        try:
            attach(self.model, new, self.name, freeze=freeze, scale=self.scale)
        except BaseException:
            if before:
                attach(self.model, before, self.name, freeze=freeze)
            raise


def has(layer: Adapted, name: str) -> bool:
    return name in slots_of(layer)._modules


def written_over(layer: Any, name: str, new: Slot) -> Slot | None:
    """The slot of that name whose values may be exchanged in place: a LoRA of the same shape and
    dtype, where the layer's reserve has it."""
    holder = slots_of(layer)
    if name not in holder.reserved_rows or not holder.takes(new) or not in_place(holder.pins):
        return None
    old = holder._modules[name]
    ready: Any = new
    mine, theirs = (slot._parameters["down"] for slot in (old, ready))
    same = mine.shape == theirs.shape and mine.dtype == theirs.dtype
    return old if same and old.spec.dropout == ready.spec.dropout else None


def fresh(layer: Any, slot: Slot) -> Slot:
    """A slot with the values of a prepared one, of its own where nothing else copies them."""
    if isinstance(layer, Adapted) and layer.fastlora.takes(slot):
        return LoRASlot(slot.spec, slot.down, slot.up)  # type: ignore[attr-defined]
    twin = copy.deepcopy(slot)
    for parameter in twin.parameters():
        parameter.data = placed(layer.weight, parameter)
    return twin.requires_grad_(True)
