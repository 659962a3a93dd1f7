"""docs/svdiff.md: its Python and its commands for the digits model run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("PIL")
pytest.importorskip("transformers")

import fastlora
from fastlora import cli
from fastlora.models import digits

PAGE = Path(__file__).resolve().parent.parent / "docs" / "svdiff.md"


@pytest.mark.slow
def test_what_the_page_shows_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # it writes files
    blocks = re.findall(r"```(python|sh)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    ran = 0
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, f"docs/svdiff.md: {block.splitlines()[0]}", "exec"), names)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "digits" in words:
                assert cli.main(words[1:]) == 0
                ran += 1
    assert ran == 1
    model = digits.load()
    fastlora.load(model, "three.safetensors", name="three")
    info = fastlora.adapters(model)["three"]
    trained = fastlora.adapters(names["model"])
    assert info.parameters == trained["subject"].parameters
    assert f"{info.parameters:,}" in PAGE.read_text()
    assert trained["mixed"].enabled and not trained["subject"].enabled
    assert names["info"].parameters < info.parameters
    everything = fastlora.inject(digits.load(), fastlora.Spectral())
    assert f"as the demo does ({everything.parameters:,})" in PAGE.read_text()
