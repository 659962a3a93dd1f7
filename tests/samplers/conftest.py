import importlib

import pytest

from tests.samplers.recording import RecordedGraph, is_capturing


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Sampler.capture` records operators on the CPU."""
    sampler = importlib.import_module("fastlora.samplers.sampler")
    monkeypatch.setattr(sampler, "Graph", RecordedGraph)
    for name in ("dora", "adapted", "layers", "state", "steady"):
        module = importlib.import_module(f"fastlora.adapters.{name}")
        monkeypatch.setattr(module, "is_capturing", is_capturing)
