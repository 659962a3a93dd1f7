"""fastlora's own format as a pair of pure functions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastlora.formats import native
from fastlora.formats.files import FormatError

CONFIG = {"kind": "lora", "modules": {"a.b": {"rank": 2}, "": {"rank": 1}, "ü.0": {"rank": 3}}}
MODULES = {
    path: {"down": torch.full((2, 3), i), "up": torch.ones(1)}
    for i, path in enumerate(CONFIG["modules"])
}


def test_unpack_is_the_inverse_of_pack() -> None:
    tensors, metadata = native.pack(MODULES, CONFIG)
    assert list(tensors) == ["a.b.down", "a.b.up", "down", "up", "ü.0.down", "ü.0.up"]
    assert all(isinstance(v, str) for v in metadata.values())
    modules, config = native.unpack(tensors, metadata, "file")
    assert config == CONFIG and modules.keys() == MODULES.keys()
    for path, own in MODULES.items():
        assert own.keys() == modules[path].keys()
        assert all(modules[path][k] is v for k, v in own.items())


def broken(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors, metadata = native.pack(MODULES, CONFIG)
    for key, value in changes.items():
        if value is None:
            metadata.pop(key)
        elif key == "config" and not isinstance(value, str):
            metadata[key] = json.dumps(value)
        else:
            metadata[key] = value
    return tensors, metadata


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, r"expected a fastlora adapter .* keys like 'a.b.down'"),
        ({"format": "pt"}, "expected a fastlora adapter"),
        ({"version": "2"}, "expected version 1 of the format, got '2'"),
        ({"version": None}, "expected version 1 of the format, got None"),
        ({"config": None}, "configuration cannot be read"),
        ({"config": "{"}, "configuration cannot be read"),
        ({"config": "[" * 100_000}, "configuration cannot be read"),
        ({"config": "[]"}, "configuration cannot be read"),
        ({"config": {"kind": "lora"}}, "configuration cannot be read"),
        ({"config": {"kind": "loha", "modules": {}}}, "configuration cannot be read.*loha"),
        ({"config": {"kind": ["lora"], "modules": {"a.b": {}}}}, "configuration cannot be read"),
        ({"config": {"kind": "lora", "modules": ["a.b"]}}, "modules is not an object"),
        ({"config": {"kind": "lora", "modules": {}}}, "at least one module"),
        (
            {"config": {"kind": "lora", "modules": {"a.b": 3}}},
            "settings of a module are not an object",
        ),
        ({"config": {**CONFIG, "kind": "spectral"}}, "unexpected key 'a.b.down'"),
        ({"config": {**CONFIG, "modules": {"a.b": {}}}}, "unexpected key 'down'"),
        (
            {"config": {**CONFIG, "modules": {**CONFIG["modules"], "c": {}}}},
            r"no tensors for \['c'\]",
        ),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=f"^some file: .*{message}"):
        native.unpack(*broken(**changes), "some file")


@pytest.mark.parametrize("key", ["a.b.mid", "a.b", ".down", "c.down", "a.b.down.weight", "shift"])
def test_extra_keys(key: str) -> None:
    tensors, metadata = broken()
    with pytest.raises(FormatError, match=f"unexpected key '{key}'"):
        native.unpack({**tensors, key: torch.ones(1)}, metadata, "file")


def test_an_empty_file() -> None:
    with pytest.raises(FormatError, match="keys like 'nothing'"):
        native.unpack({}, {}, "file")
