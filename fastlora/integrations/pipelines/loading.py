"""`load_lora_weights` that does what the file says, or raises: diffusers' own, given exact
settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from fastlora.adapters.lookup import unwrapped
from fastlora.adapters.specs import AdapterError
from fastlora.formats import detect, diffusers
from fastlora.formats.changes import AdapterFile, Change, Target
from fastlora.formats.files import FormatError
from fastlora.integrations.pipelines.fitting import Unfit, fitted
from fastlora.integrations.pipelines.hotswapping import (
    IGNORED,
    check_hotswap,
    others_kept,
    settle_hotswap,
)
from fastlora.integrations.pipelines.peft_state import Before, take_up
from fastlora.integrations.pipelines.prepared import Prepared
from fastlora.integrations.pipelines.reading import Source, read

LOST = ("dora_scale",)  # in keys that diffusers' conversions leave out


def load_lora_weights(
    base: Any, pipe: Any, given: Any, name: str | None, hotswap: bool, kwargs: dict[str, Any]
) -> None:
    """`base.load_lora_weights`, where everything in the file takes effect, in its own strength.

    The file is read by its content (`fastlora.formats`); PEFT's layers, configurations and names
    are diffusers' own work. Raises FormatError for a bad file, and AdapterError, with nothing
    changed, where a key fits no module, where PEFT's LoRA cannot hold a change, and for a name that
    is taken.
    """
    source = read(given, kwargs)
    models = _models(pipe, kwargs)
    if _is_control(pipe, source):  # whose norms and wider inputs are diffusers' own matter
        base.load_lora_weights(pipe, given, adapter_name=name, hotswap=hotswap, **kwargs)
        return
    changes = _placed(base, models, source, _way_on(given, name))
    if hotswap:
        check_hotswap(models, changes, name, source.name)
    else:
        _check_name(models, changes, name, source.name)
    try:
        packed = diffusers.pack(changes)
    except FormatError as error:
        raise AdapterError(f"{source.name}: {error}\n{_way_on(given, name)}) loads it") from None
    settings = json.loads(packed.metadata[diffusers.SETTINGS])
    if hotswap:
        for component in {target.component for target in changes}:
            config = models[component].peft_config[name]  # type: ignore[index]
            settings |= {f"{component}.{key}": getattr(config, key) for key in IGNORED}
    before = [Before(model) for model in models.values()]
    tensors = packed.tensors
    if hotswap or isinstance(given, Mapping):
        # PEFT takes them as its own: the next swap writes into them, or exchanges them for others.
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    stale = vars(pipe).pop("_lora_scale", None)  # of the last call, by which encoders were scaled
    try:
        exact = Prepared(tensors, settings)
        with others_kept(models, name) if hotswap and name else nullcontext():
            base.load_lora_weights(pipe, exact, adapter_name=name, hotswap=hotswap, **kwargs)
    except BaseException:
        for model in before:
            model.put_back()
        raise
    finally:
        if stale is not None:
            vars(pipe)["_lora_scale"] = stale
    if hotswap and name:
        settle_hotswap(models, changes, name)
    take_up(models, changes)


def _placed(
    base: Any, models: Mapping[str, nn.Module], source: Source, way_on: str
) -> dict[Target, Change]:
    """The changes of a file by module. Names that fastlora does not know are diffusers' to read."""
    try:
        return fitted(models, source.unpack(), source.name, way_on)
    except (FormatError, Unfit) as error:
        converted = None
        if isinstance(error, FormatError) or error.nothing_fits:
            converted = _converted(base, source)
        if converted is None:
            raise
    return fitted(models, converted, source.name, way_on)


def _converted(base: Any, source: Source) -> AdapterFile | None:
    """The file with the names that diffusers gives its keys; None where it has none for them."""
    if any(word in key for key in source.tensors for word in LOST):
        return None
    try:
        tensors, *alphas, _ = base.lora_state_dict(
            dict(source.tensors), return_alphas=True, return_lora_metadata=True
        )
        beside = {f"{key.removesuffix('.alpha')}.alpha": alpha for key, alpha in _all(alphas)}
        return detect.unpack({**tensors, **beside}, source.header, None, source.name)
    except Exception:  # conversions raise all kinds for keys that they do not know
        return None


def _all(alphas: list[Any]) -> list[tuple[str, torch.Tensor]]:
    found = (alphas[0] if alphas else None) or {}
    return [(key, torch.as_tensor(float(alpha))) for key, alpha in found.items()]


def _models(pipe: Any, kwargs: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The modules that diffusers loads LoRAs into, by the component that files name."""
    names = {name: name for name in pipe._lora_loadable_modules}
    if kwargs.get("load_into_transformer_2"):
        names["transformer"] = "transformer_2"
    parts = {name: getattr(pipe, attribute, None) for name, attribute in names.items()}
    return {n: unwrapped(part) for n, part in parts.items() if isinstance(part, nn.Module)}


def _is_control(pipe: Any, source: Source) -> bool:
    """A Control LoRA for FLUX: it has norms of queries and keys, or wants more input channels."""
    norms = getattr(pipe, "_control_lora_supported_norm_keys", None)
    if norms is None:
        return False
    if any(norm in key for key in source.tensors for norm in ("query_norm", *norms)):
        return True
    wanted = source.tensors.get("transformer.x_embedder.lora_A.weight")
    return wanted is not None and wanted.shape[1] > pipe.transformer.config.in_channels


def _check_name(
    models: Mapping[str, nn.Module], changes: Mapping[Target, Change], name: str | None, source: str
) -> None:
    """Before the first of several models is changed."""
    for component in dict.fromkeys(target.component for target in changes):
        if name in getattr(models[component], "peft_config", ()):
            raise AdapterError(f"{source}: the {component} has an adapter {name!r} already")


def _way_on(given: Any, name: str | None) -> str:
    path = "path" if isinstance(given, Mapping) else repr(str(given))
    return f"fastlora.load(pipe, {path}, name={name or 'default'!r}"
