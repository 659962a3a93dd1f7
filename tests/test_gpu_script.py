"""`make gpu` as far as it goes without a GPU: collection, figures, reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gpu

ROOT = Path(__file__).resolve().parent.parent


def item(group: str, contender: str, seconds: float, **extra: object) -> dict:
    stats = {"median": seconds, "min": seconds}
    return {
        "group": group,
        "params": {"contender": contender},
        "stats": stats,
        "extra_info": {"bytes": None, "operations": None, **extra},
    }


def test_floors_are_the_longer_of_bytes_and_operations():
    ceilings = {"bytes": 4e12, "bfloat16": 8e14, "float32": 5e13}
    report = {
        "benchmarks": [
            item(
                "a bfloat16", "fastlora", 1e-3, bytes=8_000_000, operations=800_000_000, eager=9.0
            ),
            item("a", "fastlora", 1e-3, bytes=4_000_000, operations=1_000_000_000),
            item("b", "fastlora", 1e-3),
        ]
    }
    rows = gpu.figures(report, ceilings)
    assert [row["floor"] for row in rows] == pytest.approx([2.0, 20.0, None])
    assert rows[0]["eager"] == 9.0 and rows[0]["host_clock"] == pytest.approx(1000)
    assert [row["floor"] for row in gpu.figures(report, {})] == [None] * 3


def test_table_compares_captured_times_and_says_where_it_cannot():
    report = {
        "benchmarks": [
            item("step", "fastlora", 1.0, eager=8.0, captured=3.0, warm=2.0),
            item("step", "addmm", 1.0, eager=20.0, captured=6.0, warm=5.0),
            item("step", "diffusers", 1.0, eager=160.0, captured=None, why="synchronises"),
        ]
    }
    lines = gpu.table(gpu.figures(report, {})).splitlines()
    assert "| addmm | 6.00 | 5.00 | 20.0 | 1000000.0 |  | 0.50 |" in lines
    assert "| diffusers |  |  | 160.0 | 1000000.0 |  | 0.05 (eager) |" in lines


def test_counts_of_a_run(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="7" failures="1" errors="0" skipped="2"/>'
        '<testsuite tests="3" failures="0" errors="1" skipped="0"/></testsuites>'
    )
    assert gpu.counts(report) == {"tests": 10, "failures": 1, "errors": 1, "skipped": 2}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "gpu.py", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env=environment
    )


def test_the_whole_way_without_a_gpu(tmp_path):
    done = run("--no-gpu", "--no-build", "--only", "tiny_call", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert path.name.startswith("no-gpu-") and found["machine"]["gpu"] == "none"
    assert found["machine"]["versions"]["torch"] and found["commit"]
    contenders = {row["contender"] for row in found["figures"]}
    assert {"linear", "fastlora"} <= contenders
    page = path.with_suffix(".md").read_text()
    assert "No speed of a GPU" in page and "tiny call 8x8" in page
    assert page.strip() in done.stdout


def test_what_fails_is_kept(capsys):
    script = gpu.Run(gpu.parsed(["--no-gpu", "--only", "fold"]))
    assert not script.step("breaks", [sys.executable, "-c", "raise SystemExit(3)"])
    assert not script.step("missing", ["/no/such/program"])
    assert script.step("nothing of that name", [sys.executable, "-c", "raise SystemExit(5)"])
    assert script.failed[0] == "breaks: exit code 3" and "No such file" in script.failed[1]
    assert len(script.failed) == 2
    assert script.found["steps"]["breaks"]["result"] == 3


def test_selection_of_the_sanitizers_has_every_operator():
    """The emulator's tests have the names of the GPU's."""
    command = [sys.executable, "-m", "pytest", "tests/ops", "--collect-only", "-q", "-k"]
    command.append(gpu.SELECTION.replace("cuda", "emulated"))
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    chosen = [line for line in listed if "::" in line]
    assert 10 <= len(chosen) <= 400
    operators = ("lora_linear", "lora_add", "fold", "spectral_weight", "sampler_step", "add_noise")
    for operator in operators:
        assert any(f"test_{operator}.py" in line for line in chosen), operator
