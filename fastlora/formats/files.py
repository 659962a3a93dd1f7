"""Safetensors files, read with errors that say what is wrong, written atomically."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlora.formats import header

PIECE = 2**17  # elements whose values are looked at together
# The exponent's bits, which are all ones in NaN and infinity.
EXPONENTS: dict[torch.dtype, tuple[Any, int]] = {
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float32: (np.uint32, 0x7F800000),
    torch.complex64: (np.uint32, 0x7F800000),
    torch.float64: (np.uint64, 0x7FF0000000000000),
    torch.complex128: (np.uint64, 0x7FF0000000000000),
}


class FormatError(ValueError):
    """A file is not what it should be: the file, what was expected, what was found."""


class Info(NamedTuple):
    """What a file says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


class SafetensorsFile:
    """A safetensors file, open: its header is read and checked at once, a tensor when asked for.

        with SafetensorsFile(path) as file:
            down = file.tensor("down")

    Nothing is mapped: tensors are in memory of their own, and stay what they are whatever happens
    to the file. A file that is replaced (by `write`) while this one is open is still the old one
    here.

    Raises FileNotFoundError, or FormatError for what is no regular file, a pickle, a truncated or
    foreign file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            if self.path.exists():
                raise FormatError(
                    f"{path}: expected a regular file, got {kind_of(self.path.resolve())}"
                )
            raise FileNotFoundError(f"{path}: no such file")
        self._file = self.path.open("rb")
        try:
            self._entries, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    @property
    def keys(self) -> list[str]:
        """In the order of the header."""
        return list(self._entries)

    def info(self, key: str) -> Info:
        entry = self._entries[key]
        return Info(entry.dtype, entry.shape, entry.stop - entry.start)

    def offset(self, key: str) -> int:
        """Of a tensor's first byte in the file."""
        return self._begin + self._entries[key].start

    def tensor(self, key: str) -> Tensor:
        """The tensor on the CPU, the only copy. Raises FormatError for NaN and infinite values."""
        entry = self._entries[key]
        data = torch.empty(entry.stop - entry.start, dtype=torch.uint8, device="cpu")
        self._file.seek(self._begin + entry.start)
        if self._file.readinto(data.numpy().data) != len(data):
            raise FormatError(f"{self.path}: {key}: the file became shorter while it was read")
        values = data.view(entry.dtype)
        pieces = (values,) if len(values) <= PIECE else values.split(PIECE)
        if not all(map(is_sound, pieces)):
            problem = (
                "booleans of 0 or 1, got other bytes"
                if entry.dtype == torch.bool
                else "finite values, got NaN or infinity"
            )
            raise FormatError(f"{self.path}: {key}: expected {problem}")
        return values.view(entry.shape)

    def outline(self) -> dict[str, Tensor]:
        """All tensors, without values on the meta device, but for those of at most one element."""
        return {
            key: self.tensor(key)
            if entry.stop - entry.start <= entry.dtype.itemsize
            else torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for key, entry in self._entries.items()
        }

    def _read_header(self) -> header.Header:
        size = os.fstat(self._file.fileno()).st_size
        start = self._file.read(header.LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        self._begin = header.LENGTH_BYTES + length
        try:
            if self._begin > size or len(start) < header.LENGTH_BYTES:
                raise ValueError(f"expected a header of {length} bytes, got a file of {size}")
            if length > header.LIMIT:
                raise ValueError(f"expected a header of at most {header.LIMIT} bytes, got {length}")
            return header.parse(self._file.read(length), size - self._begin)
        except ValueError as error:
            # Only now: the header's length, with which a safetensors file begins, may be these.
            if start[:1] == b"\x80" or start[:2] == b"PK":
                raise FormatError(
                    f"{self.path}: expected a safetensors file, got a pickle (.pt, .bin, .ckpt), "
                    "which may run code when it is read; convert it with torch.load(..., "
                    "weights_only=True) and safetensors.torch.save_file"
                ) from None
            raise FormatError(
                f"{self.path}: not a safetensors file, or a truncated one: {error}"
            ) from None


def is_sound(piece: Tensor) -> bool:
    """No NaN and no infinity in a vector; no byte in a boolean that is none."""
    if piece.dtype == torch.bool:
        return not (piece.view(torch.uint8) > 1).any()
    if piece.numel() == 0 or not (piece.is_floating_point() or piece.is_complex()):
        return True
    if piece.dtype not in EXPONENTS:  # float8
        piece = piece.float()
    # Bits on one thread are quicker than values on several, the more so on a busy machine.
    integer, ones = EXPONENTS[piece.dtype]
    bits = piece.view(torch.uint8).numpy().view(integer)
    return int((bits & ones).max()) != ones


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file, or the errors of `SafetensorsFile`."""
    with SafetensorsFile(path) as file:
        return {key: file.tensor(key) for key in file.keys}, file.metadata


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes beside the target and renames: the file is there whole or as it was before.

    Tensors may share memory, be strided or on other devices: they are copied one at a time where
    they have to be. A symbolic link stays one: what it points to is replaced. Raises FormatError
    for what safetensors cannot hold, FileNotFoundError without a directory to write into,
    FileExistsError where something else than a regular file has the path, and the OSError of a
    write that failed, all with the path that was given.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path}: its directory does not exist")
    if os.path.lexists(target) and (target.is_symlink() or not target.is_file()):
        raise FileExistsError(f"{path}: expected a regular file or none, got {kind_of(target)}")
    try:
        replace(target, tensors, metadata)
    except OSError as error:  # which names the temporary file, or none
        if error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise OSError(f"{path}: {error}") from None
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file beside the tensors: settings, an index of shards."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def kind_of(path: Path) -> str:
    if path.is_symlink():  # still one after all were followed
        return "symbolic links in a circle"
    return "a directory" if path.is_dir() else "a device, pipe or socket"


def replace(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_file(tensors: Mapping[str, Tensor], path: str, metadata: Mapping[str, str]) -> None:
    start, order = header.layout(tensors, metadata)
    with open(path, "wb") as file:
        file.write(start)
        for key in order:
            file.write(as_bytes(tensors[key]).numpy().data)


def as_bytes(tensor: Tensor) -> Tensor:
    """The values in order, uint8 on the CPU: the tensor's own memory where that has them so."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    # Not view(-1): one element is contiguous with any stride, and would keep it.
    return plain.contiguous().as_strided((plain.numel(),), (1,)).view(torch.uint8)
