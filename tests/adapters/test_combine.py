"""`combine` against the formulas in float64 on weights written out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters.lookup import adapted_layers
from tests.adapters.nets import Net
from tests.adapters.oracles import adapted_weight, assert_unchanged, randomise, snapshot

WEIGHTS = {"dog": 0.75, "statue": -0.5}
BOTH = {"add": (0.75, -0.5), "interpolate": (0.75 / 0.25, -0.5 / 0.25)}


def two(spec: Any = None, other: Any = None, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    model = Net().to(dtype)
    fastlora.inject(model, spec or fastlora.Spectral(), name="dog")
    fastlora.inject(model, other or spec or fastlora.Spectral(), name="statue")
    randomise(model, size=0.5)
    fastlora.set_scale(model, {"dog": 3.0})  # does not count
    return model


def shift(layer: Any, name: str) -> Tensor:
    return layer.fastlora[name].shift.detach().double()


def on_weights(model: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    plain = Net().double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "fastlora" not in k})
    weights = {f"{path}.weight": w for path, w in weights.items()}
    return torch.func.functional_call(plain, weights, (x,)).detach()


def spectral(layer: Any, delta: Tensor) -> Tensor:
    weight = layer.weight.detach().double()
    if weight.dim() == 1:
        return weight + delta
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    return ((u * (s + delta).clamp_min(0)) @ vh).view(weight.shape)


X = torch.tensor([[1, 2, 3, 4], [11, 0, 5, 5]])


@pytest.mark.parametrize("rule", BOTH)
@pytest.mark.parametrize("norms", ["elementwise", "scalar"])
def test_shifts_by_the_formula(rule: Any, norms: Any) -> None:
    model = two(fastlora.Spectral(), fastlora.Spectral(norms=norms))
    info = fastlora.combine(model, WEIGHTS, rule, name="both")
    assert info.kind == "spectral" and info.scale == 1.0 and info.enabled
    assert not any(fastlora.adapters(model)[name].enabled for name in WEIGHTS)
    a, b = BOTH[rule]
    weights = {
        path: spectral(layer, a * shift(layer, "dog") + b * shift(layer, "statue"))
        for path, layer in adapted_layers(model).items()
    }
    torch.testing.assert_close(model(X), on_weights(model, weights, X))


def test_add_is_what_both_together_compute() -> None:
    model = two()
    fastlora.set_scale(model, WEIGHTS)
    together = model(X).detach()
    fastlora.combine(model, WEIGHTS)
    torch.testing.assert_close(model(X).detach(), together)
    fastlora.remove(model, "combined")
    fastlora.enable(model)
    assert torch.equal(model(X).detach(), together)


def test_styles_by_layers() -> None:
    """Convolutions from one, the rest from the other, also where the weights are interpolated."""
    for rule in ("add", "interpolate"):
        model = two()
        selection = lambda path, m: isinstance(m, nn.Conv2d)  # noqa: E731
        fastlora.combine(model, {"dog": 1, "statue": 1}, rule, where={"statue": selection})
        weights = {
            path: spectral(layer, shift(layer, "statue" if isinstance(layer, nn.Conv2d) else "dog"))
            for path, layer in adapted_layers(model).items()
        }
        torch.testing.assert_close(model(X), on_weights(model, weights, X))
    model = two()
    where = {"dog": r"inner\..*", "statue": ["conv", "inner.0"]}
    info = fastlora.combine(model, WEIGHTS, where=where)
    assert info.modules == ("conv", "inner.0", "inner.2")
    layers = adapted_layers(model)
    both = 0.75 * shift(layers["inner.0"], "dog") - 0.5 * shift(layers["inner.0"], "statue")
    torch.testing.assert_close(shift(layers["inner.0"], "combined"), both)
    torch.testing.assert_close(
        shift(layers["conv"], "combined"), -0.5 * shift(layers["conv"], "statue")
    )


@pytest.mark.parametrize("rule", BOTH)
def test_low_rank_adapters_are_concatenated(rule: Any) -> None:
    where = ["embedding", "conv", "grouped", "inner.0", "inner.2"]
    torch.manual_seed(0)
    model = Net().double()
    fastlora.inject(model, fastlora.LoRA(rank=4, alpha=2), where, name="dog")
    fastlora.inject(model, fastlora.LoRA(rank=2, alpha=3), where, name="statue")
    randomise(model)
    info = fastlora.combine(model, WEIGHTS, rule)
    assert info.kind == "lora" and info.rank == 6
    a, b = BOTH[rule]
    weights = {
        path: adapted_weight(
            layer, [(layer.fastlora["dog"], a * 0.5), (layer.fastlora["statue"], b * 1.5)]
        )
        for path, layer in adapted_layers(model).items()
    }
    torch.testing.assert_close(model(X), on_weights(model, weights, X))


def test_the_new_one_is_saved_and_scaled_like_any_other(tmp_path: Path) -> None:
    model = two(dtype=torch.float32)
    plain = copy.deepcopy(model)
    fastlora.combine(model, WEIGHTS, name="both")
    expected = model(X).detach()
    fastlora.save(model, tmp_path / "both.safetensors", "both")
    for name in WEIGHTS:
        fastlora.remove(plain, name)
    fastlora.load(plain, tmp_path / "both.safetensors", name="both")
    assert torch.equal(plain(X).detach(), expected)
    fastlora.set_scale(model, {"both": 0.0})
    fastlora.remove(plain, "both")
    assert torch.equal(model(X), plain(X))


def test_folded_models_and_16_bit_bases() -> None:
    model = two(dtype=torch.bfloat16)
    fastlora.fold(model)
    fastlora.combine(model, WEIGHTS)
    slot = model.inner[0].fastlora["combined"]
    assert slot.shift.dtype == torch.float32 and slot.shift.requires_grad
    folded = model(X)
    fastlora.unfold(model)
    assert torch.equal(folded, model(X).detach())


def test_the_base_stays_trainable_where_it_was() -> None:
    model = Net()
    fastlora.inject(model, fastlora.Spectral(), name="dog", freeze=False)
    fastlora.combine(model, {"dog": 0.5})
    assert model.conv.weight.requires_grad


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "rule": (WEIGHTS, {"rule": "mean"}, "rule: expected 'add' or 'interpolate', got 'mean'"),
    "nothing": ({}, {}, "expected weights by adapter name"),
    "a list": (["dog"], {}, "expected weights by adapter name"),
    "not finite": ({"dog": float("nan")}, {}, "weight of 'dog': expected a finite number"),
    "a word": ({"dog": "1"}, {}, "weight of 'dog': expected a finite number, got '1'"),
    "unknown": ({"cat": 1.0}, {}, "no adapter named 'cat'"),
    "sum": ({"dog": 1.0, "statue": -1.0}, {"rule": "interpolate"}, "sum to 0"),
    "taken": (WEIGHTS, {"name": "dog"}, "'dog' exists already"),
    "selection": (WEIGHTS, {"where": {"cat": None}}, "where: expected selections for some of"),
    "no layer": (WEIGHTS, {"where": {"dog": "nowhere"}}, "'nowhere' selects no layer that 'dog'"),
    "regex": (WEIGHTS, {"where": {"dog": "("}}, "is not a regex"),
    "kinds": ({"dog": 1.0, "low": 1.0}, {}, "all of one kind, got lora and spectral"),
    "dora": ({"norm": 1.0}, {}, "LoRA without DoRA"),
    "kinds apart": (
        {"dog": 1.0, "low": 1.0}, {"where": {"low": ["inner.0"]}}, "of one kind, got LoRA and"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=str)
def test_what_cannot_be_combined_is_an_error_and_changes_nothing(case: str) -> None:
    weights, options, message = BAD[case]
    model = two()
    fastlora.inject(model, fastlora.LoRA(rank=2), where=["inner.0"], name="low")
    fastlora.inject(model, fastlora.LoRA(rank=2, dora=True), where=["inner.0"], name="norm")
    before, infos = snapshot(model), fastlora.adapters(model)
    with pytest.raises(fastlora.AdapterError) as caught:
        fastlora.combine(model, weights, **options)
    assert message in str(caught.value)
    assert_unchanged(model, before)
    assert fastlora.adapters(model) == infos
