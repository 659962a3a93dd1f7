"""`save` and `load` of named adapters in fastlora's own format."""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.arena import checked
from fastlora.adapters.control import some_names
from fastlora.adapters.inject import NORMS, attach, check_name, parameter_dtype, unsuitable
from fastlora.adapters.lookup import adapted_layers, require_known, unwrapped
from fastlora.adapters.slots import LoRASlot, Slot, SpectralSlot, shapes_lora
from fastlora.adapters.specs import AdapterError, AdapterInfo, LoRA, Spectral, is_number
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
    for key, value in native.pack(modules, {})[0].items():
        if not torch.isfinite(value).all():  # load would refuse the file
            raise AdapterError(
                f"save: {name!r}: {key}: expected finite values, got NaN or infinity"
            )
    config: dict[str, Any] = {"kind": kind, "modules": {p: settings(s) for p, s in slots.items()}}
    if kind == "spectral":
        config["weight_prints"] = {p: weight_print(m.weight) for p, m in layers.items()}
    files.write(path, *native.pack(modules, config))


# What is made under inference mode has to serve training later.
@torch.inference_mode(False)
def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    scale: float | Tensor = 1.0,
    freeze: bool = True,
) -> AdapterInfo:
    """Reads an adapter file into the model under `name`, with strength `scale`.

    Strict: every tensor of the file has to fit a layer of the model, or nothing is changed. The
    weights keep the file's dtype where the layer can use it (its own, or float32). Raises
    FormatError for a bad file (a pickle, truncated, foreign, NaN, a setting that is none),
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
            slots[module_path] = slot_of(target, config, module_path, tensors)
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
    target: nn.Module, config: dict[str, Any], path: str, tensors: dict[str, Tensor]
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
        require_shape("shift", at.get("shift"), shapes_spectral(target, weight))
        known = config.get("weight_prints")
        known = known.get(path) if isinstance(known, dict) else None
        if not same_print(known, weight_print(weight)):
            raise AdapterError(
                "spectral shifts belong to the weight that they were trained on, and this is "
                f"another one (expected {known}, got {weight_print(weight)})"
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


def shapes_spectral(target: nn.Module, weight: Tensor) -> list[tuple[int, ...]]:
    if isinstance(target, NORMS):
        return [(weight.numel(),), (1,)]
    return [(min(weight.shape[0], weight[0].numel()),)]


def require_shape(key: str, tensor: Tensor | None, expected: list[tuple[int, ...]]) -> None:
    shapes = " or ".join(str(list(e)) for e in expected)
    if tensor is None:
        raise FormatError(f"{key}: expected {shapes}, got nothing")
    if tuple(tensor.shape) not in expected:
        raise AdapterError(f"{key}: expected {shapes}, got {list(tensor.shape)}")


PERIOD = 4093  # a prime


@torch.no_grad()
def weight_print(weight: Tensor) -> list[float]:
    """Five numbers that tell weights apart but not their dtypes: the Frobenius norm, and the sums
    under four fixed patterns of signs over that norm.

    For unrelated weights each of the four differs by about 1.4; rounding to bfloat16 changes them
    by about 0.001.
    """
    flat = weight.detach().flatten().float()
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % PERIOD)).view(-1, PERIOD)
    index = torch.arange(PERIOD, device=weight.device)
    # The middle bits of a linear congruence are signs that look random.
    bits = index * 2654435761 + 40503
    signs = [(bits >> shift & 1) * 2 - 1 for shift in (17, 20, 23, 26)]
    norm = torch.linalg.vector_norm(flat)
    sums = rows.sum(0) @ torch.stack(signs).T.float() / norm.clamp_min(1e-30)
    return [float(v) for v in (norm, *sums)]


def same_print(known: Any, got: list[float]) -> bool:
    if not isinstance(known, list) or len(known) != len(got):
        return False
    if not all(is_number(v) for v in known):
        return False
    close = [abs(a - b) <= 0.02 for a, b in zip(known[1:], got[1:], strict=True)]
    return abs(known[0] - got[0]) <= 0.01 * max(known[0], got[0]) and all(close)
