"""Which names kohya's and LyCORIS' files have: `--family`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from fastlora.commands import CommandError

if TYPE_CHECKING:
    from fastlora.formats.changes import AdapterFile, Target
    from fastlora.formats.families import Family

NAMED = ("kohya", "lycoris")


def add_family_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--family",
        choices=("sd", "sdxl", "flux"),
        help="whose names kohya and lycoris have (default: as the modules or the file tell)",
    )


def family_for(
    format: str,
    stated: str | None,
    targets: Collection[Target],
    files: Sequence[AdapterFile] = (),
) -> Family | None:
    """The family that a file is written for; None for formats that do not ask.

    Raises CommandError where it is stated for such a format, and where nothing tells it.
    """
    from fastlora.formats.families import Family, family_of, keys_of
    from fastlora.formats.files import FormatError

    if format not in NAMED:
        if stated:
            raise CommandError(f"--family: only {' and '.join(NAMED)} have one, not {format}")
        return None
    if stated:
        return Family(stated, True)
    if format == "lycoris":  # a model by itself has names of its own there
        targets = [target for target in targets if target.component]
        if not targets:
            return None
    keys = keys_of(change for file in files for change in file.changes.values())
    try:
        return family_of(targets, keys, [file.metadata for file in files])
    except FormatError as error:
        asked = str(error).replace("say which: family ", "say which: --family ")
        raise CommandError(asked) from None


def choice(family: Family | None) -> list[str]:
    """The line that says that the family is a choice, if it is one."""
    if family is None or family.evident:
        return []
    return [f"with the names of {family.name}, as nothing tells the family: --family says it"]
