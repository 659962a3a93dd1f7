"""fastlora's own file: `<module path>.<parameter>` in safetensors, its configuration in the header.

Parameters: `down`, `up`, `magnitude` of a LoRA, `shift` of a spectral shift. The header's metadata
has `format` = "fastlora", `version` = "2" and `config`, a JSON object:

- `kind`: "lora" or "spectral"; `method` = "svdiff" says what spectral shifts are shifts of.
- `settings`: the fields of a LoRA, or of a Spectral (`norms`: "elementwise", "scalar").
- `modules`: for every module path the fields that differ there.
- `base_hash`, of spectral shifts: by module path five numbers about the base's weight, its
  Frobenius norm and four sums over that norm. It is a hash that rounding does not change by much:
  a copy of the base in bfloat16 has nearly the same, another base has not.

The number of shifts of a matrix is its tensor's length: the rank of the decomposition.

Version "1" had all settings of every module in `modules`, and `weight_prints` for `base_hash`.
"""

import json
from typing import Any

from torch import Tensor

from fastlora.formats.files import FormatError

VERSION = "2"
PARAMETERS = {"lora": ("down", "up", "magnitude"), "spectral": ("shift",)}
METHOD = {"spectral": "svdiff"}


def pack(
    modules: dict[str, dict[str, Tensor]], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The file's tensors and metadata for each module's parameters.

    `config` has `kind`, `modules` (path to settings) and, for spectral shifts, `base_hash` (path to
    five numbers).
    """
    tensors = {key_of(p, k): t for p, own in modules.items() for k, t in own.items()}
    every = list(config["modules"].values())
    common = {k: v for k, v in every[0].items() if all(k in s and s[k] == v for s in every)}
    content = {
        **config,
        **({"method": METHOD[config["kind"]]} if config["kind"] in METHOD else {}),
        "settings": common,
        "modules": {
            path: {k: v for k, v in own.items() if k not in common}
            for path, own in config["modules"].items()
        },
    }
    text = json.dumps(content, separators=(",", ":"))  # a model has hundreds of modules
    return tensors, {"format": "fastlora", "version": VERSION, "config": text}


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
    if metadata.get("version") not in ("1", VERSION):
        raise FormatError(
            f"{source}: expected version 1 or {VERSION} of the format, got "
            f"{metadata.get('version')!r}"
        )
    try:
        config = read_config(json.loads(metadata["config"]), metadata["version"])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{source}: its configuration cannot be read: {error!r}") from None
    settings, allowed = config["modules"], PARAMETERS[config["kind"]]
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


def read_config(content: Any, version: str) -> dict[str, Any]:
    """`config` as `pack` takes it. Raises KeyError or TypeError where it is none."""
    kind, settings = content["kind"], content["modules"]
    if kind not in PARAMETERS:
        raise KeyError(kind)
    if not isinstance(settings, dict) or not settings:
        raise TypeError("modules is not an object with at least one module")
    if not all(isinstance(fields, dict) for fields in settings.values()):
        raise TypeError("the settings of a module are not an object")
    common = {} if version == "1" else content["settings"]
    if not isinstance(common, dict):
        raise TypeError("settings is not an object")
    method = content.get("method", "svdiff")
    if kind in METHOD and method != METHOD[kind]:
        raise TypeError(f"expected method {METHOD[kind]!r}, got {method!r}")
    config = {"kind": kind, "modules": {p: {**common, **own} for p, own in settings.items()}}
    hashes = content.get("weight_prints" if version == "1" else "base_hash")
    if kind == "spectral":
        config["base_hash"] = hashes if isinstance(hashes, dict) else {}
    return config


def key_of(path: str, parameter: str) -> str:
    """A parameter's key; the model itself, when it is the adapted layer, has the path ""."""
    return f"{path}.{parameter}" if path else parameter
