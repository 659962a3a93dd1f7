"""Checkpoints of training runs: written whole or not at all, read without executing anything."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = "fastlora.training/1"


class CheckpointError(ValueError):
    """A file that is no checkpoint of this run."""


def ensure_writable(directory: str | Path, what: str = "output directory") -> Path:
    """Make the directory and write a byte into it, so that hours of training do not end at a full
    or read-only disk.

    Raises OSError (PermissionError, NotADirectoryError, ...) that says `what` and names the
    directory.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        message = f"{what} {directory}: expected a writable directory, got: {error.strerror}"
        raise type(error)(error.errno, message) from error
    return directory


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them; the old file stays until the new one
    is complete.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_checkpoint(
    path: str | Path, signature: dict[str, list[int]] | None = None
) -> dict[str, Any]:
    """The state of `save_checkpoint`, on the CPU; with `signature` (name -> shape) only if it
    belongs to that run.

    Raises CheckpointError for a truncated or foreign file, a pickle that would run code, or other
    parameters.
    """
    path = Path(path)
    content = io.BytesIO(path.read_bytes())  # a missing file is an OSError, all below is not
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error class for broken or unsafe files
        raise CheckpointError(
            f"checkpoint {path}: expected a file of fastlora's training, got one that does not read"
            f" as tensors ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = (
            state.get("format", "no format mark")
            if isinstance(state, dict)
            else type(state).__name__
        )
        raise CheckpointError(f"checkpoint {path}: expected format {FORMAT!r}, got {got!r}")
    if signature is not None and state.get("signature") != signature:
        theirs = state.get("signature") or {}
        names = sorted(n for n in {*signature, *theirs} if signature.get(n) != theirs.get(n))
        shown = ", ".join(f"{n} {theirs.get(n)} (expected {signature.get(n)})" for n in names[:3])
        raise CheckpointError(
            f"checkpoint {path}: expected this run's parameters, got {len(names)} others: {shown}"
        )
    return state
