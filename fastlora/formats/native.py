"""fastlora's own file: `<module path>.<parameter>` in safetensors, its configuration in the header.

Parameters: `down`, `up`, `magnitude` of a LoRA, `shift` of a spectral shift. The header's metadata
has `format` = "fastlora", `version` = "2" and `config`, a JSON object:

- `kind`: "lora" or "spectral"; `method` = "svdiff" says what spectral shifts are shifts of.
- `settings`: the fields of a LoRA, or of a Spectral (`norms`: "elementwise", "scalar").
- `modules`: for every module path the fields that differ there.
- `embeddings`, where there are LoRAs of some: their paths. Their `down` is `[rank, vocabulary]` and
  the product of the two is the weight transposed.
- `base_hash`, of spectral shifts: by module path five numbers about the base's weight, its
  Frobenius norm and four sums over that norm. It is a hash that rounding does not change by much:
  a copy of the base in bfloat16 has nearly the same, another base has not.

The number of shifts of a matrix is its tensor's length: the rank of the decomposition.

Version "1" had all settings of every module in `modules`, and `weight_prints` for `base_hash`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastlora.formats.changes import AdapterFile, Change, LowRank, Packed, Shift, Target
from fastlora.formats.files import FormatError
from fastlora.formats.patterns import number

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
    if "embeddings" in content:
        if not isinstance(content["embeddings"], list):
            raise TypeError("embeddings is not a list of modules")
        config["embeddings"] = content["embeddings"]
    hashes = content.get("weight_prints" if version == "1" else "base_hash")
    if kind == "spectral":
        config["base_hash"] = hashes if isinstance(hashes, dict) else {}
    return config


def key_of(path: str, parameter: str) -> str:
    """A parameter's key; the model itself, when it is the adapted layer, has the path ""."""
    return f"{path}.{parameter}" if path else parameter


def adapter_file(tensors: dict[str, Tensor], metadata: dict[str, str], source: str) -> AdapterFile:
    """The file as changes. Raises FormatError naming `source` and what is wrong with it."""
    modules, config = unpack(tensors, metadata, source)
    try:
        return AdapterFile("fastlora", changes_of(modules, config), {}, metadata)
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from None


