"""Copies of a checkpoint that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

# What a hub's client keeps in a folder beside the model.
NOT_COPIED = (".git", ".cache")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A path beside `out` for what is to be there: it gets the place when the block ends, and goes
    with all that is in it when the block fails. What is at `out` is exchanged then, not before.

    Raises FileNotFoundError without a folder to write into.
    """
    target = Path(os.path.realpath(out))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{out}: its folder does not exist")
    private = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    made, old = private / target.name, private / "old"
    try:
        yield made
        if target.is_dir():  # which nothing can be renamed onto
            target.rename(old)
        try:
            os.replace(made, target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(private, ignore_errors=True)


def copy(source: Path, to: Path, left_out: Collection[Path] = ()) -> None:
    """A file, or a folder with all that is in it but some files; links become what they lead to."""
    if source.is_file():
        shutil.copyfile(source, to)
        return

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [n for n in names if n in NOT_COPIED or Path(folder, n) in left_out]

    shutil.copytree(source, to, ignore=ignored, copy_function=shutil.copyfile)
