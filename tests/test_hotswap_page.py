"""docs/hotswap.md: its Python runs as it stands, in one graph."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("transformers")

import fastlora
from fastlora.models import digits

PAGE = Path(__file__).resolve().parent.parent / "docs" / "hotswap.md"


@pytest.mark.slow
def test_what_the_page_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.chdir(tmp_path)  # where the files are
    donor = digits.load()
    for name, rank, where in (("style", 8, r".*to_[qkv]"), ("subject", 4, r".*(ff\..*|conv[12])")):
        fastlora.inject(donor, fastlora.LoRA(rank), where, name)
        fastlora.save(donor, f"{name}.safetensors", name)
    cond = donor.encode(["a seven"]).detach()
    names: dict[str, Any] = {"x": torch.randn(1, 1, 32, 32), "t": torch.tensor([500]), "cond": cond}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    with torch.no_grad():
        for i, block in enumerate(blocks):
            exec(compile(block, f"docs/hotswap.md, Python block {i + 1}", "exec"), names)
        names["compiled"](names["x"], names["t"], names["cond"])
    assert counter.frame_count == 1
    assert fastlora.adapters(names["model"])["subject"].rank == 4
