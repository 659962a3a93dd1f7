"""Which change of a file goes to which layer, and what does not fit and why: before any change."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from fastlora.adapters.deltas import mapped, tensors_of
from fastlora.adapters.fitting import slot_from
from fastlora.adapters.load_report import Applied
from fastlora.adapters.lookup import modules_by_path
from fastlora.adapters.slots import Slot
from fastlora.adapters.specs import AdapterError
from fastlora.formats.changes import AdapterFile, Change, LowRank, Target
from fastlora.formats.files import FormatError
from fastlora.formats.names import Index, find

Modules = Mapping[str, Mapping[str, nn.Module]]  # of every component by path


class Plan:
    """Slots for layers, and what of the file has none."""

    def __init__(self, file: AdapterFile) -> None:
        self.parts = sorted({target.component for target in file.changes} - {""})  # of the file
        self.slots: dict[str, dict[str, Slot]] = {}  # by component and path
        self.applied: list[Applied] = []
        self.unused = dict(file.unused)
        self.problems: dict[str, list[str]] = {}  # reasons, and the modules that do not fit for one
        self.bad_file = False  # one of them says that the file contradicts itself
        self.missing: list[str] = []

    def refuse(self, target: Target, change: Change, reason: str, where: str = "") -> None:
        """`where`: the module, if the reason does not name it."""
        self.problems.setdefault(reason, []).append(where)
        said = f"{where}: {reason}" if where else reason
        self.unused |= dict.fromkeys(change.keys or (str(target),), said)

    def place(self, place: Target, change: Change, slot: Slot) -> None:
        self.slots.setdefault(place.component, {})[place.path] = slot
        rank, ratio = getattr(change.weight, "rank", None), getattr(change.weight, "ratio", 1.0)
        self.applied.append(Applied(*place[:2], change.kind, rank, ratio, change.keys))


def planned(models: Mapping[str, nn.Module], file: AdapterFile, any_base: bool) -> Plan:
    """The slots that a file's changes become in models by component. The models stay as they are.

    The changes are taken out of the file one by one: where a slot has its values in another dtype
    or on another device, the file's are freed before the next one is made.
    """
    plan = Plan(file)
    modules = {component: modules_by_path(model) for component, model in models.items()}
    taken: dict[int, str] = {}
    seen: set[int] = set()
    places = dict(located(plan, models, modules, file.changes))
    for target, place in unambiguous(plan, places, file.changes):
        change = file.changes.pop(target)
        layer, where = modules[place.component][place.path], str(place) or "the model"
        if file.format == "fastlora":  # files that do not say so have no other factors there
            change = beside_embedding(layer, change)
        if id(layer) in taken:
            same = f"{where} and {taken[id(layer)]} are the same layer of the model"
            if where == taken[id(layer)]:
                same = f"{where}: the file has several names for it"
            plan.refuse(target, change, same)
            continue
        try:
            slot = slot_from(layer, apart(change, seen), any_base)
        except (AdapterError, FormatError) as error:
            plan.bad_file |= isinstance(error, FormatError)
            plan.refuse(target, change, str(error), where)
            continue
        taken[id(layer)] = where
        plan.place(place, change, slot)
    return plan


def located(
    plan: Plan,
    models: Mapping[str, nn.Module],
    modules: Modules,
    changes: Mapping[Target, Change],
) -> Iterator[tuple[Target, Target]]:
    """The targets that mean one module each, with the place of that; the others are refused."""
    indices = {component: Index(paths) for component, paths in modules.items()}
    for target, change in changes.items():
        try:
            places = find(target, indices)
        except FormatError as error:  # of a flat name that several modules have
            plan.refuse(target, change, str(error))
            continue
        if len(places) == 1:
            yield target, places[0]
        elif places:
            plan.refuse(target, change, f"{target} may be {' and '.join(map(str, places))}")
        else:
            plan.missing.append(str(target))
            plan.refuse(target, change, absent(target, models))


def unambiguous(
    plan: Plan, places: Mapping[Target, Target], changes: Mapping[Target, Change]
) -> Iterator[tuple[Target, Target]]:
    """The targets whose component is plain. Several text encoders have modules of one name: where a
    file for them meets one model, nobody knows which is meant, also of the modules that only one of
    them has, and all are refused."""
    components: dict[Target, set[str]] = {}
    for target, place in places.items():
        components.setdefault(place, set()).add(target.component)
    rivals = sorted(set().union(*(found for found in components.values() if len(found) > 1)))
    names = [name or "the model itself" for name in rivals]
    given = ", ".join(f"{name!r}: ..." for name in rivals if name)
    reason = (
        f"the file is for {' and '.join(names)}, whose modules have the same names, and one model "
        f"does not say which it is: give models by component, {{{given}}}"
    )
    for target, place in places.items():
        if target.component in rivals:
            plan.refuse(target, changes[target], reason)
        else:
            yield target, place


def apart(change: Change, seen: set[int]) -> Change:
    """Modules that were one in the file have factors in common, which train apart: tensors that
    are in `seen`, where all come in, are copied."""

    places = [tensor.data_ptr() for tensor in tensors_of(change).values()]
    if len(set(places)) == len(places) and seen.isdisjoint(places):
        seen.update(places)
        return change

    def own(tensor: Tensor) -> Tensor:
        first = tensor.data_ptr() not in seen
        seen.add(tensor.data_ptr())
        return tensor if first else tensor.clone()

    return mapped(change, own)


def beside_embedding(layer: nn.Module, change: Change) -> Change:
    if isinstance(layer, nn.Embedding) and isinstance(change.weight, LowRank):
        return replace(change, weight=replace(change.weight, embedding=True), axis="in")
    return change


def absent(target: Target, models: Mapping[str, nn.Module]) -> str:
    if "" in models or not target.component or target.component in models:
        return f"the model has no module {target.path!r}"
    return f"it is for the {target.component}, and there are {sorted(models)}"
