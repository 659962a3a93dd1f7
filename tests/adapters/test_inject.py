"""Where adapters go, where they are refused, and that a refusal leaves the model as it was."""

from __future__ import annotations

import copy
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters import adapted_layers
from fastlora.adapters.lookup import arenas
from tests.adapters.oracles import assert_unchanged, randomise, snapshot


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.to_out = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.to_out(torch.softmax(self.to_q(h) @ self.to_k(h).mT, -1) @ h)


def unet() -> nn.Module:
    torch.manual_seed(0)
    parts = OrderedDict(
        attn1=Block(), attn10=Block(), mid=nn.Sequential(nn.Linear(8, 8), nn.SiLU())
    )
    return nn.Sequential(parts).eval()


# --- where ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (r".*to_[qk]", ["attn1.to_q", "attn1.to_k", "attn10.to_q", "attn10.to_k"]),
        (r"attn1\.to_q", ["attn1.to_q"]),  # the whole path: not attn10.to_q, not a prefix
        (["to_q"], ["attn1.to_q", "attn10.to_q"]),
        (["attn1.to_q", "mid.0"], ["attn1.to_q", "mid.0"]),
        (("0",), ["attn1.to_out.0", "attn10.to_out.0", "mid.0"]),
        ({"to_k"}, ["attn1.to_k", "attn10.to_k"]),
        (lambda path, m: path.startswith("mid") and isinstance(m, nn.Linear), ["mid.0"]),
        # dropouts and activations inside are nothing that anybody can have meant
        (r"attn1\.to_out.*", ["attn1.to_out.0"]),
        (r"mid.*", ["mid.0"]),
    ],
    ids=[
        "regex",
        "regex_whole",
        "suffix",
        "suffixes",
        "tuple",
        "set",
        "predicate",
        "dropout",
        "act",
    ],
)
def test_where(where: Any, expected: list[str]) -> None:
    model = unet()
    info = fastlora.inject(model, fastlora.LoRA(rank=2), where=where)
    assert list(info.modules) == expected == list(adapted_layers(model))


def test_where_none_is_every_layer_that_the_adapter_can_take() -> None:
    assert len(fastlora.inject(unet(), fastlora.LoRA(rank=2)).modules) == 7
    assert len(fastlora.inject(unet(), fastlora.Spectral()).modules) == 9  # and the norms


@pytest.mark.parametrize(
    "where", ["to_q", r"attn1\.to", [], ["o_q"], ["attn1"], [r".*to_q"], lambda p, m: 0]
)
def test_a_where_that_matches_nothing_shows_what_there_is(where: Any) -> None:
    model = unet()
    before = snapshot(model)
    with pytest.raises(fastlora.AdapterError) as error:
        fastlora.inject(model, fastlora.LoRA(rank=2), where=where)
    assert "matches no layer that LoRA can adapt" in str(error.value)
    assert "'attn1.to_q', 'attn1.to_k', 'attn1.to_out.0'" in str(error.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (r"(", "is not a regex"),
        (3, "expected a regex, suffixes, a predicate or None, got 3"),
        (r"attn1.*", r"attn1.norm \(LayerNorm\): LoRA needs a matrix"),
        (["norm"], "attn1.norm"),
    ],
    ids=["regex", "int", "norm_by_regex", "norm_by_suffix"],
)
def test_a_bad_where_is_refused(where: Any, message: str) -> None:
    model = unet()
    before = snapshot(model)
    with pytest.raises(fastlora.AdapterError, match=message):
        fastlora.inject(model, fastlora.LoRA(rank=2), where=where)
    assert_unchanged(model, before)


def test_layers_of_no_supported_kind_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
    with pytest.raises(
        fastlora.AdapterError, match=r"1 \(Conv1d\): .*not supported; 2 \(BatchNorm1d"
    ):
        fastlora.inject(model, fastlora.LoRA(rank=2), where=r"\d")
    assert fastlora.inject(model, fastlora.LoRA(rank=2)).modules == ("0",)


def test_a_predicate_that_raises_changes_nothing() -> None:
    model = unet()
    before = snapshot(model)

    def where(path: str, module: nn.Module) -> bool:
        if path == "mid.0":
            raise KeyError(path)
        return True

    with pytest.raises(KeyError):
        fastlora.inject(model, fastlora.LoRA(rank=2), where=where)
    assert_unchanged(model, before)


def test_the_model_itself_may_be_the_layer() -> None:
    layer = nn.Linear(4, 3)
    before = snapshot(layer)
    assert fastlora.inject(layer, fastlora.LoRA(rank=2)).modules == ("",)
    assert list(layer.state_dict())[2:] == ["fastlora.default.down", "fastlora.default.up"]
    fastlora.remove(layer, "default")
    assert_unchanged(layer, before)


