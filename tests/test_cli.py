"""The command line: exit codes, one-line errors, nothing heavy before it is needed."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

import fastlora
from fastlora import cli


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A demo that records its arguments and fails as told."""
    module = types.ModuleType("fastlora.demo")
    module.calls = []
    module.failure = None

    def main(out: Path, seed: int, as_json: bool) -> int:
        module.calls.append((out, seed, as_json))
        if module.failure is not None:
            raise module.failure
        return 0

    module.main = main
    monkeypatch.setitem(sys.modules, "fastlora.demo", module)
    return module


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastlora {fastlora.__version__}\n"


def test_without_a_command_prints_help(capsys):
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    assert "demo" in out and "doctor" in out


def test_demo_defaults(demo):
    assert cli.main(["demo"]) == 0
    assert demo.calls == [(Path("out"), 0, False)]


def test_demo_arguments(demo):
    assert cli.main(["demo", "--out", "a b/c", "--seed", "7", "--json"]) == 0
    assert demo.calls == [(Path("a b/c"), 7, True)]


def test_demo_svdiff(monkeypatch):
    calls = []
    module = types.ModuleType("fastlora.demo.svdiff")
    module.main = lambda out, seed, as_json: calls.append((out, seed, as_json)) or 0
    monkeypatch.setitem(sys.modules, "fastlora.demo.svdiff", module)
    assert cli.main(["demo", "svdiff", "--out", "x", "--seed", "4"]) == 0
    assert cli.main(["demo", "svdiff", "--json"]) == 0
    assert calls == [(Path("x"), 4, False), (Path("out"), 0, True)]


def test_demo_refuses_another_part(demo, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "sliders"])
    assert stop.value.code == 2 and "svdiff" in capsys.readouterr().err
    assert demo.calls == []


def test_train_needs_a_method(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train"])
    assert stop.value.code == 2 and "method" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "x", "1.5", str(2**63)])
def test_demo_refuses_a_bad_seed(demo, capsys, seed):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--seed", seed])
    assert stop.value.code == 2
    assert "--seed" in capsys.readouterr().err
    assert demo.calls == []


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (PermissionError(13, "Permission denied", "/r/out"), "/r/out: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the file is short"), "the file is short"),
        (
            ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot"),
            "matplotlib is not installed; try: pip install matplotlib",
        ),
        (
            ModuleNotFoundError("No module named 'sklearn'", name="sklearn"),
            "sklearn is not installed; try: pip install scikit-learn",
        ),
    ],
    ids=["permission", "disk-full", "plain-os-error", "matplotlib", "sklearn"],
)
def test_expected_failures_are_one_line(demo, capsys, failure, line):
    demo.failure = failure
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == f"fastlora demo: {line}\n"


def test_help_of_the_demo_says_what_it_trains_and_needs(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "a thickness slider and a subject" in words and "style" not in words
    assert "pip install '.[demo]'" in words


def test_traceback_on_request(demo):
    demo.failure = PermissionError(13, "Permission denied", "/r/out")
    with pytest.raises(PermissionError):
        cli.main(["--traceback", "demo"])


def test_a_bug_is_not_hidden(demo):
    demo.failure = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["demo"])


def test_stopped_by_the_user(demo, capsys):
    demo.failure = KeyboardInterrupt()
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err.strip() == "fastlora: stopped"


def test_the_installed_command_runs():
    command = [sys.executable, "-m", "fastlora.cli", "--version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout == f"fastlora {fastlora.__version__}\n"
