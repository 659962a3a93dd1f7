"""One command on a machine with an NVIDIA GPU: build, test, check, benchmark, write the results.

    python tools/gpu.py [--stages build,bench] [--only NAME] [--results DIR] [--minutes N] [--again]

It needs no network and no virtual environment: this Python with torch, cmake, ninja, pybind11,
setuptools, numpy, safetensors, pytest and pytest-benchmark, and nvcc. Peers that are not there are
left out by name. All of it takes longer than the ten minutes that a shared machine may allow: after
`--minutes` no further step begins, and the same command again goes on behind the last step that
succeeded, as long as sources and GPU are the same (`--again` repeats them).

`--only lora_linear` runs the tests and benchmarks whose names contain it. `--no-gpu` goes the same
way as far as it goes without one: the emulator's tests, a few benchmarks of the CPU, and a report
that says so.
"""

from __future__ import annotations

import argparse
import hashlib
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
sys.path.insert(0, str(ROOT))

from bench.report import markdown, tables  # noqa: E402 (beside this folder, not in it)
from bench.shapes import NAMES  # noqa: E402

PACKAGES = ("torch", "triton", "peft", "diffusers", "transformers", "numpy", "pytest-benchmark")
# Small, but every kernel: a sanitizer makes each of them a hundred times slower.
SELECTION = (
    "cuda and against_float64 and (float32 or bfloat16) and not 129 and not 2065 and not 1024"
)
SANITIZERS = ("memcheck", "racecheck")
STAGES = ("build", "tests", "sanitize", "bench")
SOURCES = ("csrc", "fastlora", "bench", "CMakeLists.txt")
SETUPTOOLS = 77  # the first that reads pyproject.toml's licence
# The quick ones first; layers of one rank and model at a time, of which each takes a minute or two.
BENCHMARKS = {
    "main loop": ["bench/bench_gemm.py"],
    "calls": ["bench/bench_calls.py", "bench/bench_strengths.py"],
    "fold": ["bench/bench_fold.py"],
    **{
        f"layers of {model}, r={rank}": [
            "bench/bench_lora_linear.py", "--models", model, "--ranks", str(rank)
        ]
        for rank in (16, 64, 128)
        for model in NAMES
    },
    "spectral": ["bench/bench_spectral.py", "bench/bench_spectral_linear.py"],
    "sampler step": ["bench/bench_sampler.py"],
    "memory": ["bench/bench_memory.py"],
    "loops": ["bench/bench_loop.py", "bench/bench_schedulers.py"],
    "pipelines": ["bench/bench_pipelines.py"],
    "swaps": ["bench/bench_swap.py"],
    # Jobs of the CPU: on a GPU's machine they say so and measure nothing.
    "files": ["bench/bench_load.py", "bench/bench_files.py"],
}  # fmt: skip
LEAST = 30.0  # seconds: with less time left no step begins
UNFINISHED = 3  # the exit code where steps are left for another call
NOTHING_FOUND = 5  # pytest's exit code where no test has such a name


class Run:
    """The steps, their time limits, and what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.monotonic()
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.found: dict[str, Any] = {"steps": {}, "benchmarks": {}, "measured_on": {}}
        self.failed: list[str] = []
        self.waiting: list[str] = []  # for another call: there was no time

    def left(self) -> float:
        return self.options.minutes * 60 - (time.monotonic() - self.started)

    def due(self, name: str) -> bool:
        """Whether a step is to be done now: not yet done for these sources, and there is time."""
        done = self.found["steps"].get(name, {}).get("result") == 0
        if done and not self.options.again:
            print(f"\n=== {name}: done before", flush=True)
            return False
        if self.left() < LEAST:
            self.waiting.append(name)
            return False
        return True

    def step(self, name: str, command: Sequence[object], share: float = 1.0) -> bool:
        """Runs a command within a share of the time that is left."""
        print(f"\n=== {name}", flush=True)
        begin, limit = time.monotonic(), max(LEAST, share * self.left())
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
        if not self.due(name):
            return
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            # Other versions than the pinned ones may warn.
            command = [*before, sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
            command += ["-W", "default"]
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
    """Where there is git, and the sources are in a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def digest() -> str:
    """Of what the results depend on: with other sources nothing has been done yet."""
    found = hashlib.sha256()
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh", ".txt") and path.is_file():
                found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def document(found: dict[str, Any]) -> str:
    """The page beside the JSON file."""
    about = found["machine"]
    limits = found["measured_on"].get("ceilings", {})
    lines = [f"# {about['gpu']}, {found['date']}", ""]
    if about["gpu"] == "none":
        lines += ["No GPU: the emulator's tests and the host's clock. No speed of a GPU.", ""]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    lines += [f"Commit {found['commit']}; Python {about['python']}; {versions}.", ""]
    if limits:
        rates = [
            f"{v / 1e12:.2f} {'TB/s' if k == 'bytes' else f'TFLOP/s {k}'}"
            for k, v in limits.items()
        ]
        lines += [f"Measured ceilings: {', '.join(rates)}.", ""]
    for name, step in found["steps"].items():
        tests = f", {step['tests']} tests, {step['skipped']} skipped" if "tests" in step else ""
        result = "ok" if step["result"] == 0 else step["result"]
        lines.append(f"- {name}: {result}, {step['seconds']} s{tests}")
    lines += [f"- {name}: not yet, for want of time" for name in found["waiting"]]
    items = [item for step in found["benchmarks"].values() for item in step]
    report = {"benchmarks": items, "machine_info": found["measured_on"]}
    shown = tables(report)
    # First what was asked, then what it was made of.
    return "\n".join([*lines, "", markdown([*shown[-1:], *shown[:-1]])])


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu", description="Proves and measures all on a GPU.")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of %(default)s")
    parser.add_argument("--again", action="store_true", help="also what has been done already")
    parser.add_argument("--only", default="", help="tests and benchmarks with this in their name")
    parser.add_argument(
        "--suites", default="", help="benchmarks by name, such as 'spectral; memory'"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all (default: 9)")
    parser.add_argument("--no-gpu", action="store_true", help="as far as it goes without one")
    parser.add_argument("--no-build", action="store_true", help="what is built is good enough")
    options = parser.parse_args(arguments)
    options.stages = options.stages.split(",")
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"--stages: expected some of {','.join(STAGES)}, got {','.join(unknown)}")
    options.suites = [name.strip() for name in options.suites.split(";") if name.strip()]
    if unknown := set(options.suites) - set(BENCHMARKS):
        parser.error(
            f"--suites: expected some of {'; '.join(BENCHMARKS)}, got {'; '.join(unknown)}"
        )
    return options


