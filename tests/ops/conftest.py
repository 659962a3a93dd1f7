"""Operators' tests that are marked `on_devices` run three times."""

from collections.abc import Iterator

import pytest

from fastlora import ops
from tests.devices import OnGpu, ops_on_gpu, refused_there


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    kind = getattr(request, "param", "cpu")
    if kind == "emulated":
        with ops.emulated():
            yield kind
        return
    if kind == "cuda":
        if hasattr(request.module, "op"):
            monkeypatch.setattr(request.module, "op", OnGpu(request.module.op))
        else:
            monkeypatch.setattr(request.module, "ops", ops_on_gpu())
    yield kind


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    refused = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and refused_there(item.callspec.params, item.module.__name__)
    ]
    for item in refused:
        items.remove(item)