def changes_of(
    modules: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> dict[Target, Change]:
    """Each module's parameters and settings, as `unpack` gives them, as a change."""
    changes: dict[Target, Change] = {}
    embeddings = {path for path in config.get("embeddings", ()) if isinstance(path, str)}
    for path, own in modules.items():
        keys = tuple(key_of(path, parameter) for parameter in own)
        fields = config["modules"][path]
        try:
            if config["kind"] == "spectral":
                hashes = config["base_hash"].get(path)
                shift = Shift(own["shift"], fields.get("norms", "elementwise"), hashes)
                change = Change(shift, keys=keys)
            else:
                weight = replace(_low_rank(own, fields), embedding=path in embeddings)
                # Of the outputs, which an embedding's weight has as columns.
                axis = "in" if weight.embedding else "out"
                change = Change(weight, None, own.get("magnitude"), axis, keys=keys)
        except KeyError as missing:
            raise FormatError(f"{path}: no {missing.args[0]}") from None
        except ValueError as error:
            raise FormatError(f"{path}: {error}") from None
        changes[Target("", path)] = change
    return changes


def pack_changes(changes: Mapping[Target, Change]) -> Packed:
    """The file of LoRAs, or of spectral shifts, for one model: the component is left out.

    Raises FormatError for two components, for both kinds at once, and for other changes.
    """
    components = sorted({target.component for target in changes})
    if len(components) > 1:
        raise FormatError(f"a fastlora file is for one model; write each of {components} by itself")
    modules: dict[str, dict[str, Tensor]] = {}
    settings: dict[str, dict[str, Any]] = {}
    kinds: dict[str, Target] = {}
    for target, change in changes.items():
        if target.flat:
            raise FormatError(
                f"{target}: expected the path of a module, whose dots this name does not tell; load"
                " it into the model, and save that"
            )
        kind, modules[target.path], settings[target.path] = _written(target, change)
        kinds.setdefault(kind, target)
    if len(kinds) != 1:
        raise FormatError(f"expected LoRAs or spectral shifts, got {kinds or 'no changes'}")
    (kind,) = kinds
    config: dict[str, Any] = {"kind": kind, "modules": settings}
    if embeddings := [t.path for t, c in changes.items() if getattr(c.weight, "embedding", False)]:
        config["embeddings"] = embeddings
    if kind == "spectral":
        shifts = {t.path: c.weight for t, c in changes.items() if isinstance(c.weight, Shift)}
        config["base_hash"] = {path: s.base_hash for path, s in shifts.items() if s.base_hash}
    return Packed(*pack(modules, config))


def _low_rank(own: Mapping[str, Tensor], fields: Mapping[str, Any]) -> LowRank:
    """Raises KeyError for a tensor that is missing, ValueError for a setting that is none."""
    _check_settings(fields)
    rank, dora = fields.get("rank"), fields.get("dora", False)
    for name in PARAMETERS["lora"] if dora else PARAMETERS["lora"][:2]:
        if name not in own:
            raise ValueError(f"{name}: expected a tensor, got nothing")
    if not dora and "magnitude" in own:
        raise ValueError("magnitude: expected none for a LoRA without dora")
    down, up = own["down"], own["up"]
    if not _fit(down, up):
        raise ValueError(
            f"expected down [rank, in] and up [out, rank], got {[*down.shape]} and {[*up.shape]}"
        )
    if dora and own["magnitude"].shape != up.shape[:1]:
        raise ValueError(f"magnitude: expected [{len(up)}], got {[*own['magnitude'].shape]}")
    if rank not in (None, down.shape[0]):
        raise ValueError(f"down: expected rank {rank}, got {[*down.shape]}")
    alpha, stabilized = fields.get("alpha"), fields.get("rank_stabilized", False)
    return LowRank(down, up, alpha, stabilized, dropout=fields.get("dropout", 0.0))


def _check_settings(fields: Mapping[str, Any]) -> None:
    """Raises ValueError for a LoRA's setting that is unknown, of a wrong type or out of range."""
    strangers = sorted(set(fields) - {"rank", "alpha", "rank_stabilized", "dropout", "dora"})
    if strangers:
        raise ValueError(f"unknown settings {strangers}")
    for name in ("rank_stabilized", "dora"):
        value = fields.get(name, False)
        if not isinstance(value, bool):  # 'no' would be taken as yes
            raise ValueError(f"{name}: expected True or False, got {value!r}")
    rank = fields.get("rank", 1)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 2**31:
        raise ValueError(f"rank: expected an integer >= 1 and below 2^31, got {rank!r:.40}")
    if fields.get("alpha") is not None and number("alpha", fields["alpha"]) == 0:
        raise ValueError("alpha: expected a number that is not 0, got 0")
    if not 0 <= number("dropout", fields.get("dropout", 0.0)) < 1:
        raise ValueError(f"dropout: expected a value in [0, 1), got {fields['dropout']!r}")


def holder(change: Change) -> str:
    """The format for what is no LoRA."""
    lora = isinstance(change.weight, LowRank) and change.weight.mid is None
    return "peft" if lora and change.bias is not None else "lycoris"


def _fit(down: Tensor, up: Tensor) -> bool:
    """Whether they make an update; a grouped convolution has up [out, rank / groups, 1, 1]."""
    if down.dim() < 2 or up.dim() < 2 or 0 in (down.shape[0], up.shape[1]):
        return False
    groups, left = divmod(down.shape[0], up.shape[1])
    fits = left == 0 and groups > 0 and len(up) % groups == 0 and set(up.shape[2:]) <= {1}
    return fits and (groups == 1 or down.dim() > 2)


def _written(target: Target, change: Change) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Kind, parameters and settings of a change."""
    weight = change.weight
    if isinstance(weight, Shift):
        return "spectral", {"shift": weight.shift}, {"norms": weight.norms}
    if not isinstance(weight, LowRank) or change.bias is not None:
        also = " with a bias" if weight is not None and change.bias is not None else ""
        raise FormatError(
            f"{target}: a fastlora file has LoRAs without bias and spectral shifts, got "
            f"{change.kind}{also}; a {holder(change)} file can hold it"
        )
    if change.magnitude is not None and change.axis != ("in" if weight.embedding else "out"):
        raise FormatError(f"{target}: a fastlora file has magnitudes of outputs, not of inputs")
    weight = weight.without_mid()
    up = weight.up if change.rows is None else weight.up[change.rows[0] : change.rows[1]]
    parameters = {"down": weight.down, "up": up}
    if change.magnitude is not None:
        parameters["magnitude"] = change.magnitude
    settings = {
        "rank": weight.rank,
        "alpha": weight.alpha,
        "rank_stabilized": weight.rank_stabilized,
        "dropout": weight.dropout,
        "dora": change.magnitude is not None,
    }
    return "lora", parameters, settings
