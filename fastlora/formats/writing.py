"""Changes into a file of any format that has a writer."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fastlora.formats import diffusers, files, kohya, lycoris, native, peft
from fastlora.formats.changes import Change, Packed, Target
from fastlora.formats.detect import CONFIG
from fastlora.formats.files import FormatError

STYLES: dict[str, diffusers.Style] = {name: style for style, name in diffusers.NAMES.items()}
NAMED = {"kohya": kohya.pack, "lycoris": lycoris.pack}
WEIGHTS = "adapter_model.safetensors"


def pack(changes: Mapping[Target, Change], format: str, family: str | None = None) -> Packed:
    """The changes as "fastlora", "peft", "diffusers", "diffusers-lora", "diffusers-old", "kohya" or
    "lycoris"; `family`: whose names the last two have, None: as `family_of` tells.

    Raises FormatError naming what the format cannot hold.
    """
    if not changes:
        raise FormatError("expected at least one change to write, got none")
    if format != "fastlora" and any(not target.path for target in changes):
        raise FormatError(
            f"the model is itself the layer that is adapted, and {format} has no name for that;"
            ' expected format "fastlora"'
        )
    if format in NAMED:
        return NAMED[format](changes, family)
    if family is not None:
        raise FormatError(f"family {family}: only {' and '.join(NAMED)} have names by family")
    if format in STYLES:
        return diffusers.pack(changes, style=STYLES[format])
    writers = {
        "fastlora": native.pack_changes,
        "peft": peft.pack,
    }
    return writers[format](changes)


def write(path: str | os.PathLike[str], packed: Packed) -> None:
    """Writes a file, or for PEFT a folder, whole or not at all.

    A folder that is there already keeps its other files, and has the two of PEFT exchanged one
    after the other. Raises the errors of `files.write`.
    """
    if packed.config is None:
        files.write(path, packed.tensors, packed.metadata)
        return
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: its directory does not exist")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{path}: expected a folder or nothing, got a file")
    made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        files.write(made / WEIGHTS, packed.tensors, packed.metadata)
        (made / CONFIG).write_text(json.dumps(packed.config, indent=2) + "\n", "utf-8")
        if target.exists():
            for name in (WEIGHTS, CONFIG):
                os.replace(made / name, target / name)
        else:
            umask = os.umask(0)
            os.umask(umask)
            made.chmod(0o777 & ~umask)  # mkdtemp makes private folders
            made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
