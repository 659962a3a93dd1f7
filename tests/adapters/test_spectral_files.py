"""Files of spectral shifts: which base they belong to, and files of version 1."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastlora
from fastlora.adapters.base_hash import base_hash, same_base
from fastlora.formats import files
from tests.adapters.oracles import (
    assert_unchanged,
    same_bits,
    snapshot,
    spectral_weight,
    with_weight,
)


def model(seed: int = 0, features: int = 14) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 9), nn.LayerNorm(9))


def saved(path: Path, **kwargs: Any) -> nn.Sequential:
    source = model()
    fastlora.inject(source, fastlora.Spectral(**kwargs))
    with torch.no_grad():
        for p in fastlora.parameters(source):
            p.copy_(0.3 * torch.randn(p.shape))
    fastlora.save(source, path)
    return source


@pytest.mark.parametrize("norms", ["elementwise", "scalar", "skip"])
def test_the_file_has_shifts_and_says_what_they_are_of(tmp_path: Path, norms: Any) -> None:
    saved(tmp_path / "a", norms=norms)
    tensors, metadata = files.read(tmp_path / "a")
    shapes = {"0.shift": (9,), "1.shift": {"elementwise": (9,), "scalar": (1,)}.get(norms)}
    expected = {key: shape for key, shape in shapes.items() if shape}
    assert {key: tuple(t.shape) for key, t in tensors.items()} == expected
    config = json.loads(metadata["config"])
    assert (config["kind"], config["method"]) == ("spectral", "svdiff")
    assert config["settings"] == {"norms": norms}
    weight = model()[0].weight.detach().double()
    assert config["base_hash"]["0"][0] == pytest.approx(weight.norm().item(), rel=1e-5)
    assert len(config["base_hash"]["0"]) == 5
    # another norm mode than the file's tensors have
    config["settings"]["norms"] = "scalar" if norms == "elementwise" else "elementwise"
    save_file(tensors, tmp_path / "b", {**metadata, "config": json.dumps(config)})
    if norms != "skip":
        with pytest.raises(fastlora.AdapterError, match=r"1: shift: expected \[\d\], got \[\d\]"):
            fastlora.load(model(), tmp_path / "b")


def test_another_base_is_refused_unless_any_will_do(tmp_path: Path) -> None:
    source = saved(tmp_path / "a")
    other = model(seed=1)
    plain, before = copy.deepcopy(other), snapshot(other)
    with pytest.raises(fastlora.AdapterError, match="0: .* another one; any_base=True"):
        fastlora.load(other, tmp_path / "a")
    assert_unchanged(other, before)
    fastlora.load(other, tmp_path / "a", any_base=True)
    shifts = [layer.fastlora["default"].shift for layer in source]
    x = torch.randn(3, 14)
    y = with_weight(plain[0], spectral_weight(plain[0], shifts[0], 1.0), x)
    y = with_weight(plain[1], plain[1].weight.detach().double() + shifts[1].detach().double(), y)
    torch.testing.assert_close(other(x).double(), y, rtol=1e-4, atol=1e-4)
    narrow = model(features=5)
    before = snapshot(narrow)
    with pytest.raises(fastlora.AdapterError, match=r"0: shift: expected \[5\], got \[9\]"):
        fastlora.load(narrow, tmp_path / "a", any_base=True)
    assert_unchanged(narrow, before)


def test_a_file_of_version_1(tmp_path: Path) -> None:
    """As version 0.1 wrote it, with the five numbers of `nn.Linear`'s weight in full."""
    source = model()
    with torch.no_grad():
        source[0].weight.copy_(torch.arange(126.0).view(9, 14) / 100)
    prints = {p: base_hash(m.weight.double()) for p, m in source.named_children()}
    assert prints["0"][0] == pytest.approx((sum(i * i for i in range(126)) ** 0.5) / 100, rel=1e-5)
    config = {
        "kind": "spectral",
        "modules": {"0": {"norms": "elementwise"}, "1": {"norms": "elementwise"}},
        "weight_prints": prints,
    }
    shifts = {"0.shift": torch.randn(9), "1.shift": torch.randn(9)}
    metadata = {"format": "fastlora", "version": "1", "config": json.dumps(config)}
    save_file(shifts, tmp_path / "a", metadata)
    fastlora.load(source, tmp_path / "a")
    assert same_bits(source[0].fastlora["default"].shift, shifts["0.shift"])
    with pytest.raises(fastlora.AdapterError, match="another one"):
        fastlora.load(model(), tmp_path / "a")


@pytest.mark.parametrize("shape", [(3,), (64, 64), (1280, 11, 3)], ids=str)
def test_the_hash_survives_rounding_and_tells_weights_apart(shape: tuple[int, ...]) -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        weight = torch.randn(shape)
        known = base_hash(weight)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            assert same_base(known, base_hash(weight.to(dtype)))
        # a shuffle, a sign, a scale, and another weight of the same distribution
        others = [weight.flip(0), -weight, 1.05 * weight, torch.randn(shape)]
        assert not any(same_base(known, base_hash(other)) for other in others)


def test_the_hash_of_nothing() -> None:
    assert base_hash(torch.zeros(3, 4)) == [0.0] * 5
    assert same_base([0.0] * 5, base_hash(torch.zeros(3, 4)))
    assert not same_base(base_hash(torch.ones(3, 4)), base_hash(torch.zeros(3, 4)))
