"""tools/diffusers_tests.py on a checkout of a few lines."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

TOOL = Path(__file__).parents[2] / "tools" / "diffusers_tests.py"
GOOD = """
import torch
from diffusers import DDIMScheduler

def test_steps():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    x = torch.ones(1, 3, 4, 4)
    assert scheduler.step(x, 750, x).prev_sample.shape == x.shape
"""
NAME = """
def test_name():
    assert DDIMScheduler.__name__ == "DDIMScheduler"
"""
NEVER = """
def test_never():
    assert False, "not even without"
"""


def run(tmp_path, source):
    folder = tmp_path / "tests" / "schedulers"
    folder.mkdir(parents=True)
    (folder / "test_scheduler_ddim.py").write_text(source)
    (folder / "test_scheduler_ddpm.py").write_text("import no_such_module")
    command = [sys.executable, str(TOOL), str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_counts_and_exit_code(tmp_path):
    """A failure with the drop-ins alone is ours, one in both is not."""
    done = run(tmp_path, GOOD + NAME + NEVER)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 / 1 / 0" in done.stdout and "1 / 2 / 0" in done.stdout
    assert re.search(r"test_scheduler_ddpm.py +0 / 1 / 0 +0 / 1 / 0\n", done.stdout)
    assert "FastDDIMScheduler 1" in done.stdout
    assert re.search(r"failed with the drop-ins only: \S+test_name\n", done.stdout)
    assert re.search(r"failed without them too: \S+test_never\n", done.stdout)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("diffusers_tests", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("fast", "steps", "code"),
    [("passed", 3, 0), ("failed", 3, 1), ("passed", 0, 2)],
)
def test_report(tool, tmp_path, capsys, fast, steps, code):
    plain = {"tests": {"a::b": "passed"}, "errors": {}, "steps": {}, "version": "1.2.3"}
    errors = {"a::b": "no"} if fast == "failed" else {}
    counted = {"FastDDIMScheduler": steps} if steps else {}
    ours = {**plain, "tests": {"a::b": fast}, "errors": errors, "steps": counted}
    assert tool.report(tmp_path, plain, ours) == code
    assert ("no drop-in made a step" in capsys.readouterr().out) == (code == 2)


def test_what_is_no_checkout(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOL), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2 and "expected tests/schedulers" in done.stdout
