"""fastlora's own file: `<module path>.<parameter>` in safetensors, its configuration in the header.

Parameters: `down`, `up`, `magnitude` of a LoRA, `shift` of a spectral shift. The header's metadata
has `format` = "fastlora", `version` and `config`, a JSON object: `kind`, `modules` (path to the
settings of that module) and, for spectral shifts, `weight_prints` (a few numbers about every base
weight, so that shifts are never put on another base).
"""

import json
from typing import Any

from torch import Tensor

from fastlora.formats.files import FormatError

VERSION = "1"
PARAMETERS = {"lora": ("down", "up", "magnitude"), "spectral": ("shift",)}


def pack(
    modules: dict[str, dict[str, Tensor]], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors and metadata for each module's parameters."""
    tensors = {key_of(p, k): t for p, own in modules.items() for k, t in own.items()}
    metadata = {"format": "fastlora", "version": VERSION, "config": json.dumps(config)}
    return tensors, metadata


def unpack(
    tensors: dict[str, Tensor], metadata: dict[str, str], source: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The inverse of `pack`. Raises FormatError naming `source` and what is wrong with it."""
    if metadata.get("format") != "fastlora":
        example = next(iter(tensors), "nothing")
        raise FormatError(
            f"{source}: expected a fastlora adapter (metadata format=fastlora), got metadata "
            f"{sorted(metadata)} and keys like {example!r}"
        )
    if metadata.get("version") != VERSION:
        raise FormatError(
            f"{source}: expected version {VERSION} of the format, got {metadata.get('version')!r}"
        )
    try:
        config = json.loads(metadata["config"])
        kind, settings = config["kind"], config["modules"]
        allowed = PARAMETERS[kind]
        if not isinstance(settings, dict) or not settings:
            raise TypeError("modules is not an object with at least one module")
        if not all(isinstance(fields, dict) for fields in settings.values()):
            raise TypeError("the settings of a module are not an object")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{source}: its configuration cannot be read: {error!r}") from None
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, parameter = key.rpartition(".")
        fits = path in settings and parameter in allowed
        if not fits or key != key_of(path, parameter):
            raise FormatError(f"{source}: unexpected key {key!r}")
        modules.setdefault(path, {})[parameter] = tensor
    missing = sorted(set(settings) - set(modules))
    if missing:
        raise FormatError(f"{source}: no tensors for {missing[:5]}")
    return modules, config


def key_of(path: str, parameter: str) -> str:
    """A parameter's key; the model itself, when it is the adapted layer, has the path ""."""
    return f"{path}.{parameter}" if path else parameter
