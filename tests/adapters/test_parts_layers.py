"""Folding, adapters that come and go, and reserves in the components of a pipeline or a dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.adapters import adapted_layers, combine, inject
from fastlora.adapters.folding import is_folded
from fastlora.adapters.lookup import arenas
from tests.adapters.oracles import adapted_weight, assert_unchanged, same_bits, snapshot
from tests.adapters.pipelines import (
    FORMS,
    Pipeline,
    UNet,
    adapted,
    assert_equal,
    outputs,
    strengths,
)

AdapterError = fastlora.AdapterError


@pytest.fixture(params=FORMS, ids=str)
def form(request: pytest.FixtureRequest) -> Callable[[Pipeline], Any]:
    return FORMS[request.param]


# --- folding ----------------------------------------------------------------------------------


def test_folding_follows_strengths_of_every_component(form: Any) -> None:
    pipe, each = adapted(), adapted()
    before = outputs(pipe)
    fastlora.fold(form(pipe))
    fastlora.set_scale(form(pipe), {"style": 0.5})
    for part in (each.unet, each.text_encoder):
        fastlora.set_scale(part, {"style": 0.5})
        fastlora.fold(part)
    assert is_folded(pipe.unet) and is_folded(pipe.text_encoder)
    assert_equal(outputs(pipe), outputs(each))
    fastlora.set_scale(form(pipe), {"style": 1.0})
    fastlora.unfold(form(pipe))
    assert not is_folded(pipe.unet) and not is_folded(pipe.text_encoder)
    assert_equal(outputs(pipe), before)


def test_folding_for_good(form: Any) -> None:
    pipe, plain = adapted(), Pipeline()
    layer: Any = adapted_layers(pipe.unet)["attn.to_q"]
    slots = [(layer.fastlora["style"], 0.5), (layer.fastlora["extra"], 1.0)]  # α/r
    exact = adapted_weight(plain.unet.attn["to_q"], slots)
    fastlora.fold(form(pipe), permanent=True)
    assert fastlora.adapters(pipe) == {}
    assert type(pipe.text_encoder.self_attn["q_proj"]) is nn.Linear
    assert all(
        p.requires_grad for part in (pipe.unet, pipe.text_encoder) for p in part.parameters()
    )
    torch.testing.assert_close(pipe.unet.attn["to_q"].weight.double(), exact, atol=1e-6, rtol=0)


def test_what_cannot_be_folded_in_one_component_keeps_the_others_from_it(form: Any) -> None:
    pipe = adapted()
    pipe.text_encoder.self_attn["q_proj"].register_parameter("weight", None)
    with pytest.raises(AdapterError, match=r"fold: text_encoder.self_attn.q_proj: a Linear"):
        fastlora.fold(form(pipe))
    assert not is_folded(pipe.unet)


def test_a_weight_that_two_components_share_is_not_changed_for_both() -> None:
    pipe = adapted()
    pipe.vae = UNet()
    pipe.vae.attn["to_q"].weight = pipe.unet.attn["to_q"].weight
    with pytest.raises(AdapterError, match=r"unet.attn.to_q.weight and vae.attn.to_q.weight are"):
        fastlora.fold(pipe, permanent=True)


# --- adapters that come and go ----------------------------------------------------------------


def test_remove_gives_back_the_plain_components(form: Any) -> None:
    before = [snapshot(part) for part in FORMS["dict"](Pipeline()).values()]
    pipe = adapted()
    fastlora.remove(form(pipe), "style")
    assert list(fastlora.adapters(pipe)) == ["extra"]
    assert all(p.requires_grad for p in pipe.text_encoder.parameters())
    fastlora.remove(form(pipe), "extra")
    for part, was in zip(FORMS["dict"](pipe).values(), before, strict=True):
        assert_unchanged(part, {**was, "ids": snapshot(part)["ids"]})


def test_a_layer_that_cannot_go_back_keeps_all_components(form: Any) -> None:
    pipe = adapted()
    layer: Any = pipe.text_encoder.self_attn["q_proj"]
    layer.__class__ = type("Other", (type(layer),), {})
    with pytest.raises(AdapterError, match="class was changed"):
        fastlora.remove(form(pipe), "style")
    assert "style" in fastlora.adapters(pipe.unet)


def test_inject_into_a_dict_is_inject_into_each() -> None:
    pipe, each = Pipeline(), Pipeline()
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "vae": pipe.vae}
    spec = fastlora.LoRA(rank=2, ranks={"attn.to_q": 3})
    info = inject(parts, spec, where=["to_q", "q_proj"], name="a", seed=7)
    assert info == fastlora.adapters(pipe)["a"]
    assert info.modules == ("unet.attn.to_q", "text_encoder.self_attn.q_proj") and info.rank == 3
    inject(each.unet, spec, where=["to_q"], name="a", seed=7)
    inject(each.text_encoder, fastlora.LoRA(rank=2), where=["q_proj"], name="a", seed=7)
    for ours, theirs in ((pipe.unet, each.unet), (pipe.text_encoder, each.text_encoder)):
        values = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
        assert all(k == j and same_bits(a, b) for (k, a), (j, b) in values)
    assert type(pipe.vae) is nn.Linear and pipe.vae.weight.requires_grad
    for bad, said in (
        ({"where": "nothing"}, "inject: unet: where: 'nothing' matches no layer"),
        ({"where": ["conv", "self_attn.q_proj"], "name": "a"}, "'a' exists already"),
    ):
        with pytest.raises(AdapterError, match=said):
            inject(parts, **{"spec": fastlora.LoRA(rank=2), "name": "b", **bad})
    with pytest.raises(AdapterError, match=r"paths of adapted layers, got \['nowhere'\]"):
        inject(parts, fastlora.LoRA(rank=2, ranks={"nowhere": 3}), name="b")


def test_inject_asks_which_components_of_a_pipeline_are_meant() -> None:
    said = r"'unet': pipe.unet, 'text_encoder': pipe.text_encoder\}$"
    with pytest.raises(AdapterError, match=said):
        inject(Pipeline(), fastlora.LoRA(rank=2))


MAKING: dict[str, Callable[[Any], Any]] = {
    "inject": lambda m: inject(FORMS["dict"](m), fastlora.LoRA(rank=2), name="new"),
    "combine": lambda m: combine(m, {"style": 1.0}, name="new"),
}


@pytest.mark.parametrize("call", MAKING.values(), ids=MAKING)
def test_a_failure_in_the_second_component_undoes_the_first(call: Any) -> None:
    pipe = adapted()
    fastlora.reserve(pipe.text_encoder, 3)  # has room for one more rank
    parts = FORMS["dict"](pipe)
    before = {component: snapshot(part) for component, part in parts.items()}
    with pytest.raises(AdapterError, match="its reserve of rank 3 has room for 1 more"):
        call(pipe)
    for component, part in parts.items():
        assert_unchanged(part, before[component])


def test_combine_in_each_component(form: Any) -> None:
    """interpolate, and "extra" is in one component alone: `Σ w_i Δ_i / Σ w_i`."""
    pipe, plain = adapted(), Pipeline()
    info = combine(form(pipe), {"style": 3.0, "extra": 1.0}, "interpolate", name="both")
    assert info == fastlora.adapters(pipe)["both"] and info.rank == 4 + 3
    assert [enabled for *_, enabled in strengths(pipe)] == [False, False, True, False, True]
    for component, path, weights in (
        ("unet", "attn.to_q", {"style": 3 / 4 * 2 / 4, "extra": 1 / 4}),
        ("unet", "attn.to_k", {"style": 3 / 4 * 2 / 4}),
        ("text_encoder", "self_attn.to_k", {"style": 3 / 4}),
    ):
        layer: Any = getattr(pipe, component).get_submodule(path)
        base = getattr(plain, component).get_submodule(path)
        exact = adapted_weight(base, [(layer.fastlora[n], w) for n, w in weights.items()])
        made = adapted_weight(base, [(layer.fastlora["both"], 1.0)])
        torch.testing.assert_close(made, exact, atol=1e-6, rtol=0)
    assert not {a for p in (pipe.unet,) for a in arenas(p)} & set(arenas(pipe.text_encoder))


def test_combine_selects_by_paths_within_components(form: Any) -> None:
    pipe = adapted()
    inject(pipe.text_encoder, fastlora.LoRA(rank=1), where=["q_proj"], name="extra")
    weights = {"style": 1.0, "extra": 1.0}
    combine(form(pipe), weights, where={"extra": r"self_attn\.q_proj"}, name="mixed")
    ranks = {
        path: layer.fastlora["mixed"].rank for path, layer in adapted_layers(pipe.unet).items()
    }
    assert ranks == {"conv": 4, "attn.to_q": 4, "attn.to_k": 4}
    text = adapted_layers(pipe.text_encoder)
    assert {p: m.fastlora["mixed"].rank for p, m in text.items()} == {
        "self_attn.q_proj": 1,
        "self_attn.to_k": 2,
    }
    with pytest.raises(AdapterError, match="selects no layer that 'extra' adapts"):
        combine(form(pipe), weights, where={"extra": ["to_v"]}, name="none")


def test_combine_freezes_where_its_adapters_did(form: Any) -> None:
    pipe = adapted()
    inject(pipe.vae, fastlora.LoRA(rank=1), name="new")
    inject(pipe.vae, fastlora.LoRA(rank=1), name="free", freeze=False)
    with pytest.raises(AdapterError, match="'new' exists already"):
        combine(form(pipe), {"style": 1.0}, name="new")
    fastlora.remove(pipe, "new")
    combine(form(pipe), {"style": 1.0, "free": 1.0}, name="new")
    for name in ("style", "extra", "free"):
        fastlora.remove(form(pipe), name)
    assert not pipe.unet.conv.weight.requires_grad and pipe.vae.weight.requires_grad


# --- reserves ---------------------------------------------------------------------------------


def test_reserve_of_a_pipeline_is_for_what_adapter_files_are_for() -> None:
    pipe, before = adapted(), snapshot(Pipeline().vae)
    info = fastlora.reserve(pipe, 8)
    assert info.modules == (
        "unet.conv", "unet.attn.to_q", "unet.attn.to_k",
        "text_encoder.self_attn.q_proj", "text_encoder.self_attn.to_k",
    )  # fmt: skip
    sizes = (3 + 8, 8 + 8, 8 + 8, 6 + 8, 8 + 5)
    assert info.bytes == 4 * 8 * sum(sizes)
    assert_unchanged(pipe.vae, {**before, "ids": snapshot(pipe.vae)["ids"]})
    assert set(arenas(pipe.unet)).isdisjoint(arenas(pipe.text_encoder))
    y = outputs(adapted())
    for ours, theirs in zip(outputs(pipe), y, strict=True):
        torch.testing.assert_close(ours, theirs)
    fastlora.reserve(pipe, 0)
    assert not any(m.fastlora.capacity for m in adapted_layers(pipe.unet).values())


def test_reserve_of_a_dict_is_for_all_in_it() -> None:
    pipe = Pipeline()
    info = fastlora.reserve(FORMS["dict"](pipe), 2)
    assert info.modules[-1] == "vae" and len(info.modules) == 6
    fastlora.reserve(FORMS["dict"](pipe), 0)
    assert type(pipe.vae) is nn.Linear and all(p.requires_grad for p in pipe.unet.parameters())


def test_reserve_selects_by_paths_within_components() -> None:
    pipe = Pipeline()
    assert fastlora.reserve(pipe, 2, where=r"self_attn\..*").modules == (
        "text_encoder.self_attn.q_proj",
        "text_encoder.self_attn.to_k",
    )
    assert adapted_layers(pipe.unet) == {} and pipe.unet.conv.weight.requires_grad
    assert fastlora.reserve(pipe, 2, where=["to_k"]).modules == (
        "unet.attn.to_k",
        "text_encoder.self_attn.to_k",
    )
    with pytest.raises(AdapterError, match="reserve: unet: where: 'unet.conv' matches no layer"):
        fastlora.reserve(pipe, 2, where="unet.conv")


def test_a_component_without_room_keeps_the_others_from_a_reserve() -> None:
    pipe = adapted()
    fastlora.remove(pipe, "extra")
    inject(pipe.text_encoder, fastlora.LoRA(rank=5), name="large")
    before = {component: snapshot(part) for component, part in FORMS["dict"](pipe).items()}
    said = r"text_encoder.self_attn.q_proj has adapters of rank 7 together, got 6"
    with pytest.raises(AdapterError, match=said):
        fastlora.reserve(pipe, 6)
    for component, part in FORMS["dict"](pipe).items():
        assert_unchanged(part, before[component])


def test_a_pipeline_without_such_components_is_told_to_give_a_dict() -> None:
    pipe: Any = type("Cascade", (), {"components": {"decoder": nn.Linear(2, 2)}})()
    with pytest.raises(AdapterError, match=r"got Cascade with decoder; give a dict"):
        fastlora.reserve(pipe, 2)
    with pytest.raises(AdapterError, match=r"got Cascade with decoder; give a dict"):
        inject(pipe, fastlora.LoRA(rank=2))
    fastlora.reserve({"decoder": pipe.components["decoder"]}, 2)
