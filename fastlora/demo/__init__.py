"""`fastlora demo`: train two adapters of a small model, sample, judge, verify, time, report."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from fastlora.commands.terminal import say_json
from fastlora.demo.settings import Settings

__all__ = ["Settings", "main", "missing_packages", "run"]

# Modules of the extra `demo`, by the packages that have them.
NEEDED = {"pillow": "PIL", "scikit-learn": "sklearn", "transformers": "transformers"}


def main(
    out: str | Path = "out",
    seed: int = 0,
    settings: Settings | None = None,
    as_json: bool = False,
) -> int:
    """Runs the demo with progress bars; 0, or 1 if what it verifies does not hold.

    Raises ModuleNotFoundError where packages of the extra `demo` are missing, before `out` is made,
    and OSError for a directory that cannot be written, before anything is trained.
    """
    numbers = told(run, out, seed, settings, as_json)
    return 0 if numbers["verify"]["passed"] else 1


def told(
    run: Callable[..., dict[str, Any]], out: str | Path, seed: int, settings: Any, as_json: bool
) -> dict[str, Any]:
    """What `run` returns. As JSON: printed, and all that it says itself goes to stderr."""
    if not as_json:
        return run(out, seed, settings)
    with redirect_stdout(sys.stderr):
        numbers = run(out, seed, settings)
    say_json({"output": str(out), **numbers})
    return numbers


def missing_packages() -> list[str]:
    """Packages that the demo needs and that are not installed, by pip's names."""
    return [package for package, m in NEEDED.items() if importlib.util.find_spec(m) is None]


def require_packages() -> None:
    """Raises ModuleNotFoundError for packages that are missing, and what a broken one raises."""
    if missing := missing_packages():
        names = " ".join(missing)
        raise ModuleNotFoundError(
            f"the demo needs packages that are not installed: {', '.join(missing)};"
            f" try: pip install {names}"
        )
    for module in NEEDED.values():
        importlib.import_module(module)


def run(
    out: str | Path = "out",
    seed: int = 0,
    settings: Settings | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs the demo, writes its files into `out` and returns the numbers of `report.json`.

    Raises what `main` does.
    """
    require_packages()
    from fastlora.training import ensure_writable

    out = ensure_writable(out)
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
