"""Which family's names a kohya or LyCORIS file has to have for a model's modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from fastlora.formats import names
from fastlora.formats.changes import Change, Target
from fastlora.formats.files import FormatError

FAMILIES = ("sd", "sdxl", "flux")
_VERSIONS = {"sd_v": "sd", "sdxl": "sdxl", "flux": "flux"}  # how ss_base_model_version begins
_PREFIX = re.compile(r"(?:lora|lycoris)_(te[123]?)_")


class Family(NamedTuple):
    name: str
    evident: bool  # False: a choice, as nothing tells


def family_of(
    targets: Collection[Target],
    keys: Iterable[str] = (),
    metadata: Iterable[Mapping[str, str]] = (),
) -> Family:
    """The family of "sd", "sdxl" and "flux" that has these modules.

    Told by the paths; where these are of none alone, by what trainers wrote into `metadata`, then
    by the text encoders' prefixes in `keys` of the files that the changes are from. A text encoder
    alone without any of these is Stable Diffusion's. Raises FormatError where all of it does not
    tell, and where the paths are of several.
    """
    try:
        return Family(names.family(targets), True)
    except FormatError as error:
        found = _stated(metadata) or _by_prefix(keys)
        if found is not None and not names.evidence(targets):
            return Family(found, True)
        if targets and all(target.component == "text_encoder" for target in targets):
            return Family("sd", False)
        raise FormatError(f"{error}; say which: family {', '.join(FAMILIES)}") from None


def keys_of(changes: Iterable[Change]) -> list[str]:
    """The keys of the files that changes were read from."""
    return [key for change in changes for key in change.keys]


def _stated(metadata: Iterable[Mapping[str, str]]) -> str | None:
    versions = [own.get("ss_base_model_version", "") for own in metadata]
    found = {f for start, f in _VERSIONS.items() if any(v.startswith(start) for v in versions)}
    return found.pop() if len(found) == 1 else None


def _by_prefix(keys: Iterable[str]) -> str | None:
    """`lora_te` is SD's; `lora_te1` is called the same in SDXL and FLUX, `lora_te2` is SDXL's, and
    with `lora_te3` SD3's, which has no family here."""
    found = {match[1] for match in map(_PREFIX.match, keys) if match}
    if found == {"te"}:
        return "sd"
    return "sdxl" if found and found <= {"te1", "te2"} else None
