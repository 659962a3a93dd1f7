"""`save`: a named adapter of a model, its parts, or a pipeline, as a file of any format."""

import os
from typing import Any

import torch
from torch import nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.base_hash import base_hash
from fastlora.adapters.components import Models, components_of
from fastlora.adapters.deltas import DeltaSlot
from fastlora.adapters.lookup import adapted_layers, known_names
from fastlora.adapters.slots import LoRASlot, Slot, SpectralSlot
from fastlora.adapters.specs import AdapterError
from fastlora.formats.changes import Change, LowRank, Shift, Target
from fastlora.formats.files import FormatError

FORMATS = (
    "fastlora", "peft", "diffusers", "diffusers-lora", "diffusers-old", "kohya", "lycoris",
)  # fmt: skip


def save(
    model: Models,
    path: str | os.PathLike[str],
    name: str | None = None,
    format: str = "fastlora",
    family: str | None = None,
) -> None:
    """Writes one adapter to a file, atomically, in the dtype it has.

    `model`: a module, a dict of them by component ("unet", "text_encoder", ...), or a diffusers
    pipeline. `name` may be left out when there is only one. Strengths set by `set_scale` are not
    part of it. `format`:

    - "fastlora": LoRA, DoRA or spectral shifts of one model. "peft": LoRA and DoRA of one model, a
      folder with adapter_model.safetensors and adapter_config.json.
    - "diffusers" for `load_lora_weights`, and its older styles "diffusers-lora" and
      "diffusers-old", which have no alphas: they go into `up`.
    - "kohya": LoRA and DoRA; "lycoris": LoHa, LoKr and whole differences as well. Both need the
      component, so a dict or a pipeline, in their names, and these differ by `family`: "sd",
      "sdxl" or "flux". It can be left out where the modules tell it, and for a text encoder alone,
      which is "sd" then.

    A symbolic link stays one, and its target is replaced. Raises, before anything is written,
    AdapterError where the adapter has NaN or infinite values, is unknown or of kinds that no file
    has together, FormatError for what the format cannot hold; OSError where `path` cannot be
    written or is there already and no regular file.
    """
    # The formats are imported where a file is written: `import fastlora` stays light.
    from fastlora.formats import writing
    from fastlora.formats.combining import without_alpha

    if format not in FORMATS:
        raise AdapterError(f"save: format: expected one of {', '.join(FORMATS)}, got {format!r}")
    models = components_of(model, "save")
    name = the_name(models, name)
    changes: dict[Target, Change] = {}
    conv1d = False  # of transformers: weights that are not [out, in]
    for component, module in models.items():
        for module_path, layer in adapted_layers(module).items():
            if name in layer.fastlora:
                target = Target(component, module_path)
                changes[target] = change_of(layer, layer.fastlora[name])
                require_finite(name, target, layer.fastlora[name])
                conv1d |= type(layer).upright is not Adapted.upright
    kinds = {kind_of(change) for change in changes.values()}
    if "spectral" in kinds and len(kinds) > 1:
        raise AdapterError(f"save: {name!r} is {' and '.join(sorted(kinds))}; a file has one kind")
    if format in ("diffusers-lora", "diffusers-old"):
        changes = {target: without_alpha(change) for target, change in changes.items()}
    try:
        packed = writing.pack(changes, format, family)
    except FormatError as error:
        raise FormatError(f"save: {name!r}: {error}") from None
    if packed.config is not None:
        packed.config["fan_in_fan_out"] = conv1d  # PEFT finds out by itself, with a warning
    writing.write(path, packed)


def the_name(models: dict[str, nn.Module], name: str | None) -> str:
    """The adapter that is meant. Raises AdapterError."""
    names = sorted({known for module in models.values() for known in known_names(module)})
    if not names:
        raise AdapterError("save: the model has no adapters")
    if name is None:
        if len(names) != 1:
            raise AdapterError(f"save: name: expected one of {names}, got None")
        return names[0]
    if name not in names:
        raise AdapterError(f"no adapter named {name!r}; this model has {names or 'none'}")
    return name


def change_of(layer: Any, slot: Slot) -> Change:
    """What a slot says of its layer."""
    if isinstance(slot, DeltaSlot):
        return slot.change
    if isinstance(slot, LoRASlot):
        spec, embedding = slot.spec, isinstance(layer, nn.Embedding)
        down, up, magnitude = slot.down.detach(), slot.up.detach(), slot.magnitude
        part = LowRank(down, up, spec.alpha, spec.rank_stabilized, None, embedding, spec.dropout)
        # A magnitude is of the outputs, which an embedding's weight has as columns.
        axis = "in" if embedding else "out"
        return Change(part, None, None if magnitude is None else magnitude.detach(), axis)
    assert isinstance(slot, SpectralSlot)
    shift = Shift(slot.shift.detach(), slot.spec.norms, base_hash(layer.weight))
    return Change(shift)


def kind_of(change: Change) -> str:
    return "spectral" if isinstance(change.weight, Shift) else "lora"


def require_finite(name: str, target: Target, slot: Slot) -> None:
    for key, value in slot.named_parameters():
        if not torch.isfinite(value).all():  # load would refuse the file
            raise AdapterError(
                f"save: {name!r}: {target}.{key}: expected finite values, got NaN or infinity"
            )
