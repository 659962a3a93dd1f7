"""`fastlora demo svdiff`: spectral shifts against other methods, of two subjects, for editing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fastlora.demo import require_packages, told
from fastlora.demo.svdiff.settings import ShiftSettings

__all__ = ["ShiftSettings", "main", "run"]


def main(
    out: str | Path = "out",
    seed: int = 0,
    settings: ShiftSettings | None = None,
    as_json: bool = False,
) -> int:
    """Runs it with progress bars; 0. Raises what `run` does."""
    told(run, out, seed, settings, as_json)
    return 0


def run(
    out: str | Path = "out",
    seed: int = 0,
    settings: ShiftSettings | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs it, writes svdiff.html and svdiff.json into `out`, returns the numbers.

    Raises ModuleNotFoundError where packages of the extra `demo` are missing, and OSError for a
    directory that cannot be written, before anything is trained.
    """
    require_packages()
    from fastlora.training import ensure_writable

    out, settings = ensure_writable(out), settings or ShiftSettings()
    from fastlora.demo.report import replace
    from fastlora.demo.svdiff.editing import make_edits
    from fastlora.demo.svdiff.methods import compare
    from fastlora.demo.svdiff.page import Found, numbers, page, say
    from fastlora.demo.svdiff.pair import make_pair
    from fastlora.demo.world import World, fastest_threads

    start = time.perf_counter()
    world = World.make(settings.world, seed, progress)
    with fastest_threads(world):
        with world.part("a subject by three methods, with a prior and without"):
            compared = compare(world, settings)
        with world.part("two subjects in one picture"):
            paired = make_pair(world, settings)
        with world.part("one picture, edited"):
            edited = make_edits(world, settings)
    found = Found(settings, compared, paired, edited)
    result = numbers(found, seed, {**world.seconds, "total": time.perf_counter() - start})
    result["files"] = ["svdiff.html", "svdiff.json"]
    replace(out / "svdiff.html", page(found, result).encode())
    replace(out / "svdiff.json", json.dumps(result, indent=2).encode())
    world.say(f"\n{say(found)}\n\n{out / 'svdiff.html'}, {result['seconds']['total']:.0f} s in all")
    return result
