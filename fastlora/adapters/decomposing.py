"""`decompose`: the singular value decompositions that spectral shifts need, ahead of time."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.decomposition import Settings, error_of
from fastlora.adapters.factor_cache import Cache, FactorCache, folder_of
from fastlora.adapters.factorising import HELD, Held, Task, factorise, full_rank, matrix_of
from fastlora.adapters.lookup import unwrapped
from fastlora.adapters.selecting import Where, select
from fastlora.adapters.specs import AdapterError, Spectral


@dataclass(frozen=True)
class DecomposeRow:
    """One layer. Layers with equal weights share a decomposition; its seconds are the first's."""

    path: str
    shape: tuple[int, int]  # of the weight as a matrix [out, in]
    rank: int  # of the whole decomposition: the smaller side
    shifts: int  # singular values that are kept
    source: str  # "computed", "cache", "shared" (with another layer), "layer" (was there)
    seconds: float
    error: float  # ‖W - U diag(σ) Vᵀ‖ / ‖W‖, Frobenius; by truncation and rounding
    norm: float  # ‖W‖


@dataclass(frozen=True)
class DecomposeReport:
    """What `decompose` did; `str(report)` is a table."""

    rows: tuple[DecomposeRow, ...]
    folder: str  # the cache, "" for none
    seconds: float  # of all; layers are decomposed in parallel

    @property
    def shifts(self) -> int:
        return sum(row.shifts for row in self.rows)

    @property
    def hits(self) -> int:
        """Layers that needed no decomposition."""
        return sum(row.source != "computed" for row in self.rows)

    @property
    def error(self) -> float:
        """The error of all weights as one: `sqrt(Σ ‖W - UσVᵀ‖² / Σ ‖W‖²)`."""
        total = math.hypot(*(row.norm for row in self.rows))
        return math.hypot(*(row.error * row.norm for row in self.rows)) / total if total else 0.0

    def __str__(self) -> str:
        width = max(len(path) for path in ("layer", *(row.path for row in self.rows)))
        lines = [f"{'layer':<{width}}  {'matrix':>13} {'shifts':>13} {'error':>9} {'seconds':>8}"]
        for row in self.rows:
            matrix = f"{row.shape[0]} x {row.shape[1]}"
            shifts = f"{row.shifts} of {row.rank}" if row.shifts < row.rank else f"{row.shifts}"
            lines.append(
                f"{row.path:<{width}}  {matrix:>13} {shifts:>13} {row.error:>9.1e} "
                f"{row.seconds:>8.2f}  {row.source}"
            )
        where = f", cache {self.folder}" if self.folder else ""
        lines.append(
            f"{len(self.rows)} layers, {self.shifts} shifts, error {self.error:.1e}, "
            f"{self.hits} not computed, {self.seconds:.1f} s{where}"
        )
        return "\n".join(lines)


