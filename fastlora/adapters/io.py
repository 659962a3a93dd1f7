"""`save` and `load` of named adapters in fastlora's own format."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.arena import checked
from fastlora.adapters.base_hash import base_hash
from fastlora.adapters.control import some_names
from fastlora.adapters.deltas import DeltaSlot
from fastlora.adapters.fitting import lora_slot, spectral_slot
from fastlora.adapters.inject import attach, check_name
from fastlora.adapters.lookup import adapted_layers, require_known, unwrapped
from fastlora.adapters.slots import Slot, SpectralSlot
from fastlora.adapters.specs import AdapterError, AdapterInfo, LoRA, Spectral
from fastlora.formats import files, native
from fastlora.formats.changes import LowRank
from fastlora.formats.files import FormatError


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Writes one adapter to a safetensors file, atomically, in the dtype it has.

    `name` may be left out when there is only one. Strengths set by `set_scale` are not part of it.
    A symbolic link stays one, and its target is replaced. Raises AdapterError, before anything is
    written, where the adapter has NaN or infinite values, is unknown, of two kinds or of one that
    this format cannot hold (which names those that can); OSError where `path` cannot be written or
    is there already and no regular file.
    """
    if name is None:
        names = some_names(model, "save")
        if len(names) != 1:
            raise AdapterError(f"save: name: expected one of {names}, got None")
        name = names[0]
    require_known(model, name)
    layers = {p: m for p, m in adapted_layers(model).items() if name in m.fastlora}
    slots = {p: m.fastlora[name] for p, m in layers.items()}
    modules = {p: dict(s.named_parameters()) for p, s in slots.items()}
    refuse_deltas(name, slots.values())
    kinds = {"spectral" if isinstance(s, SpectralSlot) else "lora" for s in slots.values()}
    if len(kinds) > 1:
        raise AdapterError(f"save: {name!r} is {' and '.join(sorted(kinds))}; a file has one kind")
    (kind,) = kinds
    for module_path, own in modules.items():
        for key, value in own.items():
            if not torch.isfinite(value).all():  # load would refuse the file
                raise AdapterError(
                    f"save: {name!r}: {native.key_of(module_path, key)}: expected finite values, "
                    "got NaN or infinity"
                )
    config: dict[str, Any] = {"kind": kind, "modules": {p: settings(s) for p, s in slots.items()}}
    if kind == "spectral":
        config["base_hash"] = {p: base_hash(m.weight) for p, m in layers.items()}
    files.write(path, *native.pack(modules, config))


# What is made under inference mode has to serve training later.
@torch.inference_mode(False)
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    scale: float | Tensor = 1.0,
    freeze: bool = True,
    any_base: bool = False,
) -> AdapterInfo:
    """Reads an adapter file into the model under `name`, with strength `scale`.

    Strict: every tensor of the file has to fit a layer of the model, or nothing is changed. The
    weights keep the file's dtype where the layer can use it (its own, or float32).

    Spectral shifts mean the singular values of the weights that they were trained on. A file has a
    hash of each, which their copies in other dtypes have too, and is refused by other weights;
    `any_base` puts the shifts there all the same, i-th shift on i-th singular value, where shapes
    allow it. Shifts of a truncated decomposition need one of the same ranks (`decompose`).

    Raises FormatError for a bad file (a pickle, truncated, foreign, NaN, a setting that is none),
    AdapterError for one that does not fit the model, and for a `scale` that `set_scale` would
    refuse.
    """
    model = unwrapped(model)
    check_name(model, name)
    scale = checked(name, scale)
    modules, config = native.unpack(*files.read(path), source=str(path))
    targets = dict(model.named_modules(remove_duplicate=False))
    slots: dict[str, Slot] = {}
    for module_path, tensors in modules.items():
        if module_path not in targets:
            raise AdapterError(f"{path}: the model has no module {module_path!r}")
        target = targets[module_path]
        twin = next((p for p in slots if targets[p] is target), None)
        if twin is not None:
            raise AdapterError(f"{path}: {module_path} and {twin} are the same layer of the model")
        try:
            slots[module_path] = slot_of(target, config, module_path, tensors, any_base)
        except AdapterError as error:
            raise AdapterError(f"{path}: {module_path}: {error}") from None
        except (FormatError, TypeError) as error:
            raise FormatError(f"{path}: {module_path}: {error}") from None
    return attach(model, slots, name, freeze=freeze, scale=scale)


def refuse_deltas(name: str, slots: Iterable[Slot]) -> None:
    deltas = [slot for slot in slots if isinstance(slot, DeltaSlot)]
    if deltas:
        kinds = " and ".join(sorted({slot.kind for slot in deltas}))
        formats = " or ".join(sorted({holder(slot) for slot in deltas}))
        raise AdapterError(
            f"save: {name!r} has updates of kind {kinds}, which fastlora's own format cannot hold; "
            f"{formats} files can"
        )


def holder(slot: DeltaSlot) -> str:
    """The format of files that can hold such an update."""
    change = slot.change
    lora = isinstance(change.weight, LowRank) and change.weight.mid is None
    return "PEFT" if lora and change.bias is not None else "LyCORIS"


def settings(slot: Slot) -> dict[str, Any]:
    """A slot's configuration as JSON: the fields of its LoRA or Spectral."""
    fields = dataclasses.asdict(slot.spec)  # type: ignore[arg-type]
    return {k: v for k, v in fields.items() if k not in ("ranks", "alphas")}


def slot_of(
    target: nn.Module,
    config: dict[str, Any],
    path: str,
    tensors: dict[str, Tensor],
    any_base: bool = False,
) -> Slot:
    """A slot with the file's values, after checking that it fits the layer."""
    fields = config["modules"][path]
    try:
        spec = LoRA(**fields) if config["kind"] == "lora" else Spectral(**fields)
    except AdapterError as error:
        raise FormatError(str(error)) from None
    if isinstance(spec, Spectral):
        return spectral_slot(target, spec, tensors, config["base_hash"].get(path), any_base)
    return lora_slot(target, spec, tensors)
