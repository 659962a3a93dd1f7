"""Decompositions on disk: one safetensors file for each distinct weight and way to decompose it.

An entry is named by a hash (BLAKE2b) of the weight's shape, dtype and bytes, then by the settings:
`<hash>.safetensors`, `<hash>-rank16.safetensors`. It has `u`, `s`, `vh` as `Factors` has them, and
`format`, `version`, `error`, `norm` and `digest` in its metadata: the hash of all of it and of the
entry's name, which every reading compares. Entries are written beside their place and renamed, so
that a process which dies, and several at once, leave whole ones. Nothing that is wrong with the
folder stops a decomposition: it is a warning. The folder may be deleted at any time.
"""

import hashlib
import os
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.adapters.decomposition import Factors, Settings, factors
from fastlora.adapters.specs import AdapterError
from fastlora.formats import files
from fastlora.ops._tuned import user_cache

FORMAT, VERSION = "fastlora factors", "2"
STALE = 3600  # seconds after which an unfinished file is nobody's any more

Cache = bool | str | os.PathLike[str] | None


def folder_of(cache: Cache) -> Path | None:
    """True: the folder that `FASTLORA_FACTORS` names (empty: none), else fastlora/factors in the
    user's cache folder. None, False, "": none. A path: that folder."""
    if cache is None or cache is False or cache == "":
        return None
    if cache is not True:
        try:
            return Path(cache)
        except TypeError:
            raise AdapterError(
                f"decompose: cache: expected True, False, None or a folder, got {cache!r}"
            ) from None
    given = os.environ.get("FASTLORA_FACTORS")
    if given is not None:
        return Path(given) if given else None
    return user_cache() / "factors"


def fingerprint(words: str, tensors: Iterable[Tensor]) -> str:
    """48 hex digits of a text and of tensors: their shapes, dtypes and bytes (BLAKE2b)."""
    found = hashlib.blake2b(words.encode(), digest_size=24)
    for tensor in tensors:
        found.update(f" {list(tensor.shape)} {tensor.dtype} ".encode())
        found.update(files.as_bytes(tensor).numpy().data)
    return found.hexdigest()


def digest(matrix: Tensor) -> str:
    """The hash of a matrix's shape, dtype and bytes."""
    return fingerprint(VERSION, [matrix])


def digest_of(path: Path, found: Factors) -> str:
    """The hash of an entry: what is in it, and where it belongs."""
    return fingerprint(f"{path.name} {found.error!r} {found.norm!r}", found[:3])


class FactorCache:
    """The entries in one folder (None: no cache). Threads may share it."""

    def __init__(self, folder: Path | None, writes: bool) -> None:
        self.folder = folder
        self.writes = writes and folder is not None
        self.problems: list[str] = []
        self.swept = False

    def warn(self) -> None:
        """Says what was wrong; last, for warnings may be errors."""
        for problem in self.problems:
            warnings.warn(f"fastlora: {problem}", RuntimeWarning, stacklevel=3)

    @property
    def reads(self) -> bool:
        return self.folder is not None and (self.writes or self.folder.is_dir())

    def file(self, key: str, settings: Settings) -> Path:
        assert self.folder is not None
        name = key
        if settings.dtype == torch.float64:
            name += "-float64"
        if settings.rank is not None:
            name += f"-rank{settings.rank}"
        if settings.energy is not None:
            name += f"-energy{settings.energy!r}"
        return self.folder / f"{name}.safetensors"

    def read(self, key: str, settings: Settings, matrix: Tensor) -> Factors | None:
        """The entry on the matrix's device, on the CPU mapped into memory; None if there is none or
        it is not as it was written."""
        if not self.reads:
            return None
        path = self.file(key, settings)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                    raise ValueError(f"expected {FORMAT} {VERSION}, got metadata {metadata}")
                u, s, vh = (file.get_tensor(k) for k in ("u", "s", "vh"))
                found = Factors(u, s, vh, float(metadata["error"]), float(metadata["norm"]))
            if digest_of(path, found) != metadata["digest"]:
                raise ValueError("it is damaged: its content is not what its digest says")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            self.problems.append(f"{path} is ignored: {error}")
            return None
        return found.to(matrix.device)

    def write(self, key: str, settings: Settings, found: Factors) -> None:
        if not self.writes:
            return
        assert self.folder is not None
        path = self.file(key, settings)
        metadata = {"format": FORMAT, "version": VERSION, "digest": digest_of(path, found)}
        metadata |= {"error": repr(found.error), "norm": repr(found.norm)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.sweep()
            tensors = {"u": found.u, "s": found.s, "vh": found.vh}
            files.write(path, tensors, metadata)
        except OSError as error:
            if self.writes:  # said once, whatever other threads meet
                self.problems.append(f"factors are not kept: {error}")
            self.writes = False

    def complete(self, key: str, settings: Settings, found: Factors) -> None:
        """Writes the entry unless there is one."""
        if self.writes and not self.file(key, settings).exists():
            self.write(key, settings, found)

    def sweep(self) -> None:
        """Deletes what killed processes have left unfinished."""
        if self.swept:
            return
        self.swept = True
        assert self.folder is not None
        with suppress(OSError):
            for path in self.folder.glob(".*.safetensors.*"):
                with suppress(OSError):
                    if path.stat().st_mtime < time.time() - STALE:
                        path.unlink()


def obtain(
    matrix: Tensor, settings: Settings, cache: FactorCache, device: torch.device, key: str = ""
) -> tuple[Factors, bool]:
    """The decomposition on the matrix's device, and whether it was in the cache; else it is
    computed on `device` and kept. Raises LinAlgError as `factors`."""
    matrix = matrix.detach()
    if cache.reads and not key:
        key = digest(matrix)
    found = cache.read(key, settings, matrix)
    if found is not None:
        return found, True
    made = factors(matrix, settings, device).to(matrix.device)
    cache.write(key, settings, made)
    return made, False


def place(matrix: Tensor) -> torch.device:
    """Where a matrix is decomposed unless somebody says: on its own GPU, on any, or on the CPU."""
    if matrix.is_cuda:
        return matrix.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
