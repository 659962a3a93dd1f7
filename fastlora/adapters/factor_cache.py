"""Decompositions on disk: one safetensors file for each distinct weight and way to decompose it.

An entry is named by a hash (BLAKE2b) of the weight's shape, dtype and bytes, then by the settings:
`<hash>.safetensors`, `<hash>-rank16.safetensors`. It has `u`, `s`, `vh` as `Factors` has them, and
`format`, `version`, `error` and `norm` in its metadata. Entries are written beside their place and
renamed, so that a process which dies, and several at once, leave whole ones. Nothing that is wrong
with the folder stops a decomposition: it is a warning. The folder may be deleted at any time.
"""

import hashlib
import math
import os
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlora.adapters.decomposition import Factors, Settings, factors, length
from fastlora.adapters.specs import AdapterError
from fastlora.adapters.tensors import full_precision
from fastlora.formats import files
from fastlora.ops._tuned import user_cache

FORMAT, VERSION = "fastlora factors", "1"
STALE = 3600  # seconds after which an unfinished file is nobody's any more

Cache = bool | str | os.PathLike[str] | None


def folder_of(cache: Cache) -> Path | None:
    """True: the folder that `FASTLORA_FACTORS` names (empty: none), else fastlora/factors in the
    user's cache folder. None, False: none. A path: that folder."""
    if cache is None or cache is False:
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


@torch.no_grad()
def digest(matrix: Tensor) -> str:
    """The hash of a matrix's shape, dtype and bytes."""
    matrix = matrix.detach().cpu().contiguous()
    found = hashlib.blake2b(f"{VERSION} {list(matrix.shape)} {matrix.dtype} ".encode())
    found.update(matrix.view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer
    return found.hexdigest()[:48]


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
        """The entry, mapped into memory on the CPU, on any other device read to it; None if there
        is none or it cannot be right."""
        if not self.reads:
            return None
        path = self.file(key, settings)
        try:
            with safe_open(path, "pt", device=str(matrix.device)) as file:
                metadata = file.metadata() or {}
                if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                    raise ValueError(f"expected {FORMAT} {VERSION}, got metadata {metadata}")
                tensors = [file.get_tensor(k) for k in ("u", "s", "vh")]
                numbers = [float(metadata[k]) for k in ("error", "norm")]
            found = Factors(*tensors, *numbers)
            check(found, settings, matrix)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            self.problems.append(f"{path} is ignored: {error}")
            return None
        return found

    def write(self, key: str, settings: Settings, found: Factors) -> None:
        if not self.writes:
            return
        assert self.folder is not None
        metadata = {"format": FORMAT, "version": VERSION}
        metadata |= {"error": repr(found.error), "norm": repr(found.norm)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.sweep()
            tensors = {"u": found.u, "s": found.s, "vh": found.vh}
            files.write(self.file(key, settings), tensors, metadata)
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


def check(found: Factors, settings: Settings, matrix: Tensor) -> None:
    """Raises ValueError where an entry cannot be the decomposition of the matrix.

    Beside shapes, a random vector x: `Uᵀ (W x) = σ Vᵀ x`, up to the rounding of the factors, also
    where they are truncated. That reads all of them once.
    """
    u, s, vh, error, norm = found
    if s.dim() != 1:
        raise ValueError(f"expected singular values [rank], got {list(s.shape)}")
    (out, features), rank = matrix.shape, len(s)
    full = min(out, features)
    wide = torch.promote_types(matrix.dtype, torch.float32)
    shapes = [(out, rank), (rank,), (rank, features)]
    dtypes = [matrix.dtype, wide, matrix.dtype]
    if [tuple(t.shape) for t in found[:3]] != shapes or [t.dtype for t in found[:3]] != dtypes:
        raise ValueError(f"expected factors of a {matrix.dtype} {list(matrix.shape)}")
    expected = full if settings.rank is None else min(settings.rank, full)
    if not 1 <= rank <= full or (settings.energy is None and rank != expected):
        raise ValueError(f"expected rank {expected}, got {rank}")
    if not (0 <= error <= 1 and 0 <= norm < math.inf):
        raise ValueError(f"expected an error in [0, 1] and a norm, got {error} and {norm}")
    if not (s[-1] >= 0 and bool((s[:-1] >= s[1:]).all())):  # which NaN is not
        raise ValueError("expected falling singular values")
    x = torch.randn(features, generator=torch.Generator().manual_seed(0), dtype=wide)
    with torch.no_grad(), full_precision(matrix.device):
        x = x.to(matrix.device)
        left = u.to(wide).t() @ (matrix.to(wide) @ x) - s * (vh.to(wide) @ x)
        allowed = 8 * (torch.finfo(matrix.dtype).eps + 100 * torch.finfo(wide).eps) * norm
        if not length(left) <= allowed:
            raise ValueError("its factors are not those of the weight")


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
