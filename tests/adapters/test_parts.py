"""Strengths of the components of a pipeline, or of a dict, against the same in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastlora
from fastlora.adapters import adapted_layers, combine, inject, materialize, phases, steady, tiled
from fastlora.adapters.lookup import arenas
from tests.adapters.oracles import same_bits
from tests.adapters.pipelines import (
    FORMS,
    PROMPT,
    Pipeline,
    UNet,
    X,
    adapted,
    assert_equal,
    outputs,
    strengths,
)

AdapterError = fastlora.AdapterError


@pytest.fixture(params=FORMS, ids=str)
def form(request: pytest.FixtureRequest) -> Callable[[Pipeline], Any]:
    return FORMS[request.param]


# --- strengths --------------------------------------------------------------------------------


def test_strengths_reach_each_component_that_has_the_adapter(form: Any) -> None:
    pipe, each = adapted(), adapted()
    fastlora.set_scale(form(pipe), {"style": 0.25, "extra": -2.0})
    fastlora.set_scale(each.unet, {"style": 0.25, "extra": -2.0})
    fastlora.set_scale(each.text_encoder, {"style": 0.25})
    assert_equal(outputs(pipe), outputs(each))
    fastlora.set_scale(form(pipe), 0.75)
    assert [scale for _, scale, _ in strengths(pipe)] == [0.75] * 3


def test_switches(form: Any) -> None:
    pipe, plain = adapted(), Pipeline()
    for part in (plain.unet, plain.text_encoder):
        part.requires_grad_(False)  # torch itself takes other routes for weights that are trained
    on = outputs(pipe)
    fastlora.disable(form(pipe))
    assert_equal(outputs(pipe), outputs(plain))
    fastlora.enable(form(pipe), "style")
    assert [enabled for *_, enabled in strengths(pipe)] == [True, False, True]
    fastlora.enable(form(pipe))
    assert_equal(outputs(pipe), on)


def test_blocks_restore_every_component_nested_and_after_exceptions(form: Any) -> None:
    pipe = adapted()
    fastlora.set_scale(pipe.text_encoder, {"style": 0.5})
    before, given = strengths(pipe), form(pipe)
    with pytest.raises(KeyError), fastlora.scaled(given, {"style": 3.0}) as same:
        assert same is given
        with fastlora.disable(given, "style") as same:
            assert same is given
            assert strengths(pipe) == [
                ("style", 3.0, False), ("extra", 1.0, True), ("style", 3.0, False)
            ]  # fmt: skip
            with fastlora.enable(given) as same:
                assert same is given and all(enabled for *_, enabled in strengths(pipe))
        raise KeyError
    assert strengths(pipe) == before


def test_a_block_ends_in_the_components_that_it_began_in() -> None:
    pipe = adapted()
    before, unet = strengths(pipe), pipe.unet
    with fastlora.scaled(pipe, 3.0):
        pipe.unet = UNet()
    pipe.unet = unet
    assert strengths(pipe) == before


BAD: dict[str, Callable[[Any], Any]] = {
    "set_scale": lambda m: fastlora.set_scale(m, {"style": 0.5, "nobody": 1.0}),
    "scaled": lambda m: fastlora.scaled(m, {"style": 0.5, "nobody": 1.0}).__enter__(),
    "enable": lambda m: fastlora.enable(m, "style", "nobody"),
    "disable": lambda m: fastlora.disable(m, "style", "nobody"),
    "remove": lambda m: fastlora.remove(m, "nobody"),
    "parameters": lambda m: fastlora.parameters(m, "nobody"),
    "combine": lambda m: combine(m, {"style": 1.0, "nobody": 1.0}),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_a_name_that_no_component_has_changes_nothing(form: Any, call: Any) -> None:
    pipe = adapted()
    before = strengths(pipe)
    with pytest.raises(AdapterError, match=r"'nobody'; this model has \['extra', 'style'\]"):
        call(form(pipe))
    assert strengths(pipe) == before


def test_a_component_that_cannot_have_the_strength_keeps_the_others_from_it(form: Any) -> None:
    pipe = adapted()
    fastlora.fold(pipe.text_encoder)
    before = outputs(pipe)
    with pytest.raises(AdapterError, match="'style' differs per sample"):
        fastlora.set_scale(form(pipe), {"style": torch.ones(5)})
    fastlora.unfold(pipe.text_encoder)
    inject(pipe.text_encoder, fastlora.LoRA(rank=2, dora=True), name="dora")
    inject(pipe.unet, fastlora.LoRA(rank=2), name="dora")
    with pytest.raises(AdapterError, match=r"q_proj: 'dora' \(dora\) has DoRA's norm"):
        fastlora.set_scale(form(pipe), {"dora": torch.zeros(5), "style": 0.0})
    fastlora.remove(pipe, "dora")
    torch.testing.assert_close(outputs(pipe), before)
    assert all(scale == 1.0 for _, scale, _ in strengths(pipe))


def test_rows_of_strengths_serve_as_many_images_and_prompts() -> None:
    pipe, rows = adapted(), torch.linspace(-1, 1, 5)
    fastlora.set_scale(pipe, {"style": rows})
    y, hidden = outputs(pipe)
    for i, row in enumerate(rows.tolist()):
        alone = adapted()
        fastlora.set_scale(alone, {"style": row})
        with torch.no_grad():
            torch.testing.assert_close(y[i : i + 1], alone.unet(X[i : i + 1]))
            torch.testing.assert_close(hidden[i : i + 1], alone.text_encoder(PROMPT[i : i + 1]))
    with pytest.raises(fastlora.ContractError, match=r"self_attn.q_proj: .*leading size 5"):
        pipe.text_encoder(PROMPT[:1])  # one prompt for five images
    fastlora.set_scale(pipe.text_encoder, {"style": 1.0})
    pipe.text_encoder(PROMPT[:1])
    assert torch.equal(fastlora.adapters(pipe)["style"].scale["unet"], rows)  # type: ignore[index]


def test_guidance_tiles_what_computes_images() -> None:
    pipe, twice = adapted(), torch.cat([X, X])
    fastlora.set_scale(pipe, {"style": torch.linspace(-1, 1, 5)})
    y, hidden = outputs(pipe)
    with torch.no_grad(), tiled(pipe, 2) as same:
        assert same is pipe
        torch.testing.assert_close(pipe.unet(twice), torch.cat([y, y]))
        assert same_bits(pipe.text_encoder(PROMPT), hidden)
    with torch.no_grad(), tiled(FORMS["dict"](pipe), 2):
        assert len(pipe.unet(twice)) == len(pipe.text_encoder(torch.cat([PROMPT, PROMPT]))) == 10
    assert_equal(outputs(pipe), [y, hidden])


def test_blocks_that_keep_weights_cover_every_component(form: Any) -> None:
    pipe = adapted()
    found = [arena for part in (pipe.unet, pipe.text_encoder) for arena in arenas(part)]
    with steady(form(pipe)), materialize(form(pipe), "step"):
        assert [(a.steady, a.materialize) for a in found] == [([1, 0], "step")] * 2
    assert [(a.steady, a.materialize) for a in found] == [([0, 0], "forward")] * 2


# --- what is reported -------------------------------------------------------------------------


def test_adapters_has_the_components_in_front_of_paths(form: Any) -> None:
    pipe = adapted()
    own = {c: fastlora.adapters(p) for c, p in FORMS["dict"](pipe).items()}
    style, extra = fastlora.adapters(form(pipe)).values()
    assert style.modules == (
        "unet.conv", "unet.attn.to_q", "unet.attn.to_k",
        "text_encoder.self_attn.q_proj", "text_encoder.self_attn.to_k",
    )  # fmt: skip
    assert (style.kind, style.rank, style.scale, style.enabled) == ("lora", 4, 1.0, True)
    assert style.parameters == sum(own[c]["style"].parameters for c in ("unet", "text_encoder"))
    assert extra.modules == ("unet.attn.to_q",) and extra.rank == 3
    assert fastlora.parameters(form(pipe)) == [
        *fastlora.parameters(pipe.unet), *fastlora.parameters(pipe.text_encoder)
    ]  # fmt: skip
    assert fastlora.parameters(form(pipe), "extra") == fastlora.parameters(pipe.unet, "extra")


def test_strengths_that_differ_are_told_by_component(form: Any) -> None:
    pipe, rows = adapted(), torch.ones(3)
    fastlora.set_scale(pipe.unet, {"style": 0.5})
    fastlora.disable(pipe.text_encoder)
    style = fastlora.adapters(form(pipe))["style"]
    assert style.scale == {"unet": 0.5, "text_encoder": 1.0}
    assert style.enabled == {"unet": True, "text_encoder": False}
    fastlora.set_scale(pipe, {"style": rows})
    assert torch.equal(fastlora.adapters(form(pipe))["style"].scale, rows)  # type: ignore[arg-type]
    fastlora.set_scale(pipe.unet, {"style": torch.ones(4)})
    scale: Any = fastlora.adapters(form(pipe))["style"].scale
    assert [len(scale[c]) for c in ("unet", "text_encoder")] == [4, 3]


def test_kinds_of_all_components_are_named_once() -> None:
    pipe = Pipeline()
    inject(pipe.unet, fastlora.LoRA(rank=2))
    inject(pipe.text_encoder, fastlora.Spectral())
    inject(pipe.vae, fastlora.LoRA(rank=1))
    info = fastlora.adapters(pipe)["default"]
    assert (info.kind, info.rank, info.modules[-1]) == ("lora+spectral", 2, "vae")


def test_a_module_with_two_names_counts_once() -> None:
    pipe = adapted()
    both = {"unet": pipe.unet, "transformer": pipe.unet}
    assert (
        fastlora.adapters(both)["style"].parameters
        == fastlora.adapters(pipe.unet)["style"].parameters
    )
    fastlora.remove(both, "style")
    assert list(fastlora.adapters(pipe)) == ["extra", "style"]


# --- what is called ---------------------------------------------------------------------------


def test_tune_calls_the_pipeline_and_sees_every_component(monkeypatch: Any, tmp_path: Any) -> None:
    from fastlora import tuning
    from fastlora.ops import _tuned

    monkeypatch.setenv("FASTLORA_TUNE_FILE", str(tmp_path / "tune.json"))
    monkeypatch.setattr(tuning, "_measured", lambda plans, args: dict.fromkeys(plans, 1e-6))
    _tuned.forget()
    try:
        pipe = adapted()
        pipe.vae.train()
        pipe.text_encoder.eval()
        report = fastlora.tune(pipe, X, prompt=PROMPT)
    finally:
        monkeypatch.undo()
        _tuned.forget()
    calls = [row.call for row in report.rows]
    assert any("x8x8, rank 7" in call for call in calls) and any("x6x8, rank 2" in c for c in calls)
    assert pipe.vae.training and pipe.unet.training and not pipe.text_encoder.training
    with pytest.raises(AdapterError, match=r"got dict: call it for each of its parts, models\['un"):
        fastlora.tune(FORMS["dict"](pipe), X)


ALL: dict[str, Callable[[Any], Any]] = {
    "adapters": fastlora.adapters,
    "parameters": fastlora.parameters,
    "set_scale": lambda m: fastlora.set_scale(m, {"style": 0.5}),
    "set_scale of all": lambda m: fastlora.set_scale(m, 0.5),
    "scaled": lambda m: fastlora.scaled(m, {"style": 0.5}).__enter__(),
    "enable": fastlora.enable,
    "disable": fastlora.disable,
    "fold": fastlora.fold,
    "fold for good": lambda m: fastlora.fold(m, permanent=True),
    "unfold": fastlora.unfold,
    "remove": lambda m: fastlora.remove(m, "style"),
    "inject": lambda m: inject(m, fastlora.LoRA(rank=2)),
    "reserve": lambda m: fastlora.reserve(m, 4),
    "combine": lambda m: combine(m, {"style": 1.0}),
    "steady": lambda m: steady(m).__enter__(),
    "tiled": lambda m: tiled(m, 2).__enter__(),
    "materialize": lambda m: materialize(m).__enter__(),
}


@pytest.mark.parametrize("call", ALL.values(), ids=ALL)
def test_what_is_no_model_is_named(call: Any) -> None:
    for other in (3, None, "unet", {}, {"unet": 3}, object()):
        with pytest.raises(
            AdapterError, match=rf"model: expected a .*, got {type(other).__name__}$"
        ):
            call(other)


ONE: dict[str, Callable[[Any], Any]] = {
    "verify": lambda m: fastlora.verify(m, X),
    "phases": lambda m: phases(m, {"style": 500}, [900, 500]).__enter__(),
    "adapted_layers": adapted_layers,
    "decompose": lambda m: fastlora.decompose(m),
    "parameter_counts": lambda m: fastlora.parameter_counts(m, fastlora.LoRA()),
}


@pytest.mark.parametrize("call", ONE.values(), ids=ONE)
def test_calls_for_one_model_name_the_parts_of_a_pipeline(call: Any) -> None:
    pipe = adapted()
    for whole, parts in (
        (pipe, "Pipeline: call it for each of its parts, pipe.unet, pipe.text_encoder, pipe.vae"),
        (pipe.components, r"dict: call it for each of its parts, models\['unet'\], models\['text_"),
        (3, "int$"),
        ({}, "dict$"),
    ):
        with pytest.raises(AdapterError, match=f"expected a module, got {parts}"):
            call(whole)
