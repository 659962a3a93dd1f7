"""One command on a machine with an NVIDIA GPU: build, test, check, benchmark, write the results.

    python tools/gpu.py [--only NAME] [--results DIR] [--minutes N] [--no-gpu] [--no-build]

It needs no network and no virtual environment: this Python with torch, cmake, ninja, pybind11,
setuptools, numpy, safetensors, pytest and pytest-benchmark, and nvcc. Peers that are not there are
left out by name. `--only lora_linear` runs the tests and benchmarks whose names contain it.
`--no-gpu` goes the same way as far as it goes without one: the emulator's tests, a few benchmarks
of the CPU, and a report that says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "peft", "diffusers", "transformers", "numpy", "pytest-benchmark")
# Small, but every kernel: a sanitizer makes each of them a hundred times slower.
SELECTION = (
    "cuda and against_float64 and (float32 or bfloat16) and not 129 and not 2065 and not 1024"
)
SANITIZERS = ("memcheck", "racecheck")
COLUMNS = ("captured", "warm", "eager", "host_clock", "floor")
NOTHING_FOUND = 5  # pytest's exit code where no test has such a name


class Run:
    """The steps, their time limits, and what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.monotonic()
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.found: dict[str, Any] = {"steps": {}}
        self.failed: list[str] = []

    def left(self) -> float:
        return self.options.minutes * 60 - (time.monotonic() - self.started)

    def step(self, name: str, command: Sequence[object], share: float = 1.0) -> bool:
        """Runs a command within a share of the time that is left."""
        print(f"\n=== {name}", flush=True)
        begin, limit = time.monotonic(), max(20.0, share * self.left())
        try:
            code: int | str = subprocess.run(
                [str(c) for c in command], cwd=ROOT, env=self.environment, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit:.0f} s"
        except OSError as error:
            code = str(error)
        took = time.monotonic() - begin
        if code == NOTHING_FOUND and self.options.only:
            code = 0
        self.found["steps"][name] = {"seconds": round(took, 1), "result": code}
        if code != 0:
            self.failed.append(f"{name}: {code if isinstance(code, str) else f'exit code {code}'}")
        return code == 0

    def pytest(
        self, name: str, *arguments: object, share: float, before: Sequence[str] = ()
    ) -> None:
        """A run of tests, with its counts."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [*before, sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
            self.step(name, [*command, "-p", "no:cacheprovider", *arguments], share)
            if report.exists():
                self.found["steps"][name] |= counts(report)


def counts(report: Path) -> dict[str, int]:
    """What a JUnit file says of its tests."""
    suites = ET.parse(report).getroot().iter("testsuite")
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for key in total:
            total[key] += int(suite.get(key, 0))
    return total


def machine(gpu: bool) -> dict[str, Any]:
    """Where this ran and with what."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    about: dict[str, Any] = {
        "host": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "gpu": "none",
    }
    if gpu:
        fields = ["name", "driver_version", "memory.total", "compute_cap"]
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        values = [v.strip() for v in answer[0].split(",")] if answer else ["unknown"] * 4
        about |= dict(zip(("gpu", "driver", "memory", "compute_capability"), values, strict=True))
        about["gpus"] = len(answer)
    return about


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def figures(report: dict[str, Any], ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Every contender of every benchmark, in microseconds, beside its floor: bytes over the
    measured bandwidth or operations over the measured rate, whichever is longer."""
    rows = []
    for item in report.get("benchmarks", []):
        extra = item["extra_info"]
        dtype = "bfloat16" if "bfloat16" in item["group"] else "float32"
        floors = [
            extra[what] / ceilings[by] * 1e6
            for what, by in (("bytes", "bytes"), ("operations", dtype))
            if extra.get(what) and ceilings.get(by)
        ]
        row = {
            "group": item["group"],
            "contender": item["params"]["contender"],
            "host_clock": item["stats"]["median"] * 1e6,
            "floor": max(floors, default=None),
        }
        rows.append(row | {k: extra[k] for k in ("eager", "captured", "warm", "why") if k in extra})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown; the ratio is ours over theirs, of captured times if both are."""
    lines = [
        "| | captured µs | warm µs | eager µs | host clock µs | floor µs | fastlora / it |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == group]
        lines.append(f"| **{group}** | | | | | | |")
        ours = next((row for row in mine if row["contender"] == "fastlora"), None)
        for row in mine:
            ratio = ""
            if ours is not None and row is not ours:
                both = ours.get("captured") and row.get("captured")
                key = "captured" if both else "eager" if "eager" in row else "host_clock"
                if ours.get(key) and row.get(key):
                    ratio = f"{ours[key] / row[key]:.2f}" + ("" if both else f" ({key})")
            values = [number(row.get(key)) for key in COLUMNS]
            lines.append(f"| {row['contender']} | {' | '.join(values)} | {ratio} |")
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def document(found: dict[str, Any]) -> str:
    """The page beside the JSON file."""
    about, ceilings = found["machine"], found["ceilings"]
    lines = [f"# {about['gpu']}, {found['date']}", ""]
    if about["gpu"] == "none":
        lines += ["No GPU: the emulator's tests and the host's clock. No speed of a GPU.", ""]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    lines += [f"Commit {found['commit']}; Python {about['python']}; {versions}.", ""]
    if ceilings:
        rates = [f"{v / 1e12:.2f} {'TB/s' if k == 'bytes' else f'TFLOP/s {k}'}" for k, v in
                 ceilings.items()]  # fmt: skip
        lines += [f"Measured ceilings: {', '.join(rates)}.", ""]
    for name, step in found["steps"].items():
        tests = f", {step['tests']} tests, {step['skipped']} skipped" if "tests" in step else ""
        result = "ok" if step["result"] == 0 else step["result"]
        lines.append(f"- {name}: {result}, {step['seconds']} s{tests}")
    return "\n".join([*lines, "", table(found["figures"]), ""])


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu", description="Proves and measures all on a GPU.")
    parser.add_argument("--only", default="", help="tests and benchmarks with this in their name")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all (default: 9)")
    parser.add_argument("--no-gpu", action="store_true", help="as far as it goes without one")
    parser.add_argument("--no-build", action="store_true", help="what is built is good enough")
    return parser.parse_args(arguments)


def answers(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def benchmarks(run: Run, gpu: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        wanted = run.options.only or ("" if gpu else "tiny_call or 1x4x64x64")
        select = ["-k", wanted] if wanted else []
        command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-quiet"]
        # pytest-benchmark warns of an empty report, and warnings are errors here.
        some = subprocess.run([*command, "--collect-only", *select], cwd=ROOT, capture_output=True)
        if some.returncode != NOTHING_FOUND:
            run.step("benchmarks", [*command, f"--benchmark-json={path}", *select])
        report = json.loads(path.read_text()) if path.exists() and path.stat().st_size else {}
    run.found["figures"] = figures(report, run.found["ceilings"])


def measured_ceilings(run: Run) -> dict[str, float]:
    code = "import json; from bench.timing import ceilings; print(json.dumps(ceilings()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        run.failed.append(f"ceilings: {done.stderr.strip().splitlines()[-1:]}")
        return {}
    return json.loads(done.stdout)


def sanitize(run: Run) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        run.found["steps"]["compute-sanitizer"] = {"seconds": 0, "result": "not installed"}
        return
    # Every tensor an allocation of its own: torch's cached segments have no bounds inside.
    run.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    for kind in SANITIZERS:
        before = [tool, "--tool", kind, "--error-exitcode", "9", "--target-processes", "all"]
        where = ["tests/ops", "-m", "gpu", "-k", SELECTION, "-x"]
        run.pytest(kind, *where, share=0.25, before=before)
    del run.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"]


def write(run: Run) -> Path:
    gpu = run.found["machine"]["gpu"].lower()
    name = "no-gpu" if gpu == "none" else re.sub(r"[^a-z0-9]+", "-", gpu).strip("-")
    target = run.options.results / f"{name}-{run.found['date']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
        (target, json.dumps(run.found, indent=1) + "\n"),
        (target.with_suffix(".md"), document(run.found)),
    ):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text)
        partial.replace(path)
    return target


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    gpu = not options.no_gpu
    if gpu and not answers("nvidia-smi", "-L"):
        print("gpu: no NVIDIA GPU answers nvidia-smi; --no-gpu tries the script", file=sys.stderr)
        return 2
    run = Run(options)
    if gpu:
        run.environment["FASTLORA_CUDA"] = "on"
    run.found |= {"date": date.today().isoformat(), "commit": commit(), "machine": machine(gpu)}
    run.found |= {"ceilings": {}, "figures": []}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if options.no_build or run.step("build", build, 0.4):
        select = ["-k", options.only] if options.only else []
        where = ["tests", "-m", "gpu" if gpu else "emulated", *select]
        run.pytest("tests", *where, share=0.5)
        if gpu and not options.only:
            sanitize(run)
        if gpu:
            run.found["ceilings"] = measured_ceilings(run)
        benchmarks(run, gpu)
    path = write(run)
    print("\n" + document(run.found))
    print(f"{path}, {time.monotonic() - run.started:.0f} s")
    for line in run.failed:
        print(f"gpu: {line}", file=sys.stderr)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
