"""`load`: an adapter file of any format into a model, its parts, or a pipeline, strictly."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastlora.adapters.arena import checked
from fastlora.adapters.components import Models, components_of
from fastlora.adapters.deltas import mapped
from fastlora.adapters.fitting import slot_from
from fastlora.adapters.inject import attach, check_name, remove
from fastlora.adapters.load_report import Applied, LoadReport, listed
from fastlora.adapters.slots import Slot
from fastlora.adapters.specs import AdapterError
from fastlora.formats import detect
from fastlora.formats.changes import AdapterFile, Change, LowRank, Target
from fastlora.formats.files import FormatError
from fastlora.formats.names import Index, find


# What is made under inference mode has to serve training later.
@torch.inference_mode(False)
def load(
    model: Models,
    path: str | os.PathLike[str],
    name: str = "default",
    scale: float | Tensor = 1.0,
    freeze: bool = True,
    any_base: bool = False,
    strict: bool = True,
) -> LoadReport:
    """Reads an adapter file of any format into `model` under `name`, with strength `scale`.

    `model`: a module, a dict of them by component ("unet", "text_encoder", ...), or a diffusers
    pipeline. `path`: a file, or a folder as PEFT or diffusers save it. The format is told by the
    content: fastlora's own, PEFT, diffusers, kohya, LyCORIS.

    Strict: everything in the file has to fit a layer of the model, or nothing is changed and the
    error names what does not. With `strict=False` the rest is loaded, and the report says what was
    left out. A file that changes nothing is always an error. Weights keep the file's dtype where
    the layer can use it (its own, or float32).

    Spectral shifts mean the singular values of the weights that they were trained on. A file has a
    hash of each, which their copies in other dtypes have too, and other weights are refused;
    `any_base` puts the shifts there all the same, i-th shift on i-th singular value, where shapes
    allow it. Shifts of a truncated decomposition need one of the same ranks (`decompose`).

    Raises FormatError for a bad file (a pickle, truncated, foreign, NaN, a setting that is none),
    AdapterError for one that does not fit the model, and for a `scale` that `set_scale` would
    refuse.
    """
    models = components_of(model, "load")
    for module in models.values():
        check_name(module, name)
    scale = checked(name, scale)
    source = str(path)
    file = detect.read(path)
    plan = _plan(models, file, source, any_base)
    if strict and plan.unused:
        raise _refusal(source, file, plan)
    if not plan.applied:
        raise AdapterError(
            f"{source}: nothing in it fits the model"
            + "".join(f"\n{line}" for line in listed("keys not used", plan.unused))
        )
    infos, done = {}, []
    try:
        for component, slots in plan.slots.items():
            module = models[component]
            infos[component] = attach(module, slots, name, freeze=freeze, scale=scale)
            done.append(module)
    except BaseException:
        for module in done:
            remove(module, name)
        raise
    return LoadReport(
        source, file.format, name, tuple(plan.applied), plan.unused, tuple(plan.missing), infos
    )


class _Plan:
    """Which change goes to which layer, and what does not fit."""

    def __init__(self, parts: Iterable[str], unused: Mapping[str, str]) -> None:
        self.parts = tuple(parts)  # components
        self.slots: dict[str, dict[str, Slot]] = {}
        self.applied: list[Applied] = []
        self.unused = dict(unused)
        self.problems: list[str] = []  # one for each module that does not fit
        self.bad_file = False  # one of them says that the file contradicts itself
        self.missing: list[str] = []

    def refuse(self, target: Target, change: Change, reason: str) -> None:
        self.problems.append(reason)
        self.unused |= dict.fromkeys(change.keys or (str(target),), reason)


def _plan(models: Mapping[str, nn.Module], file: AdapterFile, source: str, any_base: bool) -> _Plan:
    plan = _Plan(models, file.unused)
    modules = {c: dict(m.named_modules(remove_duplicate=False)) for c, m in models.items()}
    indices = {component: Index(paths) for component, paths in modules.items()}
    taken: dict[int, str] = {}
    seen: set[int] = set()

    def own(tensor: Tensor) -> Tensor:
        """Modules that were one in the file have factors in common, which train apart."""
        first = tensor.data_ptr() not in seen
        seen.add(tensor.data_ptr())
        return tensor if first else tensor.clone()

    for target, change in file.changes.items():
        try:
            places = find(target, indices)
        except FormatError as error:  # of a flat name that several modules have
            plan.refuse(target, change, str(error))
            continue
        if len(places) != 1:
            if places:
                found = " and ".join(map(str, places))
                plan.refuse(target, change, f"{target} may be {found}")
            else:
                plan.missing.append(str(target))
                plan.refuse(target, change, _absent(target, models))
            continue
        ((component, path, _),) = places
        layer = modules[component][path]
        if file.format == "fastlora":  # files that do not say so have no other factors there
            change = beside_embedding(layer, change)
        where = ".".join(filter(None, (component, path))) or "the model"
        if id(layer) in taken:
            plan.refuse(
                target, change, f"{where} and {taken[id(layer)]} are the same layer of the model"
            )
            continue
        try:
            slot = slot_from(layer, mapped(change, own), any_base)
        except (AdapterError, FormatError) as error:
            plan.bad_file |= isinstance(error, FormatError)
            plan.refuse(target, change, f"{where}: {error}")
            continue
        taken[id(layer)] = where
        plan.slots.setdefault(component, {})[path] = slot
        weight = change.weight
        rank, ratio = getattr(weight, "rank", None), getattr(weight, "ratio", 1.0)
        plan.applied.append(Applied(component, path, change.kind, rank, ratio, change.keys))
    return plan


def beside_embedding(layer: nn.Module, change: Change) -> Change:
    if isinstance(layer, nn.Embedding) and isinstance(change.weight, LowRank):
        return replace(change, weight=replace(change.weight, embedding=True), axis="in")
    return change


def _absent(target: Target, models: Mapping[str, nn.Module]) -> str:
    if "" in models or not target.component or target.component in models:
        return f"the model has no module {target.path!r}"
    return f"it is for the {target.component}, and there are {sorted(models)}"


def _refusal(source: str, file: AdapterFile, plan: _Plan) -> AdapterError | FormatError:
    """Why a strict load is refused: the problem, or a list of them and the ways on."""
    kind = FormatError if plan.bad_file else AdapterError
    if len(plan.problems) == 1 and not file.unused:
        return kind(f"{source}: {plan.problems[0]}")
    lines = [f"{source}: {len(plan.unused)} keys of this {file.format} file do not fit"]
    lines += listed("modules", dict.fromkeys(plan.problems, ""))
    lines += listed("keys that mean nothing here", file.unused)
    parts = sorted({target.component for target in file.changes} - {""})
    if len(parts) > 1 and "" in plan.parts:
        lines.append(f"the file is for {' and '.join(parts)}: give all of them, or the pipeline")
    if plan.applied:
        lines.append(f"strict=False loads the {len(plan.applied)} modules that do fit")
    return kind("\n".join(lines))
