"""diffusers' LoRA files, in the three styles that it has had.

    peft  unet.<module>.lora_A.weight, .lora_B.weight, and what else PEFT's format has
    lora  unet.<module>.lora.down.weight, text_encoder.<module>.lora_linear_layer.down.weight
    old   unet.<attention>.processor.to_q_lora.down.weight, where to_out_lora means to_out.0

The component in front is missing where a model, not a pipeline, was saved. The header's
`lora_adapter_metadata` is JSON with PEFT's settings, each with its component in front; without it
alpha is the rank, unless a key `<module>.alpha` says otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastlora.formats import peft
from fastlora.formats.changes import AdapterFile, Change, LowRank, Packed, Target
from fastlora.formats.files import FormatError
from fastlora.formats.peft_config import Settings, read_settings, write_settings
from fastlora.formats.peft_layers import Entry, change_of, gather
from fastlora.formats.peft_writing import Layer, all_dora, layers_of, magnitude_of, tensors_of

Style = Literal["peft", "lora", "old"]
NAMES: dict[Style, str] = {"peft": "diffusers", "lora": "diffusers-lora", "old": "diffusers-old"}
SETTINGS = "lora_adapter_metadata"
COMPONENTS = frozenset(
    "unet transformer transformer_2 transformer_ref connectors text_conditioner "
    "text_encoder text_encoder_2 text_encoder_3".split()
)
# What diffusers saves is without ".weight", which transformers misses in a text encoder's.
MAGNITUDE = "lora_magnitude_vector.weight"
# Keys of kohya's files, which are never diffusers' own.
KOHYA = re.compile(r"(?!lora_(?:embedding|magnitude)_)(?:lora_[a-z]+\d*|lycoris)_[^.]*\..+")
# kohya's words occur with the dots of diffusers' paths.
KEY = re.compile(
    r"(?P<path>.+?)(?P<style>\.lora|\.lora_linear_layer|_lora)?"
    r"\.(?P<word>down\.weight|up\.weight|lora_down\.weight|lora_up\.weight|alpha)"
)
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
OLD_ATTENTION = re.compile(r"(?P<attention>.+)\.(?P<layer>to_q|to_k|to_v|to_out(?=\.0))(?:\.0)?")


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterFile:
    """The changes of a file in any of the styles, or in several.

    Raises FormatError for tensors that do not fit each other or the settings in the header.
    """
    settings = read_header(metadata)
    named = components_of(settings)
    modules, others = gather(tensors, lambda key: entry_of(key, named))
    if not modules:
        raise FormatError(f"expected diffusers' keys, got {others[:3] or 'no keys'}")
    components = {target.component for target in modules}
    own = {component: settings_of(settings, component) for component in components}
    return AdapterFile(
        "diffusers",
        {t: change_of(t, parts, own[t.component]) for t, parts in modules.items()},
        dict.fromkeys(others, "not a key of diffusers' LoRA formats"),
        dict(metadata),
    )


def pack(changes: Mapping[Target, Change], style: Style = "peft") -> Packed:
    """A file that diffusers loads, for one or several components.

    Style "peft" has ranks and alphas in the header. "lora" and "old" have no alpha: `up` is
    multiplied by alpha/rank, computed in float32 at least and rounded to its dtype, which is exact
    where alpha/rank is a power of two; they take no bias and no embedding, and "old" only the
    projections of a UNet's attention. Raises FormatError for those, for DoRA of some layers of a
    component only, and for what is no LoRA.
    """
    if style not in get_args(Style):
        raise FormatError(f"style: expected one of {list(get_args(Style))}, got {style!r}")
    layers = layers_of(changes, "diffusers' format")
    components = sorted({target.component for target in layers})
    if "" in components and len(components) > 1:
        raise FormatError(f"expected components for all modules or for none, got {components}")
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component in components:
        own = {t: layer for t, layer in layers.items() if t.component == component}
        dora = all_dora(own, "diffusers' format")
        bias = any(layer.bias is not None for layer in own.values())
        for target, layer in own.items():
            if style == "peft":
                tensors.update(tensors_of(str(target), layer, bias, MAGNITUDE))
            else:
                tensors.update(folded(target, layer, style))
        if style == "peft":
            weights = {target.path: layer.weight for target, layer in own.items()}
            written = write_settings(weights, dora, bias)
            settings.update({prefix(component) + k: v for k, v in written.items()})
    header = {SETTINGS: json.dumps(settings, indent=2, sort_keys=True)} if settings else {}
    return Packed(tensors, {"format": "pt", **header})


def entry_of(key: str, components: Collection[str] = COMPONENTS) -> Entry | None:
    """What a key means; None for one that is not of an adapter."""
    if KOHYA.fullmatch(key):
        return None
    first, _, rest = key.partition(".")
    component, path = (first, rest) if first in components else ("", key)
    found = peft.split(path)
    if found is not None:
        path, parameter, adapter = found
        old = parameter == "lora_magnitude_vector" and ".processor." in path
        return Entry(Target(component, module_of(path, component) if old else path), *found[1:])
    match = KEY.fullmatch(path)
    if match is None or (match["style"] is None and match["word"] in ("down.weight", "up.weight")):
        return None
    path, style, word = match.groups()
    if style == "_lora" or ".processor." in path:
        path = module_of(path, component)
    parameter = "alpha" if word == "alpha" else "lora_A" if "down" in word else "lora_B"
    return Entry(Target(component, path), parameter)


def module_of(path: str, component: str) -> str:
    """The module that an attention processor's layer, "attn1.processor.to_out", was beside."""
    parent, dot, layer = path.replace(".processor.", ".").rpartition(".")
    if component.startswith("text_encoder"):
        layer = OLD_TEXT.get(layer, layer)
    elif layer == "to_out":
        layer = "to_out.0"
    return parent + dot + layer


