"""The README's Python runs, block after block, as a reader would run it."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)  # they write files
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"README.md, Python block {i + 1}", "exec"), names)
    assert names["report"], names["report"]
    assert tuple(names["images"].shape) == (5, 1, 32, 32)


def test_make_targets_exist():
    makefile = README.with_name("Makefile").read_text()
    targets = set(re.findall(r"^make ([a-z]+)", README.read_text(), re.MULTILINE))
    assert targets >= {"demo", "test"}
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []
