"""`make gpu` as far as it goes without a GPU: collection, going on after a stop, reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gpu

ROOT = Path(__file__).resolve().parent.parent


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
    arguments = ("--no-gpu", "--no-build", "--only", "tiny_call", "--results", tmp_path)
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert path.name.startswith("no-gpu-") and found["machine"]["gpu"] == "none"
    assert found["machine"]["versions"]["torch"] and found["commit"]
    (items,) = found["benchmarks"].values()
    assert {"nn.Linear", "fastlora"} <= {item["params"]["contender"] for item in items}
    page = path.with_suffix(".md").read_text()
    assert "No speed of a GPU" in page and "tiny call 8x8" in page and "needs a GPU" in page
    assert page.strip() in done.stdout
    again = run(*arguments)
    assert again.returncode == 0 and again.stdout.count("done before") == 2
    assert json.loads(path.read_text())["benchmarks"] == found["benchmarks"]


def script(tmp_path: Path, *arguments: str) -> gpu.Run:
    made = gpu.Run(gpu.parsed(["--results", str(tmp_path), *arguments]))
    about = {"gpu": "Some GPU", "python": "3", "versions": {}}
    made.found |= {"machine": about, "date": "2000-01-01", "commit": "c", "sources": "s"}
    return made


def test_another_call_goes_on_where_time_ran_out(tmp_path):
    first = script(tmp_path)
    assert first.due("tests") and first.step("tests", [sys.executable, "-c", ""])
    assert first.due("breaks")
    assert not first.step("breaks", [sys.executable, "-c", "raise SystemExit(1)"])
    first.options.minutes = 0.0
    assert not first.due("fold") and first.waiting == ["fold"]
    page = gpu.write(first).with_suffix(".md").read_text()
    assert "- tests: ok" in page and "- fold: not yet, for want of time" in page

    second = script(tmp_path)
    gpu.resume(second)
    assert not second.due("tests") and second.due("breaks") and second.due("fold")
    assert script(tmp_path).due("tests")  # nobody has looked for earlier results
    again = script(tmp_path, "--again")
    gpu.resume(again)
    assert again.due("tests")
    other = script(tmp_path)
    other.found["sources"] = "other"
    gpu.resume(other)
    assert other.due("tests")


def test_every_suite_is_a_step():
    suites = {path.name for path in (ROOT / "bench").glob("bench_*.py")}
    named = {Path(a).name for step in gpu.BENCHMARKS.values() for a in step if a.endswith(".py")}
    assert named == suites


def test_unknown_stages_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.parsed(["--stages", "build,paint"])
    assert "paint" in capsys.readouterr().err


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