# --- names and settings -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a.b", "training", "items", "svd_u", "forward", None, 3])
def test_bad_names(name: Any, tmp_path) -> None:
    model = unet()
    fastlora.inject(model, fastlora.LoRA(rank=2), name="good")
    fastlora.save(model, tmp_path / "a.safetensors")
    before = snapshot(model)
    with pytest.raises(fastlora.AdapterError, match="adapter name: expected a word without dots"):
        fastlora.inject(model, fastlora.LoRA(rank=2), name=name)
    with pytest.raises(fastlora.AdapterError, match="adapter name: expected a word without dots"):
        fastlora.load(model, tmp_path / "a.safetensors", name=name)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["a", "my slider", "größe-1", "0", "down", "weight"])
def test_good_names(name: str) -> None:
    model = unet()
    x = torch.randn(2, 3, 8)
    fastlora.inject(model, fastlora.LoRA(rank=2), name=name)
    randomise(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    fastlora.set_scale(model, {name: 0.5})
    model(x)
    with pytest.raises(fastlora.AdapterError, match="exists already; remove it first"):
        fastlora.inject(model, fastlora.LoRA(rank=2), where=["mid.0"], name=name)
    fastlora.remove(model, name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastlora.LoRA(rank=0),
        lambda: fastlora.LoRA(rank=-1),
        lambda: fastlora.LoRA(rank=2.0),  # type: ignore[arg-type]
        lambda: fastlora.LoRA(rank=True),
        lambda: fastlora.LoRA(ranks={"a": 0}),
        lambda: fastlora.LoRA(alpha="16"),  # type: ignore[arg-type]
        lambda: fastlora.LoRA(alpha=0),
        lambda: fastlora.LoRA(alpha=float("nan")),
        lambda: fastlora.LoRA(alphas={"a": float("inf")}),
        lambda: fastlora.LoRA(dropout=1.0),
        lambda: fastlora.LoRA(dropout=-0.1),
        lambda: fastlora.LoRA(dropout=float("nan")),
        lambda: fastlora.LoRA(dropout="0.1"),  # type: ignore[arg-type]
        lambda: fastlora.LoRA(alpha=1e300),
        lambda: fastlora.LoRA(alpha=-(10**400)),
        lambda: fastlora.LoRA(alphas={"a": 1e39}),
        lambda: fastlora.LoRA(rank=10**400),
        lambda: fastlora.LoRA(ranks=[1]),  # type: ignore[arg-type]
        lambda: fastlora.LoRA(ranks={1: 2}),  # type: ignore[arg-type]
        lambda: fastlora.LoRA(alphas=7),  # type: ignore[arg-type]
        lambda: fastlora.LoRA(dora="yes"),  # type: ignore[arg-type]
        lambda: fastlora.LoRA(rank_stabilized="no"),  # type: ignore[arg-type]
        lambda: fastlora.LoRA(rank_stabilized=1),  # type: ignore[arg-type]
        lambda: fastlora.Spectral(norms="all"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings(make: Callable[[], Any]) -> None:
    with pytest.raises(fastlora.AdapterError, match="expected"):
        make()


def test_the_class_instead_of_an_instance_is_refused() -> None:
    with pytest.raises(TypeError, match="spec: expected LoRA or Spectral, got type"):
        fastlora.inject(unet(), fastlora.LoRA)  # type: ignore[arg-type]


def test_inject_says_what_it_froze(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="fastlora"):
        fastlora.inject(unet(), fastlora.LoRA(rank=2))
    assert "inject froze 18 base parameters" in caplog.text


def test_the_base_is_free_again_when_nobody_asks_for_a_frozen_one() -> None:
    model = unet()
    base = list(model.parameters())
    base[0].requires_grad_(False)  # not ours to give back
    for name, freeze in (("a", True), ("b", True), ("c", False)):
        fastlora.inject(model, fastlora.LoRA(rank=2), name=name, freeze=freeze)
        assert not any(p.requires_grad for p in base)
    fastlora.remove(model, "a")
    assert not any(p.requires_grad for p in base)
    fastlora.remove(model, "b")
    assert [p.requires_grad for p in base] == [False] + [True] * (len(base) - 1)
    assert list(fastlora.adapters(model)) == ["c"]


def test_parts_that_become_one_remember_who_froze() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fastlora.inject(model[0], fastlora.LoRA(rank=2), name="a")
    fastlora.inject(model[1], fastlora.LoRA(rank=2), name="b")
    fastlora.inject(model, fastlora.LoRA(rank=2), name="c", freeze=False)
    fastlora.remove(model, "a")
    assert not model[1].weight.requires_grad
    fastlora.remove(model, "b")
    assert model[0].weight.requires_grad and model[1].weight.requires_grad


# --- in parts ---------------------------------------------------------------------------------


def test_a_part_first_and_then_the_whole() -> None:
    model, x = unet(), torch.randn(2, 3, 8)
    before = snapshot(model)
    fastlora.inject(model.attn1, fastlora.LoRA(rank=2), name="a", seed=0)
    fastlora.set_scale(model.attn1, {"a": 0.5})
    fastlora.inject(model.mid, fastlora.LoRA(rank=3), name="m", seed=0)
    fastlora.disable(model.mid, "m")
    assert len(arenas(model)) == 2
    fastlora.inject(model, fastlora.LoRA(rank=4), name="b", seed=1)
    assert len(arenas(model)) == 1
    infos = fastlora.adapters(model)
    assert {n: len(i.modules) for n, i in infos.items()} == {"a": 3, "m": 1, "b": 7}
    assert infos["a"].scale == 0.5 and not infos["m"].enabled and infos["b"].scale == 1.0
    randomise(model)
    fastlora.set_scale(model, {"a": -1.0, "b": 0.25})
    fastlora.enable(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert fastlora.verify(model, x)
            torch.testing.assert_close(model(x), copy.deepcopy(model)(x))
    for name in "amb":
        fastlora.remove(model, name)
    assert_unchanged(model, before)


def test_the_whole_first_and_then_a_part() -> None:
    model, x = unet(), torch.randn(2, 3, 8)
    before = snapshot(model)
    fastlora.inject(model, fastlora.LoRA(rank=4), name="b", seed=1)
    fastlora.inject(model.attn1, fastlora.LoRA(rank=2), name="a", seed=0)
    assert len(arenas(model)) == 1
    randomise(model)
    y = model(x)
    assert {n: len(i.modules) for n, i in fastlora.adapters(model).items()} == {"b": 7, "a": 3}
    torch.testing.assert_close(copy.deepcopy(model)(x), y)
    for m in (model, model.attn1):  # from either side
        fastlora.set_scale(m, {"a": 0.5, "b": -0.5})
        assert fastlora.verify(model, x)
    # another adapter of a part that has none of the whole's
    fastlora.remove(model.mid, "b")
    assert len(fastlora.adapters(model)["b"].modules) == 6
    assert type(model.mid[0]) is nn.Linear and fastlora.adapters(model)["b"].scale == -0.5
    assert fastlora.verify(model, x)
    fastlora.inject(model.mid, fastlora.LoRA(rank=3), name="b", seed=1)
    fastlora.set_scale(model, {"b": 2.0})
    assert len(fastlora.adapters(model)["b"].modules) == 7
    fastlora.remove(model, "a")
    fastlora.remove(model, "b")
    assert_unchanged(model, before)


def test_one_name_in_two_parts_merges_where_strengths_agree() -> None:
    model, x = unet(), torch.randn(2, 3, 8)
    for part in (model.attn1, model.mid):
        fastlora.inject(part, fastlora.LoRA(rank=2), name="a")
    randomise(model)
    fastlora.set_scale(model, {"a": 0.5})
    y = model(x)
    fastlora.set_scale(model.mid, {"a": -0.5})
    before = snapshot(model)
    with pytest.raises(fastlora.AdapterError, match="different strengths of 'a': 0.5 and -0.5"):
        fastlora.inject(model, fastlora.LoRA(rank=2), name="b")
    assert_unchanged(model, before)
    fastlora.set_scale(model, {"a": 0.5})
    fastlora.inject(model, fastlora.LoRA(rank=2), name="b")
    torch.testing.assert_close(model(x), y)
    assert len(arenas(model)) == 1 and len(fastlora.adapters(model)["a"].modules) == 4


def test_a_failure_half_way_changes_nothing(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(6, 6, 1, groups=3), nn.Linear(4, 4))
    before = snapshot(model)
    with pytest.raises(fastlora.AdapterError, match="not divisible"):
        fastlora.inject(model, fastlora.LoRA(rank=4))
    assert_unchanged(model, before)
    calls = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return original(*args, **kwargs)

    for file, target in (("building", "kaiming_uniform"), ("factor_cache", "factors")):
        module = sys.modules[f"fastlora.adapters.{file}"]
        original = getattr(module, target)
        monkeypatch.setattr(module, target, failing)
        calls.clear()
        with pytest.raises(MemoryError):
            spec = fastlora.LoRA(rank=3) if target == "kaiming_uniform" else fastlora.Spectral()
            fastlora.inject(model, spec)
        monkeypatch.undo()
        assert len(calls) == 2
        assert_unchanged(model, before)


# --- what others see --------------------------------------------------------------------------


def test_layers_stay_the_same_objects_with_their_hooks_and_attributes() -> None:
    layer = nn.Linear(4, 3)
    layer.note = "mine"
    seen = []
    layer.register_forward_hook(lambda m, a, y: seen.append(y))
    identity, parameter = id(layer), layer.weight
    fastlora.inject(layer, fastlora.LoRA(rank=2))
    assert id(layer) == identity and layer.weight is parameter and isinstance(layer, nn.Linear)
    assert layer.in_features == 4 and layer.note == "mine"
    y = layer(torch.randn(2, 4))
    assert seen[0] is y
    assert "fastlora" in repr(layer) and "rank=2" in repr(layer)
    fastlora.remove(layer, "default")
    assert type(layer) is nn.Linear and layer.note == "mine"
    assert repr(layer) == repr(nn.Linear(4, 3))


def test_train_and_eval_reach_the_adapters() -> None:
    model = unet()
    fastlora.inject(model, fastlora.LoRA(rank=2))
    assert not any(m.training for m in model.modules())
    model.train()
    assert all(m.training for m in model.modules())
