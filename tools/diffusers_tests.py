"""Runs diffusers' own scheduler tests with fastlora's drop-ins in the place of its classes.

    python tools/diffusers_tests.py ~/diffusers                   # a checkout of diffusers
    python tools/diffusers_tests.py ~/diffusers tests/pipelines/ddim tests/pipelines/ddpm

The tests of the checkout, the diffusers that is installed (its version should be the checkout's),
offline. They run twice, without and with the drop-ins: what fails without them is no fault of
theirs. Exit code 1 where a test fails with them only, 2 where nothing was run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAMES = ("ddim", "ddpm", "euler", "euler_ancestral", "dpm_multi", "lcm", "flow_match*")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("checkout", type=Path, help="a checkout of diffusers, with its tests")
    parser.add_argument("paths", nargs="*", help="other tests of it, instead of the schedulers'")
    parser.add_argument("--inside", choices=("plain", "fast"), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    paths = options.paths or scheduler_tests(checkout)
    if options.inside:
        return inside(options.inside, checkout, paths, options.result)
    if not paths:
        print(f"diffusers_tests: checkout: expected tests/schedulers in it, got {checkout}")
        return 2
    results = {kind: run(kind, checkout, paths) for kind in ("plain", "fast")}
    return report(checkout, results["plain"], results["fast"])


def scheduler_tests(checkout: Path) -> list[str]:
    folder = checkout / "tests" / "schedulers"
    found = [p for name in NAMES for p in sorted(folder.glob(f"test_scheduler_{name}.py"))]
    return [str(p.relative_to(checkout)) for p in found]


def run(kind: str, checkout: Path, paths: list[str]) -> dict[str, Any]:
    """One pytest in a process of its own: classes are exchanged before it imports any test."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(Path(__file__).resolve()), str(checkout), *paths]
        command += ["--inside", kind, "--result", str(result)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, cwd=checkout)
        if not result.exists():
            raise SystemExit(f"diffusers_tests: pytest stopped with exit code {done.returncode}")
        return json.loads(result.read_text())


class Outcomes:
    """A pytest plugin that keeps what became of each test, and why."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self.errors: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.keep(report)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported is a failure too."""
        if report.outcome == "failed":
            self.keep(report)

    def keep(self, report: Any) -> None:
        self.tests[report.nodeid] = report.outcome
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            error = crash.message if crash else str(report.longrepr).strip().splitlines()[-1]
            self.errors[report.nodeid] = error


def inside(kind: str, checkout: Path, paths: list[str], result: Path) -> int:
    import diffusers
    import pytest

    if checkout in Path(str(diffusers.__file__)).resolve().parents:
        raise SystemExit("diffusers_tests: expected diffusers to be installed, got the checkout's")
    steps = exchange(diffusers) if kind == "fast" else Counter()
    outcomes = Outcomes()
    arguments = [
        "-q",
        "--tb=no",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:warnings",
        "--no-header",
    ]
    code = pytest.main([*arguments, f"--rootdir={checkout}", *paths], plugins=[outcomes])
    kept = {"tests": outcomes.tests, "errors": outcomes.errors, "steps": steps}
    result.write_text(json.dumps(kept | {"version": diffusers.__version__}))
    return int(code)


def exchange(diffusers: Any) -> Counter[str]:
    """diffusers' names become the drop-ins'; counts the steps of each class."""
    from fastlora.integrations import diffusers as fast

    steps: Counter[str] = Counter()

    def counting(name: str, step: Any) -> Any:
        import functools

        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            steps[name] += 1
            return step(*args, **kwargs)

        return counted

    for name in fast.__all__:
        drop_in = getattr(fast, name)
        drop_in.step = counting(name, drop_in.step)
        setattr(diffusers, drop_in.replaces.__name__, drop_in)
        setattr(diffusers.schedulers, drop_in.replaces.__name__, drop_in)
    return steps


def report(checkout: Path, plain: dict[str, Any], fast: dict[str, Any]) -> int:
    init = checkout / "src" / "diffusers" / "__init__.py"
    found = re.search(r'__version__ = "(.*?)"', init.read_text()) if init.exists() else None
    tests = found.group(1) if found else "unknown"
    print(f"\ndiffusers {plain['version']}; its tests as of {tests}")
    print(f"{'':52}{'diffusers':>20}{'drop-ins':>20}")
    for path in sorted({node.partition("::")[0] for node in fast["tests"] | plain["tests"]}):
        columns = [count(side["tests"], path) for side in (plain, fast)]
        print(f"{path:52}" + "".join(f"{column:>20}" for column in columns))
    total = [count(side["tests"], "") for side in (plain, fast)]
    print(f"{'passed / failed / skipped':52}" + "".join(f"{column:>20}" for column in total))
    print("steps of the drop-ins:", ", ".join(f"{k} {v}" for k, v in fast["steps"].items()))
    ours = sorted(n for n, error in fast["errors"].items() if plain["tests"].get(n) != "failed")
    both = sorted(set(fast["errors"]) - set(ours))
    for title, nodes in (("with the drop-ins only", ours), ("without them too", both)):
        for node in nodes:
            error = (fast["errors"][node].splitlines() or [""])[0]
            print(f"failed {title}: {node}\n    {error[:200]}")
    if not fast["steps"]:
        print("diffusers_tests: no drop-in made a step")
        return 2
    return 1 if ours else 0


def count(tests: dict[str, str], path: str) -> str:
    outcomes = Counter(o for node, o in tests.items() if node.startswith(path))
    return f"{outcomes['passed']} / {outcomes['failed']} / {outcomes['skipped']}"


if __name__ == "__main__":
    sys.exit(main())
