"""`tune` on a GPU: every route is timed in a graph, and the result stays right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlora
from fastlora.ops import _tuned
from tests.adapters.oracles import randomise
from tests.devices import no_gpu

pytestmark = [pytest.mark.gpu, no_gpu]


def test_every_route_is_timed_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_TUNE_FILE", str(tmp_path / "tune.json"))
    _tuned.forget()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 320), nn.SiLU(), nn.Linear(320, 128)).cuda().bfloat16()
    x = torch.randn(2, 200, 256, device="cuda", dtype=torch.bfloat16)
    fastlora.inject(model, fastlora.LoRA(16), name="a", seed=0, dtype=torch.bfloat16)
    randomise(model, size=0.1)
    try:
        with torch.no_grad():
            before = model(x)
            report = fastlora.tune(model, x)
            after = model(x)
        assert len(report.rows) == 2 and not report.problem, str(report)
        for row in report.rows:
            assert set(row.measured) >= {"products", "extended", "appended"}
            assert all(0 < seconds < 1 for seconds in row.measured.values())
            assert row.chosen in row.measured
        torch.testing.assert_close(after, before, rtol=3e-2, atol=3e-2)
        (calls,) = json.loads((tmp_path / "tune.json").read_text())["devices"].values()
        assert sorted(calls.values()) == sorted(row.chosen for row in report.rows)
    finally:
        monkeypatch.undo()
        _tuned.forget()
        fastlora.ops.lora_linear.clear()