# What is made under inference mode has to serve training later.
@torch.inference_mode(False)
def decompose(
    model: nn.Module,
    where: Where = None,
    *,
    cache: Cache = True,
    dtype: torch.dtype = torch.float32,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> DecomposeReport:
    """`W = U diag(σ) Vᵀ` (reduced) of every weight that `where` selects, as in `inject`, and that
    spectral shifts can change; `inject(model, Spectral())` and `load` then find the factors.

    Computed in `dtype` (float32 or float64; float64 weights in float64), on `device`: by default
    the weight's own GPU, else any, to which weights travel one by one, else the CPU, several
    layers at a time. Factors have the weight's dtype and device and wait on the layer until
    `inject` takes them over; `remove` of the last adapter with shifts frees those. On a layer that
    nobody injects into they wait as long as the layer lives. Those of a weight that has changed
    meanwhile are not used: it is decomposed again, to the same rank.

    `cache` is a folder of safetensors files with U, σ and V, one for each distinct weight by a hash
    of its bytes: once to twice the size of the weights. Nobody clears it; it may be deleted at any
    time. True: the folder that the environment variable FASTLORA_FACTORS names (empty: none), else
    fastlora/factors in the user's cache folder ($XDG_CACHE_HOME or ~/.cache); None, False or "":
    none; or a path. `inject` and `load_state_dict` read the one of True and never write. Entries
    that are not as they were written (each has a hash of itself) are ignored with a RuntimeWarning
    and made again; one that cannot be written is a RuntimeWarning too.

    `rank` (of all, or by path; others whole) or `energy` (a share of Σ σ² in (0, 1]) keep only the
    largest singular values, and there are as many shifts. What is left out stays in the weight, so
    that a model with shifts of zero is exactly the same; it just cannot be shifted. Files with so
    many shifts need the same decomposition before `load`.

    Raises AdapterError for a bad argument, for what `inject` would refuse, for a weight without a
    decomposition (NaN, infinity), and where a layer's adapters have shifts of another rank.
    """
    start = time.perf_counter()
    if not isinstance(progress, bool):
        raise AdapterError(f"decompose: progress: expected True or False, got {progress!r}")
    settings_of = settings_by(dtype, rank, energy)
    folder = folder_of(cache)
    there = None if device is None else usable_device(device, "decompose: device")
    chosen = select(unwrapped(model), Spectral(norms="skip"), where, "decompose")
    strangers = sorted(set(rank) - set(chosen)) if isinstance(rank, Mapping) else []
    if strangers:
        raise AdapterError(f"decompose: rank: expected paths of such layers, got {strangers[:5]}")
    settings = {path: settings_of(path) for path in chosen}
    shifted = {
        path: module
        for path, module in chosen.items()
        if isinstance(module, Adapted) and module.fastlora.svd_s is not None
    }
    for path, module in shifted.items():
        check_rank(path, module, settings[path])
    others = {path: module for path, module in chosen.items() if path not in shifted}
    store = FactorCache(folder, writes=True)
    tasks = factorise(others, settings, store, "decompose", device=there, progress=progress)
    for path, module in others.items():
        task = tasks[path]
        assert task.found is not None
        vars(module)[HELD] = Held(task.found, task.settings, task.key)
    store.warn()
    rows = tuple(
        row_of_adapted(path, shifted[path]) if path in shifted else row_of(path, tasks[path])
        for path in chosen
    )
    return DecomposeReport(rows, str(folder or ""), time.perf_counter() - start)


def usable_device(device: Any, what: str) -> torch.device:
    """The device that `device` names. Raises AdapterError, beginning with `what`, for one that
    cannot compute here."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # Builds without CUDA raise AssertionError for it.
    except (RuntimeError, TypeError, AssertionError) as error:
        why = " ".join(str(error).split())
        raise AdapterError(f"{what}: expected one that is there, got {device!r}: {why}") from None
    if found.type == "meta":
        raise AdapterError(f"{what}: expected one that computes, got {device!r}")
    return found


def settings_by(dtype: Any, rank: Any, energy: Any) -> Callable[[str], Settings]:
    """The settings of a layer by its path."""
    if not isinstance(rank, Mapping):
        general = Settings(dtype, rank, energy)
        return lambda path: general
    if energy is not None:
        raise AdapterError("decompose: rank, energy: expected one of them, got both")
    for value in rank.values():
        Settings(dtype, value)
    return lambda path: Settings(dtype, rank.get(path))


def check_rank(path: str, layer: Adapted, settings: Settings) -> None:
    """Raises AdapterError where a layer's shifts are of another rank than asked for."""
    s = layer.fastlora.svd_s
    wanted = full_rank(layer) if settings == Settings(settings.dtype) else settings.kept(s)
    if wanted != len(s):
        raise AdapterError(
            f"decompose: {path}: its adapters have {len(s)} shifts, which a decomposition of rank "
            f"{wanted} would not fit; remove them first"
        )


def row_of(path: str, task: Task) -> DecomposeRow:
    assert task.found is not None
    first = path == task.paths[0]
    source = "shared" if task.source == "computed" and not first else task.source
    out, features = task.matrix.shape
    shape, seconds = (out, features), task.seconds if first else 0.0
    kept = len(task.found.s)
    error, norm = task.found.error, task.found.norm
    return DecomposeRow(path, shape, min(shape), kept, source, seconds, error, norm)


def row_of_adapted(path: str, layer: Adapted) -> DecomposeRow:
    matrix, held = matrix_of(layer), layer.fastlora
    error, norm = error_of(matrix, held.svd_u, held.svd_s, held.svd_vh)
    shape = (matrix.shape[0], matrix.shape[1])
    return DecomposeRow(path, shape, min(shape), len(held.svd_s), "layer", 0.0, error, norm)
