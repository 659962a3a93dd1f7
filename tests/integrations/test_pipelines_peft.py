"""Calls of accelerated pipelines with PEFT's adapters against diffusers' own calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from tests.integrations.adapter_samples import changed, doubled, factors, linears, update
from tests.integrations.tiny_pipelines import CHANNEL, FRAGILE, MAKE, PROMPTS, run

peft = pytest.importorskip("peft")
pytestmark = FRAGILE


def layers(pipeline):
    """PEFT's LoRA layers of a pipeline by component and path."""
    return {
        (component, path): module
        for component, model in pipeline.components.items()
        if isinstance(model, nn.Module)
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def scalings(pipeline):
    return {place: dict(layer.scaling) for place, layer in layers(pipeline).items()}


def loaded(kind, accelerate):
    """A plain pipeline, one in float64 with PEFT's adapters "a" and "b", and their updates."""
    plain = MAKE[kind]()
    pipeline = doubled(plain)
    scheduler = pipeline.scheduler
    if accelerate:
        fastlora.accelerate(pipeline)
        pipeline.scheduler = scheduler  # diffusers' own, whose coefficients are float32's
    component = "unet" if hasattr(plain, "unet") else "transformer"
    places = linears(plain, component, "to_q", "to_out.0")
    places += linears(plain, "text_encoder", "q_proj", "v_proj")
    updates = {}
    for seed, name in enumerate("ab"):
        tensors, updates[name] = peft_style(plain, places, seed)
        pipeline.load_lora_weights(tensors, adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.5, 0.25])  # exact in float32
    return plain, pipeline, updates


def peft_style(pipeline, places, seed):
    """A file with alpha = rank, which diffusers alone reads rightly too, and its updates."""
    generator = torch.Generator().manual_seed(seed)
    tensors, updates = {}, {}
    for component, path in places:
        weight = getattr(pipeline, component).get_submodule(path).weight
        down, up = factors(weight, 2, generator)
        tensors[f"{component}.{path}.lora_A.weight"] = down
        tensors[f"{component}.{path}.lora_B.weight"] = up
        updates[component, path] = update(down, up)
    return tensors, updates


def total(updates, **strengths):
    return {p: sum(s * updates[n][p] for n, s in strengths.items()) for p in updates["a"]}


@pytest.mark.parametrize("kind", list(CHANNEL))
def test_a_number_is_what_it_is_in_diffusers(kind):
    _, theirs, _ = loaded(kind, accelerate=False)
    _, ours, _ = loaded(kind, accelerate=True)
    before = scalings(ours)
    for scale in (0.75, 0.0, 1.0):
        given = {CHANNEL[kind]: {"scale": scale}}
        images, wanted = run(ours, kind, 2, **given), run(theirs, kind, 2, **given)
        torch.testing.assert_close(images, wanted, rtol=0, atol=1e-9)
        assert scalings(ours) == before  # trap d: to the bit
        theirs.set_adapters(["a", "b"], [0.5, 0.25])  # it has lost them
    assert ours.lora_scale == 1.0


def test_strengths_are_put_back_after_an_error():
    _, pipeline, _ = loaded("sd", accelerate=True)
    before = scalings(pipeline)

    def fail(*_):
        raise RuntimeError("stop")

    given = {"cross_attention_kwargs": {"scale": 0.0}, "callback_on_step_end": fail}
    with pytest.raises(RuntimeError, match="stop"):
        run(pipeline, "sd", **given)
    assert scalings(pipeline) == before


@pytest.mark.parametrize("kind", list(CHANNEL))
def test_numbers_by_name(kind):
    plain, pipeline, updates = loaded(kind, accelerate=True)
    images = run(pipeline, kind, 2, **{CHANNEL[kind]: {"scale": {"a": 3.0}}})
    wanted = run(changed(plain, total(updates, a=1.5, b=0.25)), kind, 2)
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-9)
    assert (wanted - run(doubled(plain), kind, 2)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", list(CHANNEL))
def test_strengths_per_image(kind):
    plain, pipeline, updates = loaded(kind, accelerate=True)
    scale = {"a": [1.0, 0.0], "b": [0.0, 2.0]}
    images = run(pipeline, kind, 2, **{CHANNEL[kind]: {"scale": scale}})
    for i, strengths in enumerate(({"a": 0.5, "b": 0.0}, {"a": 0.0, "b": 0.5})):
        reference = changed(plain, total(updates, **strengths))
        wanted = run(reference, kind, seeds=[i], prompt=[PROMPTS[i]])
        torch.testing.assert_close(images[i : i + 1], wanted, rtol=0, atol=1e-9)


def test_an_adapter_that_starts_at_a_timestep():
    """As if `set_adapters` had been called between two steps."""
    _, pipeline, _ = loaded("sd", accelerate=True)
    run(pipeline, "sd", steps=4)
    first = pipeline.scheduler.timesteps.tolist()[2]

    def switch(pipe, step, timestep, others):
        if step == 1:
            pipe.set_adapters(["a", "b"], [0.5, 0.25])
        return others

    given = {"cross_attention_kwargs": {"scale": {"start": {"a": first}}}}
    images = run(pipeline, "sd", steps=4, **given, callback_on_step_end=None)
    encoder = dict(scalings(pipeline))
    pipeline.unet.set_adapters(["a", "b"], [0.0, 0.25])  # the text encoder has both from the start
    wanted = run(pipeline, "sd", steps=4, callback_on_step_end=switch)
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-9)
    assert scalings(pipeline) == encoder
    assert (images - run(pipeline, "sd", steps=4)).abs().max() > 1e-3


def test_adapters_that_peft_computes_hear_of_a_call_too():
    """The scalings of an adapter that diffusers prepares for hot swaps are tensors, which a
    compiled model reads: PEFT computes with them, and they stay the same tensors."""
    plain = MAKE["sd"]()
    pipeline = doubled(plain)
    fastlora.accelerate(pipeline)
    pipeline.scheduler = plain.scheduler
    tensors, updates = peft_style(plain, linears(plain, "unet", "to_q", "conv1"), 0)
    pipeline.enable_lora_hotswap(target_rank=4)
    pipeline.load_lora_weights(tensors, adapter_name="a")
    before = scalings(pipeline)
    for scale, factor in ((0.5, 0.5), ({"a": 2.0}, 2.0), (0.0, 0.0), (1.0, 1.0)):
        images = run(pipeline, "sd", cross_attention_kwargs={"scale": scale})
        wanted = run(changed(plain, updates, factor), "sd")
        torch.testing.assert_close(images, wanted, rtol=0, atol=1e-9)
        for place, scaling in scalings(pipeline).items():
            assert scaling["a"] is before[place]["a"] and scaling["a"] == 1.0
    with pytest.raises(fastlora.AdapterError, match="PEFT computes its layers, with one strength"):
        run(pipeline, "sd", 2, cross_attention_kwargs={"scale": {"a": [0.0, 1.0]}})
