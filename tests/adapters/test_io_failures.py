"""Refusals of save and load come before the first change, of the model and of the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.adapters.nets import Net
from tests.adapters.oracles import assert_unchanged, randomise, same_bits, snapshot


def file(path: Path, **kwargs: Any) -> Path:
    model = Net()
    fastlora.inject(model, fastlora.LoRA(rank=2, **kwargs), name="a", seed=0)
    randomise(model, size=0.5)
    fastlora.save(model, path)
    return path


CASES: dict[str, tuple[Any, Any, str]] = {
    "batch": ({"x": torch.ones(5)}, torch.ones(4), r"one batch size, got \[4, 5\]"),
    "folded": (None, torch.ones(5), "'new' differs per sample"),
    "gates": ({"x": 1.0}, 1e30, "alpha / rank = 1e"),
    "rows of gates": ({"x": 1.0}, torch.tensor([1e30, 1.0]), "alpha / rank = 1e"),
}


@pytest.mark.parametrize(("strengths", "scale", "message"), CASES.values(), ids=CASES.keys())
def test_a_strength_that_load_refuses_leaves_the_base_free(
    tmp_path: Path, strengths: Any, scale: Any, message: str
) -> None:
    path = file(tmp_path / "a", alpha=2e10 if "alpha" in message else None)
    torch.manual_seed(0)
    model, tokens = Net(), torch.randint(0, 12, (5, 4))
    fastlora.inject(model, fastlora.LoRA(rank=2), where=["conv"], name="x", freeze=False)
    randomise(model, size=0.5)
    if strengths is None:
        fastlora.fold(model)
    else:
        fastlora.set_scale(model, strengths)
    before, y = snapshot(model), model(tokens).detach()
    with pytest.raises(fastlora.AdapterError, match=message):
        fastlora.load(model, path, name="new", scale=scale)
    assert_unchanged(model, before)  # requires_grad among the rest
    assert model.inner[0].weight.requires_grad and list(fastlora.adapters(model)) == ["x"]
    assert same_bits(model(tokens).detach(), y)


def test_two_batch_sizes_of_two_parts_are_refused_before_they_become_one(tmp_path: Path) -> None:
    path, model = file(tmp_path / "a"), Net()
    fastlora.inject(model.conv, fastlora.LoRA(rank=2), name="x", freeze=False)
    fastlora.inject(model.inner, fastlora.LoRA(rank=2), name="y", freeze=False)
    fastlora.set_scale(model.inner, {"y": torch.ones(3)})
    before = snapshot(model)
    with pytest.raises(fastlora.AdapterError, match=r"one batch size, got \[3, 4\]"):
        fastlora.load(model, path, name="new", scale=torch.ones(4))
    assert_unchanged(model, before)


def test_a_strength_of_load_is_that_of_set_scale(tmp_path: Path) -> None:
    path, tokens = file(tmp_path / "a"), torch.randint(0, 12, (5, 4))
    for scale, folded in ((0.25, False), (torch.arange(5.0), False), (-2.0, True)):
        results = []
        for at_once in (True, False):
            torch.manual_seed(0)
            model = Net()
            fastlora.inject(model, fastlora.LoRA(rank=2), name="x", seed=1)
            randomise(model, size=0.5)
            if folded:
                fastlora.fold(model)
            info = fastlora.load(model, path, name="new", **({"scale": scale} if at_once else {}))
            if not at_once:
                fastlora.set_scale(model, {"new": scale})
            else:
                assert torch.equal(torch.as_tensor(info.adapter.scale), torch.as_tensor(scale))
            results.append(model(tokens).detach())
        assert same_bits(*results)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", [fastlora.LoRA(rank=2, dora=True), fastlora.Spectral()], ids=str)
def test_values_that_load_would_refuse_are_not_saved(
    tmp_path: Path, spec: Any, value: float
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fastlora.inject(model, spec, name="a")
    fastlora.save(model, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    key, parameter = list(model[1].fastlora["a"].named_parameters())[-1]
    with torch.no_grad():
        parameter[-1] = value
    for path in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(fastlora.AdapterError, match=rf"save: 'a': 1\.{key}: expected finite"):
            fastlora.save(model, path)
    assert (tmp_path / "a").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_saving_a_model_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(fastlora.AdapterError, match="save: the model has no adapters"):
        fastlora.save(nn.Linear(2, 2), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
