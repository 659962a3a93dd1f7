"""Files of kohya's sd-scripts: `<prefix>_<path with "." as "_">.<part>`, LoRA; LyCORIS' are alike.

Prefixes: `lora_unet` (also of FLUX' transformer), `lora_transformer`, `lora_te`, `lora_te1` to
`lora_te3`, `lycoris`; parts: `_kohya_parts`. The scale of every module is its own alpha / rank.
Read from sd-scripts' networks/lora.py and resize_lora.py, and LyCORIS 3.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from fastlora.formats import names
from fastlora.formats._kohya_fused import split
from fastlora.formats._kohya_parts import KNOWN, LYCORIS, change_of, foreign
from fastlora.formats._kohya_write import write
from fastlora.formats.changes import AdapterFile, Change, LowRank, Packed, Shift, Target
from fastlora.formats.families import family_of, keys_of
from fastlora.formats.files import FormatError
from fastlora.formats.names import Place

_NAME = re.compile(
    r"(lora_unet|lora_transformer|lora_te[123]?|lycoris_(?:unet|te[123]?)|lycoris)_(.+)"
)
_FLUX = re.compile(r"lora_unet_(double|single)_blocks_|lora_transformer_single_transformer_blocks_")


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterFile:
    """All that such a file says, views of its tensors; `format` is "lycoris" if not all is LoRA.

    Values are read of alphas only. Raises FormatError naming the module where parts are missing,
    are of several algorithms, or do not fit each other, and where two names mean one module.
    """
    modules: dict[str, dict[str, str]] = {}  # name: part: key
    for key in tensors:
        name, _, part = key.partition(".")
        modules.setdefault(name, {})[part] = key
    family = _family(modules, metadata)
    changes: dict[Target, Change] = {}
    unused: dict[str, str] = {}
    for name, keys in modules.items():
        found = _module(name, keys, tensors, family)
        if isinstance(found, str):
            unused.update(dict.fromkeys(keys.values(), found))
            continue
        unused.update({k: "not a part that is known" for p, k in keys.items() if p not in KNOWN})
        for target, change in found.items():
            if target in changes:
                other = changes[target].keys[0].partition(".")[0]
                raise FormatError(f"{name}: expected one name for {target}, got {other} as well")
            changes[target] = change
    lycoris = any(not LYCORIS.isdisjoint(keys) for keys in modules.values())
    return AdapterFile("lycoris" if lycoris else "kohya", changes, unused, dict(metadata))


def pack(changes: Mapping[Target, Change], family: str | None = None) -> Packed:
    """The file for LoRA and DoRA of a "sd", "sdxl" or "flux" model; None: as `family_of` tells.

    Raises FormatError naming the target that such a file cannot have, and the way out.
    """
    for target, change in changes.items():
        if not isinstance(change.weight, LowRank | Shift) or change.bias is not None:
            also = " with a bias" if change.weight is not None and change.bias is not None else ""
            raise FormatError(
                f"{target}: expected LoRA, got {change.kind}{also}; write a LyCORIS file instead"
            )
    if family is None:
        family = family_of(changes, keys_of(changes.values())).name
    return write(changes, family, "networks.lora_flux" if family == "flux" else "networks.lora")


def _family(modules: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """Whether other names have the meaning that they have in files for FLUX."""
    flux = metadata.get("ss_base_model_version", "").startswith("flux")
    return "flux" if flux or any(map(_FLUX.match, modules)) else None


def _module(
    name: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor], family: str | None
) -> dict[Target, Change] | str:
    """The Changes that a name stands for, or in words why there are none."""
    match = _NAME.fullmatch(name)
    if match is None:
        return "not a name of kohya's, which begin with lora_unet_, lora_te_ or the like"
    if meaning := foreign(keys):
        return f"not supported: {meaning}"
    parts = {part: tensors[key] for part, key in keys.items() if part in KNOWN}
    if parts.keys() <= {"alpha"}:
        return "an alpha without weights" if parts else "not a part that is known"
    used = tuple(key for part, key in keys.items() if part in KNOWN)
    change = replace(change_of(name, parts), keys=used)
    prefix, flat = match[1].replace("lycoris_", "lora_"), match[2]
    return split(change, names.places(prefix, flat, family) or (_flat(prefix, flat, family),))


def _flat(prefix: str, flat: str, family: str | None) -> Place:
    """A name that only a model can tell, in the component that its prefix means."""
    denoiser = "transformer" if family == "flux" or prefix == "lora_transformer" else "unet"
    return Place(Target(denoiser, flat, flat=True))
