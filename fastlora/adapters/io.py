"""`save` and `load` of named adapters in fastlora's own format."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastlora.adapters.base_hash import base_hash
from fastlora.adapters.control import some_names
from fastlora.adapters.deltas import DeltaSlot
from fastlora.adapters.lookup import adapted_layers, require_known
from fastlora.adapters.slots import Slot, SpectralSlot
from fastlora.adapters.specs import AdapterError
from fastlora.formats import files, native
from fastlora.formats.changes import LowRank


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
