"""Which format a file has, by its content, and the reader for it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlora.formats import diffusers, files, kohya, native, original, peft
from fastlora.formats.changes import AdapterFile
from fastlora.formats.files import FormatError

FORMATS = {
    "fastlora": "metadata format=fastlora",
    "peft": "base_model.model.….lora_A.weight beside adapter_config.json",
    "diffusers": "unet.….lora_A.weight, ….lora.down.weight, ….processor.to_q_lora.down.weight",
    "kohya": "lora_unet_….lora_down.weight; LyCORIS: lycoris_….hada_w1_a, .lokr_w1, .diff",
    "original": "diffusion_model.double_blocks.….lora_A.weight, as ComfyUI and ai-toolkit write",
}
CONFIG = "adapter_config.json"
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read(path: str | os.PathLike[str]) -> AdapterFile:
    """The changes of a safetensors file, or of a folder with one, as PEFT and diffusers write it.

    Raises FileNotFoundError; FormatError for a folder in which it is not plain which file is meant,
    for pickles, and for what `files.read` and `unpack` refuse.
    """
    path = Path(path)
    file = only_file(path) if path.is_dir() else path
    tensors, metadata = files.read(file)
    return unpack(tensors, metadata, config_beside(file, tensors, metadata), str(file))


def unpack(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
    source: str = "the file",
) -> AdapterFile:
    """The changes that a file asks for, whatever its format; `config`: PEFT's adapter_config.json.

    Values are not looked at but for scalars, so that all else may be on the meta device. Raises
    FormatError naming `source` and the keys for a file that no format explains.
    """
    for key, tensor in tensors.items():
        if tensor.is_complex():  # whose imaginary part a conversion drops
            raise FormatError(f"{source}: {key}: expected real numbers, got {tensor.dtype}")
    try:
        if config is not None:
            return peft.unpack(tensors, metadata, config)
        name = detect(tensors, metadata)
        if name == "peft":
            return peft.unpack(tensors, metadata, None)
        if name == "diffusers":
            return diffusers.unpack(tensors, metadata)
        if name == "kohya":
            return kohya.unpack(tensors, metadata)
        if name == "original":
            return original.unpack(tensors, metadata)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from None
    return native.adapter_file(dict(tensors), dict(metadata), source)


def detect(keys: Iterable[str], metadata: Mapping[str, str]) -> str:
    """ "fastlora", "peft", "diffusers", "kohya" (LyCORIS too) or "original": what explains most of
    the keys.

    Raises FormatError where nothing explains any.
    """
    if metadata.get("format") == "fastlora":
        return "fastlora"
    keys = list(keys)
    counts = Counter(name for name in map(format_of, keys) if name is not None)
    if not counts:
        raise FormatError(
            f"expected the keys of an adapter, got {', '.join(keys[:3]) or 'none'}; formats known: "
            + "; ".join(f"{name} ({example})" for name, example in FORMATS.items())
        )
    return counts.most_common(1)[0][0]


def format_of(key: str) -> str | None:
    """The format that a key is of by itself; None for one that may be of any model."""
    if diffusers.KOHYA.fullmatch(key):
        return "kohya"
    if key.startswith(peft.PREFIX):
        return "peft"
    if original.KEY.fullmatch(key):
        return "original"
    return "diffusers" if diffusers.entry_of(key) else None


def only_file(folder: Path) -> Path:
    """The file of a folder that has the adapter."""
    found = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    weights = [p for p in found if p.suffix == ".safetensors"]
    named = [p for p in weights if p.name in FOLDER_FILES] or weights
    if not named:  # which `files.read` refuses, and says how to convert it
        named = [p for p in found if p.suffix in PICKLES][:1]
    if not named:
        raise FormatError(f"{folder}: expected a folder with a safetensors file, got none")
    if len(named) > 1:
        names = ", ".join(p.name for p in named[:10])
        raise FormatError(f"{folder}: expected one safetensors file, got {len(named)}: {names}")
    return named[0]


def config_beside(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Any] | None:
    """adapter_config.json, where there is one and the file's keys may be PEFT's."""
    path = file.parent / CONFIG
    if not path.is_file() or diffusers.SETTINGS in metadata:
        return None
    try:
        name = detect(tensors, metadata)
    except FormatError:  # another of PEFT's methods, whose name is in the settings
        name = "peft"
    bare = name == "diffusers" and any(peft.split(key) for key in tensors)  # without the prefix
    if name != "peft" and not bare:
        return None
    return files.read_json(path)
