"""Safetensors files, read with errors that say what is wrong, written atomically."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlora.formats import header

TOGETHER = 2**22  # bytes of small tensors that are read at once
READERS = 2  # threads
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
        return self._together([key])[key]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, as `tensor` gives them, in the order of the header.

        Small ones that are neighbours in the file lie in memory of at most `TOGETHER` bytes, which
        is given back with the last of them.
        """
        found: dict[str, Tensor] = {}
        with ThreadPoolExecutor(READERS) as pool:  # most of it is the system clearing memory
            for part in pool.map(self._together, self._neighbours()):
                found |= part
        return {key: found[key] for key in self._entries}

    def _neighbours(self) -> Iterator[list[str]]:
        """The keys in pieces to read at once: of one dtype, one after another in the file."""
        entries = self._entries
        keys: list[str] = []
        for key in sorted(entries, key=lambda key: entries[key][2:]):
            entry = entries[key]
            if keys and (
                entry.dtype != entries[keys[0]].dtype
                or entry.stop - entries[keys[0]].start > TOGETHER
            ):
                yield keys
                keys = []
            keys.append(key)
        if keys:
            yield keys

    def _together(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Tensors that are neighbours."""
        first, last = self._entries[keys[0]], self._entries[keys[-1]]
        data = torch.empty(last.stop - first.start, dtype=torch.uint8, device="cpu")
        if not self._fill(data.numpy().data, self._begin + first.start):
            raise FormatError(f"{self.path}: {keys[0]}: the file became shorter while it was read")
        values = data.view(first.dtype)
        whole = is_sound(values)
        found, size = {}, first.dtype.itemsize
        for key in keys:
            _, shape, start, stop = self._entries[key]
            flat = values[(start - first.start) // size : (stop - first.start) // size]
            if not whole and not is_sound(flat):
                problem = (
                    "booleans of 0 or 1, got other bytes"
                    if first.dtype == torch.bool
                    else "finite values, got NaN or infinity"
                )
                raise FormatError(f"{self.path}: {key}: expected {problem}")
            found[key] = flat.view(shape)
        return found

    def _fill(self, memory: memoryview, offset: int) -> bool:
        """Reads the file from `offset` on into all of the memory, if it has as much."""
        done = 0
        while done < len(memory):  # one call reads at most 2 GB
            got = os.preadv(self._file.fileno(), [memory[done:]], offset + done)
            if not got:
                return False
            done += got
        return True

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


def is_sound(values: Tensor) -> bool:
    """No NaN and no infinity in a vector; no byte in a boolean that is none."""
    pieces = (values,) if len(values) <= PIECE else values.split(PIECE)
    return all(map(is_sound_piece, pieces))


def is_sound_piece(piece: Tensor) -> bool:
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
        return file.tensors(), file.metadata


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
