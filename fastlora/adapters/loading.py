"""`load`: an adapter file of any format into a model, its parts, or a pipeline, strictly."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastlora.adapters.arena import checked
from fastlora.adapters.attaching import attach, check_name, check_per_sample
from fastlora.adapters.components import Models, components_of
from fastlora.adapters.inject import remove
from fastlora.adapters.load_report import LoadReport, listed
from fastlora.adapters.specs import AdapterError
from fastlora.formats.files import FormatError

if TYPE_CHECKING:
    from fastlora.adapters.planning import Plan
    from fastlora.formats.changes import AdapterFile


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

    Raises FileNotFoundError for a path that is none of this machine (nothing is downloaded),
    FormatError for a bad file (a pickle, truncated, foreign, NaN, a setting that is none),
    AdapterError for one that does not fit the model, and for a `scale` that `set_scale` would
    refuse.
    """
    models = components_of(model, "load")
    for module in models.values():
        check_name(module, name)
    scale = checked(name, scale)
    file, plan = fitted(models, path, any_base, strict, "load")
    if isinstance(scale, Tensor):  # before the first of several parts is changed
        for slots in plan.slots.values():
            check_per_sample(name, slots)
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
        str(path), file.format, name, tuple(plan.applied), plan.unused, tuple(plan.missing), infos
    )


def fitted(
    models: Mapping[str, nn.Module],
    path: str | os.PathLike[str],
    any_base: bool,
    strict: bool,
    what: str,
) -> tuple[AdapterFile, Plan]:
    """A file and the slots that it becomes in models by component, which stay as they are. Raises
    what `load` says; `what` is for messages."""
    # The formats are imported where a file is read: `import fastlora` stays light.
    from fastlora.adapters.planning import planned
    from fastlora.formats import detect

    source = str(path)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{source}: no such file or folder; {what} reads local ones: download an adapter of "
            "the Hub first (huggingface_hub.snapshot_download)"
        )
    file = detect.read(path)
    plan = planned(models, file, any_base)
    if strict and plan.unused:
        raise _refusal(source, file, plan, models)
    if not plan.applied:
        raise AdapterError(
            f"{source}: nothing in it fits the model"
            + "".join(f"\n{line}" for line in problems_of(file, plan))
        )
    return file, plan


def _refusal(
    source: str, file: AdapterFile, plan: Plan, given: Iterable[str]
) -> AdapterError | FormatError:
    """Why a strict load is refused: the problem, or a list of them and the ways on."""
    kind = FormatError if plan.bad_file else AdapterError
    if sum(map(len, plan.problems.values())) == 1 and not file.unused:
        return kind(f"{source}: {next(iter(plan.unused.values()))}")
    lines = [f"{source}: {len(plan.unused)} keys of this {file.format} file do not fit"]
    lines += problems_of(file, plan)
    if len(plan.parts) > 1 and "" in given:
        lines.append(
            f"the file is for {' and '.join(plan.parts)}: give all of them, or the pipeline"
        )
    if plan.applied:
        lines.append(f"strict=False loads the {len(plan.applied)} modules that do fit")
    return kind("\n".join(lines))


def problems_of(file: AdapterFile, plan: Plan) -> list[str]:
    """Lines about the modules that do not fit, those with one reason together, and the keys."""
    reasons = []
    for reason, modules in plan.problems.items():
        named = [module for module in modules if module]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        reasons.append(f"{', '.join(named[:3])}{more}: {reason}" if named else reason)
    lines = listed("modules that do not fit, by reason", dict.fromkeys(reasons, ""))
    return lines + listed("keys that mean nothing here", file.unused)
