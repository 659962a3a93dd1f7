"""`save` and `load` of named adapters in fastlora's own format."""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.arena import checked
from fastlora.adapters.base_hash import base_hash, same_base
from fastlora.adapters.control import some_names
from fastlora.adapters.factorising import full_rank
from fastlora.adapters.inject import (
    NORMS,
    attach,
    check_name,
    parameter_dtype,
    shift_count,
    unsuitable,
)
from fastlora.adapters.lookup import adapted_layers, require_known, unwrapped
from fastlora.adapters.slots import LoRASlot, Slot, SpectralSlot, shapes_lora
from fastlora.adapters.specs import AdapterError, AdapterInfo, LoRA, Spectral
from fastlora.formats import files, native
from fastlora.formats.files import FormatError


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Writes one adapter to a safetensors file, atomically, in the dtype it has.

    `name` may be left out when there is only one. Strengths set by `set_scale` are not part of it.
    A symbolic link stays one, and its target is replaced. Raises AdapterError, before anything is
    written, where the adapter has NaN or infinite values, is unknown or of two kinds; OSError where
    `path` cannot be written or is there already and no regular file.
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
    reason = unsuitable(target, spec)
    if reason is not None:
        reason = reason or "it has no weight to shift"
        raise AdapterError(f"a {type(target).__name__} cannot take it: {reason}")
    weight: Any = target.weight
    if weight.is_meta:
        raise AdapterError("the model is on the meta device; load its weights first")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise FormatError(f"{key}: expected floating values, got {tensor.dtype}")
    at = {k: t.to(weight.device, fitting_dtype(weight, t.dtype)) for k, t in tensors.items()}
    if isinstance(spec, Spectral):
        require_shifts(target, spec, at.get("shift"))
        known, got = config["base_hash"].get(path), base_hash(weight)
        if not any_base and not same_base(known, got):
            raise AdapterError(
                "spectral shifts belong to the weight that they were trained on, and this is "
                f"another one (expected base_hash {known}, got {got}); any_base=True loads them "
                "all the same"
            )
        return SpectralSlot(spec, at["shift"])
    if isinstance(target, nn.Conv2d) and spec.rank % target.groups:
        raise AdapterError(f"rank {spec.rank} is not divisible by {target.groups} groups")
    for key, expected in shapes_lora(target, weight, spec).items():
        require_shape(key, at.get(key), [expected])
    if not spec.dora and "magnitude" in at:
        raise FormatError("magnitude: expected none for a LoRA without dora")
    return LoRASlot(spec, at["down"], at["up"], at.get("magnitude"))


def fitting_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The file's dtype if the operators take it beside this weight, else what inject chooses."""
    if weight.is_floating_point():
        fits = dtype == weight.dtype or (
            dtype == torch.float32 and weight.dtype in (torch.float16, torch.bfloat16)
        )
    else:
        fits = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return dtype if fits else parameter_dtype("", weight, None)


def require_shifts(target: nn.Module, spec: Spectral, shift: Tensor | None) -> None:
    count = shift_count(target, spec)
    if not isinstance(target, NORMS) and shift is not None and shift.dim() == 1:
        full, got = full_rank(target), len(shift)
        if got != count and 1 <= got <= full:
            raise AdapterError(
                f"shift: expected [{count}], the rank of the layer's decomposition, got [{got}]: "
                f"shifts of another one; first decompose(model, rank={got}, where=...)"
            )
    require_shape("shift", shift, [(count,)])


def require_shape(key: str, tensor: Tensor | None, expected: list[tuple[int, ...]]) -> None:
    shapes = " or ".join(str(list(e)) for e in expected)
    if tensor is None:
        raise FormatError(f"{key}: expected {shapes}, got nothing")
    if tuple(tensor.shape) not in expected:
        raise AdapterError(f"{key}: expected {shapes}, got {list(tensor.shape)}")