def answers(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def build(run: Run) -> bool:
    """By setup.py; where setuptools is too old for pyproject.toml by CMake itself."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) >= SETUPTOOLS:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        return run.step("build", command, 0.9)
    pybind11 = [sys.executable, "-m", "pybind11", "--cmakedir"]
    where = subprocess.run(pybind11, capture_output=True, text=True).stdout.strip()
    configure = ["cmake", f"-S{ROOT}", f"-B{ROOT / 'build' / 'gpu'}", "-GNinja",
                 f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={where}",
                 f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'fastlora'}",
                 f"-DFASTLORA_CUDA={run.environment.get('FASTLORA_CUDA', 'auto')}"]  # fmt: skip
    if not run.step("configure", configure, 0.9):
        return False
    make = ["cmake", "--build", ROOT / "build" / "gpu", "--target", "_C", "_emulator"]
    return run.step("build", make, 0.9)


def benchmarks(run: Run, gpu: bool) -> None:
    """Every suite a step of its own: what has been measured is kept when time runs out."""
    only = run.options.only
    if gpu and not only:
        wanted = run.options.suites
        steps = {n: a for n, a in BENCHMARKS.items() if not wanted or n in wanted}
    else:
        steps = {"benchmarks": ["bench", "-k", only or "tiny_call or 1x4x64x64"]}
    for name, arguments in steps.items():
        name = f"bench: {name}" + (f", only {only}" if only else "")
        if run.due(name):
            benchmark(run, name, arguments)


def benchmark(run: Run, name: str, arguments: list[str]) -> None:
    # A peer may warn: this is no test of it.
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "--benchmark-quiet"]
    command += ["-W", "default", "--disable-warnings", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        # pytest-benchmark warns of an empty report.
        run.step(name, [*command, f"--benchmark-json={path}"])
        report = json.loads(path.read_text()) if path.exists() and path.stat().st_size else {}
    run.found["benchmarks"][name] = [slim(item) for item in report.get("benchmarks", [])]
    about = report.get("machine_info", {})
    kept = ("gpu", "capability", "ceilings", "torch", "threads", "cores")
    run.found["measured_on"] |= {key: about[key] for key in kept if key in about}


def slim(item: dict[str, Any]) -> dict[str, Any]:
    """What the report needs of one benchmark, without every single time."""
    stats = {key: item["stats"][key] for key in ("min", "median", "iqr", "rounds")}
    contender = {"contender": item["params"]["contender"]}
    kept = {"group": item["group"], "params": contender, "stats": stats}
    return {**kept, "extra_info": item["extra_info"]}


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
        run.pytest(kind, *where, share=0.5, before=before)
    del run.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"]


def stem(found: dict[str, Any]) -> str:
    gpu = found["machine"]["gpu"].lower()
    return "no-gpu" if gpu == "none" else re.sub(r"[^a-z0-9]+", "-", gpu).strip("-")


def resume(run: Run) -> None:
    """Takes over what an earlier call has found with the same sources on the same kind of GPU."""
    for path in sorted(run.options.results.glob(f"{stem(run.found)}-*.json"), reverse=True):
        earlier = json.loads(path.read_text())
        if earlier.get("sources") == run.found["sources"]:
            for key in ("steps", "benchmarks", "measured_on"):
                run.found[key] |= earlier.get(key, {})
            return


def write(run: Run) -> Path:
    target = run.options.results / f"{stem(run.found)}-{run.found['date']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    run.found["waiting"] = run.waiting
    for path, text in (
        (target, json.dumps(run.found) + "\n"),
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
    run.found |= {"date": date.today().isoformat(), "commit": commit(), "sources": digest()}
    run.found |= {"machine": machine(gpu)}
    resume(run)
    stages = [s for s in options.stages if s != "build" or not options.no_build]
    # Another machine has the results, not what was built: the build is cheap where it is there.
    if "build" not in stages or build(run):
        for stage in stages:
            if stage == "tests":
                select = ["-k", options.only] if options.only else []
                name = f"tests, only {options.only}" if options.only else "tests"
                run.pytest(name, "tests", "-m", "gpu" if gpu else "emulated", *select, share=0.6)
            elif stage == "sanitize" and gpu and not options.only:
                sanitize(run)
            elif stage == "bench":
                benchmarks(run, gpu)
            write(run)  # whatever comes next, this is kept
    path = write(run)
    print("\n" + document(run.found))
    print(f"{path}, {time.monotonic() - run.started:.0f} s")
    for line in run.failed:
        print(f"gpu: {line}", file=sys.stderr)
    if run.waiting:
        print(f"gpu: run it again for {', '.join(run.waiting)}", file=sys.stderr)
    return 1 if run.failed else UNFINISHED if run.waiting else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
