"""tools/peft_suite.py on a checkout of a few lines."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

TOOL = Path(__file__).parents[2] / "tools" / "peft_suite.py"
COMMON = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
"""
TESTS = """
import peft
import pytest
import torch

from .testing_common import make

CASES = [(peft.LoraConfig, {"r": 2}), (peft.LoKrConfig, {"r": 2}), (peft.AdaLoraConfig, {"r": 2})]

@pytest.mark.parametrize("config_cls, options", CASES)
def test_runs(config_cls, options):
    extra = {"total_step": 9} if config_cls is peft.AdaLoraConfig else {}
    model = peft.get_peft_model(make(), config_cls(target_modules=["0"], **options, **extra))
    assert model(torch.ones(3, 8)).shape == (3, 4)

def test_second_adapter():
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["2"]))
    model.set_adapter("other")
    model(torch.ones(3, 8))
    with model.disable_adapter():
        model(torch.ones(3, 8))

def test_forward_is_PEFTs():
    model = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["0"]))
    forward = type(model.base_model.model[0]).forward
    assert forward.__module__ == "peft.tuners.lora.layer", "somebody else's"

def test_never():
    assert False, "not even without"
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "peft" / "tests"
    folder.mkdir(parents=True)
    (folder / "testing_common.py").write_text(COMMON)
    (folder / "test_custom_models.py").write_text(TESTS)
    (tmp_path / "peft" / "pyproject.toml").write_text('[tool.pytest]\naddopts = ["--cov=peft"]\n')
    return tmp_path / "peft"


def run(checkout, *arguments):
    command = [sys.executable, str(TOOL), str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_counts_and_exit_code(checkout, tmp_path):
    """A failure on accelerated layers alone is ours; LoKr is not run, AdaLoRA stays PEFT's."""
    plain, both = tmp_path / "plain.json", tmp_path / "both.json"
    done = run(checkout, "--baseline", "--json", str(plain))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed / failed / skipped: 4 / 1 / 0" in done.stdout

    done = run(checkout, "--against", str(plain), "--json", str(both), "--jobs", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1:] for line in lines if line.startswith("all ")] == [
        ["4", "/", "1", "/", "0", "3", "/", "2", "/", "0"]
    ]
    assert "passed both times 3, failed both times 1, failed accelerated only 1" in done.stdout
    ours = lines.index(next(line for line in lines if line.startswith("failed accelerated only: ")))
    assert lines[ours].endswith("::test_forward_is_PEFTs")
    assert "test_custom_models.py:27: AssertionError: somebody else's" in lines[ours + 1]
    assert "failed both times: 1 with test_custom_models.py:30: AssertionError: not" in done.stdout

    kept = json.loads(both.read_text())
    assert not any("LoKr" in node for node in kept["plain"]["tests"])
    forwards = {node.rpartition("::")[2]: c for node, c in kept["fast"]["forwards"].items()}
    # one layer of the two has the active adapter, the other computes its base; all that, disabled
    assert forwards["test_second_adapter"] == {"layers": 1 + 2, "accelerated": 4}
    assert forwards["test_runs[AdaLoraConfig-options2]"] == {"layers": 1, "plain": 1}
    assert kept["fast"]["layers"] == {"accelerated Linear": 1 + 3 + 1, "SVDLinear": 1}
    plain_forwards = kept["plain"]["forwards"].values()
    assert sum(counts.get("plain", 0) for counts in plain_forwards) == 6
    assert not any("accelerated" in counts for counts in plain_forwards)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("peft_suite", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("plain", "fast", "called", "code"),
    [
        ("passed", "passed", {"accelerated": 3, "fallbacks": 2}, 0),
        ("passed", "failed", {"accelerated": 3}, 1),
        ("skipped", "failed", {"accelerated": 3}, 1),
        ("passed", "skipped", {"accelerated": 3}, 1),
        ("failed", "failed", {"accelerated": 3}, 0),
        ("failed", "passed", {"accelerated": 3}, 0),
        ("passed", "passed", {"accelerated": 3, "base": 1, "fallbacks": 2}, 2),
        ("passed", "passed", {}, 2),
    ],
)
def test_report(tool, capsys, plain, fast, called, code):
    def result(outcome, forwards):
        errors = {"a::b": "no"} if outcome == "failed" else {}
        return {"tests": {"a::b": outcome}, "errors": errors, "forwards": forwards, "layers": {}}

    assert tool.report(result(plain, {}), result(fast, {"a::b": called})) == code
    assert ("computed anything by itself" in capsys.readouterr().out) == (code == 2)


def test_what_is_no_checkout(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and "expected tests/test_custom_models.py" in done.stdout
