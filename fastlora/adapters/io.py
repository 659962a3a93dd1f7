"""`save` and `load` of named adapters in fastlora's own format."""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.control import adapters, known_names, set_scale
from fastlora.adapters.inject import NORMS, attach, unsuitable
from fastlora.adapters.adapted import adapted_layers
from fastlora.adapters.slots import LoRASlot, Slot, SpectralSlot
from fastlora.adapters.specs import AdapterError, AdapterInfo, LoRA, Spectral
from fastlora.formats import files, native
from fastlora.formats.files import FormatError


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Writes one adapter to a safetensors file, atomically, in the dtype it has.

    `name` may be left out when there is only one. Strengths set by `set_scale` are not part of it.
    """
    names = known_names(model)
    if name is None and len(names) != 1:
        raise AdapterError(f"save: name: expected one of {names}, got None")
    name = names[0] if name is None else name
    if name not in names:
        raise AdapterError(f"no adapter named {name!r}; this model has {names or 'none'}")
    layers = {p: m for p, m in adapted_layers(model).items() if name in m.fastlora}
    modules = {p: dict(m.fastlora[name].named_parameters()) for p, m in layers.items()}
    slots = {p: m.fastlora[name] for p, m in layers.items()}
    kind = "spectral" if isinstance(next(iter(slots.values())), SpectralSlot) else "lora"
    config: dict[str, Any] = {"kind": kind, "modules": {p: settings(s) for p, s in slots.items()}}
    if kind == "spectral":
        config["weight_norms"] = {p: weight_norm(m.weight) for p, m in layers.items()}
    files.write(path, *native.pack(modules, config))


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    scale: float | Tensor = 1.0,
    freeze: bool = True,
) -> AdapterInfo:
    """Reads an adapter file into the model under `name`, with strength `scale`.

    Strict: every tensor of the file has to fit a layer of the model, or nothing is changed. The
    weights keep the file's dtype. Raises FormatError for a bad file (a pickle, truncated, foreign,
    NaN), AdapterError for one that does not fit the model.
    """
    if name in known_names(model):
        raise AdapterError(f"adapter name: {name!r} exists already; remove it first")
    modules, config = native.unpack(*files.read(path), source=str(path))
    targets = dict(model.named_modules())
    slots = {}
    for module_path, tensors in modules.items():
        if module_path not in targets:
            raise AdapterError(f"{path}: the model has no module {module_path!r}")
        target = targets[module_path]
        try:
            slots[module_path] = slot_of(target, config, module_path, tensors)
        except (AdapterError, FormatError, KeyError, TypeError) as error:
            raise type(error)(f"{path}: {module_path}: {error}") from None
    attach(model, slots, name, freeze=freeze)
    if isinstance(scale, Tensor) or scale != 1.0:
        set_scale(model, {name: scale})
    return adapters(model)[name]


def settings(slot: Slot) -> dict[str, Any]:
    """A slot's configuration as JSON: the fields of its LoRA or Spectral."""
    fields = dataclasses.asdict(slot.spec)  # type: ignore[arg-type]
    return {k: v for k, v in fields.items() if k not in ("ranks", "alphas")}


def slot_of(
    target: nn.Module, config: dict[str, Any], path: str, tensors: dict[str, Tensor]
) -> Slot:
    """A slot with the file's values, after checking that it fits the layer."""
    fields = config["modules"][path]
    spec = LoRA(**fields) if config["kind"] == "lora" else Spectral(**fields)
    reason = unsuitable(target, spec)
    if reason is not None:
        raise AdapterError(f"a {type(target).__name__} cannot take it: {reason}")
    weight: Any = target.weight
    if weight.is_meta:
        raise AdapterError("the model is on the meta device; load its weights first")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise FormatError(f"{key}: expected floating values, got {tensor.dtype}")
    at = {k: t.to(weight.device) for k, t in tensors.items()}
    if isinstance(spec, Spectral):
        expected = shapes_spectral(target, weight)
        require_shape("shift", at.get("shift"), expected)
        known, got = config.get("weight_norms", {}).get(path), weight_norm(weight)
        if known is None or abs(known - got) > 1e-2 * max(known, got):
            raise AdapterError(
                f"spectral shifts belong to the weight they were trained on: expected a Frobenius "
                f"norm of {known}, got {got:.6g}"
            )
        return SpectralSlot(spec, at["shift"])
    for key, expected in shapes_lora(target, weight, spec).items():
        require_shape(key, at.get(key), [expected])
    if not spec.dora and "magnitude" in at:
        raise FormatError("magnitude: expected none for a LoRA without dora")
    return LoRASlot(spec, at["down"], at["up"], at.get("magnitude"))


def shapes_lora(target: nn.Module, weight: Tensor, spec: LoRA) -> dict[str, tuple[int, ...]]:
    rank = spec.rank
    if isinstance(target, nn.Embedding):
        shapes: dict[str, tuple[int, ...]] = {
            "down": (rank, weight.shape[0]),
            "up": (weight.shape[1], rank),
        }
    elif isinstance(target, nn.Conv2d):
        shapes = {
            "down": (rank, *weight.shape[1:]),
            "up": (weight.shape[0], rank // target.groups, 1, 1),
        }
    else:
        assert isinstance(target, nn.Linear)
        shapes = {"down": (rank, target.in_features), "up": (target.out_features, rank)}
    if spec.dora:
        shapes["magnitude"] = (shapes["up"][0],)
    return shapes


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


def weight_norm(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight.detach().float()))