def read_header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings in a file's header, with components in front; none: empty."""
    if SETTINGS not in metadata:
        return {}
    try:
        settings = json.loads(metadata[SETTINGS])
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{SETTINGS}: expected JSON, got {error}") from None
    if not isinstance(settings, dict):
        raise FormatError(f"{SETTINGS}: expected an object, got {settings!r}")
    return settings


def components_of(settings: Mapping[str, Any]) -> Collection[str]:
    """What may stand in front of a key, by the header's settings ("unet.r")."""
    if any("." not in name for name in settings):
        return ()  # a model's file, in which "transformer" would be one of its modules
    return COMPONENTS.union(name.partition(".")[0] for name in settings)


def settings_of(settings: Mapping[str, Any], component: str) -> Settings:
    start = prefix(component)
    own = {k.removeprefix(start): v for k, v in settings.items() if k.startswith(start)}
    own = {name: value for name, value in own.items() if "." not in name}
    if not own:
        return Settings()
    try:
        return read_settings(own)
    except FormatError as error:
        raise FormatError(f"{SETTINGS}: {start}{error}") from None


def prefix(component: str) -> str:
    return f"{component}." if component else ""


def folded(target: Target, layer: Layer, style: Style) -> dict[str, Tensor]:
    """The tensors of a style without alpha."""
    low, path = layer.weight, str(target)
    if layer.bias is not None or low.embedding:
        what = "embedding" if low.embedding else "bias"
        raise FormatError(f"{target}: {NAMES[style]} has no {what}; write {NAMES['peft']}")
    if style == "old":
        match = OLD_ATTENTION.fullmatch(path)
        if match is None or target.component not in ("", "unet"):
            raise FormatError(
                f"{target}: {NAMES[style]} has only to_q, to_k, to_v and to_out.0 of a UNet; write "
                f"{NAMES['peft']} or {NAMES['lora']}"
            )
        path = f"{match['attention']}.processor.{match['layer']}"
        name = f"{path}_lora"
    else:
        text = target.component.startswith("text_encoder")
        name = f"{path}.lora_linear_layer" if text else f"{path}.lora"
    tensors = {f"{name}.down.weight": low.down, f"{name}.up.weight": scaled_up(low)}
    if layer.magnitude is not None:
        tensors[f"{path}.{MAGNITUDE}"] = magnitude_of(layer)
    return tensors


def scaled_up(low: LowRank) -> Tensor:
    if low.ratio == 1:
        return low.up
    wide = torch.promote_types(low.up.dtype, torch.float32)
    return (low.up.to(wide) * low.ratio).to(low.up.dtype)
