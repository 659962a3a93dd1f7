"""Safetensors files, read with errors that say what is wrong, written atomically."""

import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class FormatError(ValueError):
    """A file is not what it should be: the file, what was expected, what was found."""


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises FileNotFoundError, or FormatError for a pickle, a truncated or foreign file, and for NaN
    or infinite values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        # Only now: the header's length, with which a safetensors file begins, may be these bytes.
        with path.open("rb") as file:
            head = file.read(2)
        if head[:1] == b"\x80" or head == b"PK":
            raise FormatError(
                f"{path}: expected a safetensors file, got a pickle (.pt, .bin, .ckpt), which may "
                "run code when it is read; convert it with torch.load(..., weights_only=True) and "
                "safetensors.torch.save_file"
            ) from None
        raise FormatError(f"{path}: not a safetensors file, or a truncated one: {error}") from None
    for key, tensor in tensors.items():
        values = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite lacks float8
        if tensor.is_floating_point() and not torch.isfinite(values).all():
            raise FormatError(f"{path}: {key}: expected finite values, got NaN or infinity")
    return tensors, metadata


def write(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Writes beside the target and renames: the file is there whole or as it was before.

    A symbolic link stays one: what it points to is replaced. Raises FileNotFoundError without a
    directory to write into, FileExistsError where something else than a regular file has the path,
    and the OSError of a write that failed, all with the path that was given.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: its directory does not exist")
    if os.path.lexists(target) and (target.is_symlink() or not target.is_file()):
        raise FileExistsError(f"{path}: expected a regular file or none, got {kind_of(target)}")
    try:
        replace(target, tensors, metadata)
    except (OSError, SafetensorError) as error:  # which names the temporary file, or none
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise OSError(f"{path}: {error}") from None


def kind_of(path: Path) -> str:
    if path.is_symlink():  # still one after all were followed
        return "symbolic links in a circle"
    return "a directory" if path.is_dir() else "a device, pipe or socket"


def replace(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
        save_file(copies, temporary, metadata)  # which refuses tensors that share memory
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
