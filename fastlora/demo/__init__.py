"""`fastlora demo`: train two adapters of a small model, sample, judge, verify, time, report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastlora.demo.settings import Settings

__all__ = ["Settings", "main", "run"]


def main(out: str | Path = "out", seed: int = 0, settings: Settings | None = None) -> int:
    """Runs the demo with progress bars; 0, or 1 if what it verifies does not hold.

    Raises OSError for a directory that cannot be written and ModuleNotFoundError for a package of
    the extra `demo` that is missing: both before anything is trained.
    """
    return 0 if run(out, seed, settings)["verify"]["passed"] else 1


def run(
    out: str | Path = "out",
    seed: int = 0,
    settings: Settings | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs the demo, writes its files into `out` and returns the numbers of `report.json`."""
    from fastlora.training import ensure_writable

    out = ensure_writable(out)
    for needed in ("PIL", "safetensors", "sklearn", "tqdm", "transformers"):
        __import__(needed)
    from fastlora.demo import checks, report, slider, speed, subject, words
    from fastlora.demo.findings import Findings
    from fastlora.demo.world import World, fastest_threads

    start = time.perf_counter()
    world = World.make(settings or Settings(), seed, progress)
    with fastest_threads(world):
        world.say(words.banner(world, out))
        with world.part("a thickness slider from pairs of pictures"):
            thickness = slider.make_slider(world)
            first = slider.save_slider(thickness, out)
            world.say(words.say_slider(thickness))
        with world.part("a subject from five pictures"):
            mirrored = subject.make_subject(world)
            second = subject.save_subject(mirrored, out)
            world.say(words.say_subject(mirrored))
        with world.part("both at once, fused against reference"):
            model, together = checks.make_together(world, (first, second), mirrored)
            verified = checks.make_checks(world, model)
            world.say(words.say_checks(together, verified))
        with world.part("against plain PyTorch, PEFT and diffusers"):
            comparisons = speed.make_comparisons(world)
            world.say(words.say_comparisons(comparisons))
        found = Findings(world, out, thickness, mirrored, together, verified, comparisons)
        numbers = report.write(found, time.perf_counter() - start)
    world.say(f"\n{out / 'report.html'}, {time.perf_counter() - start:.0f} s in all")
    return numbers
