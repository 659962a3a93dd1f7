"""fastlora's own format as a pair of pure functions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastlora.formats import native
from fastlora.formats.files import FormatError

CONFIG = {"kind": "lora", "modules": {"a.b": {"rank": 2}, "": {"rank": 1}, "ü.0": {"rank": 3}}}
WRITTEN = {**CONFIG, "settings": {}}
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


def test_common_settings_are_written_once_and_shifts_with_what_they_are_of() -> None:
    config = {
        "kind": "spectral",
        "modules": {"a": {"norms": "scalar"}, "b.0": {"norms": "scalar"}},
        "base_hash": {"a": [1.5, 0.25, 0.0, -1.0, 3.0], "b.0": [0.0] * 5},
    }
    modules = {path: {"shift": torch.ones(3)} for path in ("a", "b.0")}
    tensors, metadata = native.pack(modules, config)
    assert json.loads(metadata["config"]) == {
        "kind": "spectral",
        "method": "svdiff",
        "settings": {"norms": "scalar"},
        "modules": {"a": {}, "b.0": {}},
        "base_hash": config["base_hash"],
    }
    assert native.unpack(tensors, metadata, "file") == (modules, config)


def test_a_file_of_version_1() -> None:
    """As it was written until version 2: all settings by module, `weight_prints`."""
    tensors = {"a.shift": torch.ones(3), "b.shift": torch.ones(1)}
    config = (
        '{"kind": "spectral", "modules": {"a": {"norms": "elementwise"}, "b": {"norms": "scalar"}},'
        ' "weight_prints": {"a": [1.0, 0.5, 0.5, 0.5, 0.5], "b": [2.0, 0.0, 0.0, 0.0, 0.0]}}'
    )
    metadata = {"format": "fastlora", "version": "1", "config": config}
    modules, read = native.unpack(tensors, metadata, "file")
    assert modules == {"a": {"shift": tensors["a.shift"]}, "b": {"shift": tensors["b.shift"]}}
    assert read == {
        "kind": "spectral",
        "modules": {"a": {"norms": "elementwise"}, "b": {"norms": "scalar"}},
        "base_hash": {"a": [1.0, 0.5, 0.5, 0.5, 0.5], "b": [2.0, 0.0, 0.0, 0.0, 0.0]},
    }


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
        ({"version": "3"}, "expected version 1 or 2 of the format, got '3'"),
        ({"version": None}, "expected version 1 or 2 of the format, got None"),
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
        ({"config": CONFIG}, "configuration cannot be read: KeyError.'settings'"),
        ({"config": {**CONFIG, "settings": 3}}, "settings is not an object"),
        ({"config": {**WRITTEN, "kind": "spectral"}}, "unexpected key 'a.b.down'"),
        (
            {"config": {**WRITTEN, "kind": "spectral", "method": "pissa"}},
            "expected method 'svdiff', got 'pissa'",
        ),
        ({"config": {**WRITTEN, "modules": {"a.b": {}}}}, "unexpected key 'down'"),
        (
            {"config": {**WRITTEN, "modules": {**CONFIG["modules"], "c": {}}}},
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
