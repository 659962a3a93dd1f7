"""Calls of accelerated pipelines: strengths by adapter, per image, from a timestep on."""

from __future__ import annotations

import inspect

import pytest
import torch

import fastlora
from tests.integrations.adapter_samples import changed, doubled, factors, linears, update
from tests.integrations.tiny_pipelines import (
    CHANNEL,
    FRAGILE,
    MAKE,
    PROMPTS,
    arguments,
    run,
    stable_diffusion,
)

pytestmark = FRAGILE
TARGETS = "to_q", "to_v", "to_out.0", "conv1"


def denoiser(pipeline):
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def accelerated(pipeline):
    """A copy in float64; with diffusers' scheduler, whose coefficients are float32's."""
    pipeline = doubled(pipeline)
    scheduler = pipeline.scheduler
    fastlora.accelerate(pipeline)
    pipeline.scheduler = scheduler
    return pipeline


def with_adapters(kind, names=("a", "b")):
    """The plain pipeline, an accelerated one with native adapters, and their updates by name."""
    plain = MAKE[kind]()
    pipeline, component = accelerated(plain), denoiser(plain)
    updates = {}
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        model, layers = getattr(pipeline, component), {}
        for _, path in linears(plain, component, *TARGETS):
            layers[path] = factors(model.get_submodule(path).weight, 2, generator)
        where = lambda path, module, layers=layers: path in layers  # noqa: E731
        fastlora.inject(model, fastlora.LoRA(rank=2), where=where, name=name)
        with torch.no_grad():
            for path, (down, up) in layers.items():
                slot = model.get_submodule(path).fastlora[name]
                slot.down.copy_(down)
                slot.up.copy_(up)
        updates[name] = {(component, p): update(down, up) for p, (down, up) in layers.items()}
    return plain, pipeline, updates


def expected(plain, updates, strengths, kind, image, images, **others):
    """Image number `image`, made alone by the plain pipeline with updated weights."""
    total = {}
    for name, strength in strengths.items():
        for place, delta in updates[name].items():
            total[place] = total.get(place, 0) + strength * delta
    given = arguments(kind, images)
    if kind == "dit":
        given = {"class_labels": [given["class_labels"][image]]}
    else:
        given = {"prompt": [given["prompt"][image]]}
    return torch.as_tensor(run(changed(plain, total), kind, seeds=[image], **given | others))


STRENGTHS = {"a": [1.0, 0.0, -0.5], "b": [0.0, 1.0, 2.0]}


@pytest.mark.parametrize("kind", list(MAKE))
def test_strengths_per_image(kind):
    """Every image is what it would be alone; a different adapter in each is zeros and ones."""
    plain, pipeline, updates = with_adapters(kind)
    if kind in CHANNEL:
        given = {CHANNEL[kind]: {"scale": STRENGTHS}}
    else:  # has no such argument
        given = {}
        tensors = {name: torch.tensor(value) for name, value in STRENGTHS.items()}
        fastlora.set_scale(pipeline.transformer, tensors)
    images = torch.as_tensor(run(pipeline, kind, 3, **given))
    for i in range(3):
        strengths = {name: value[i] for name, value in STRENGTHS.items()}
        wanted = expected(plain, updates, strengths, kind, i, 3)
        torch.testing.assert_close(images[i : i + 1], wanted, rtol=0, atol=1e-9)
        assert (images[i] - images[i - 1]).abs().max() > 1e-2
    infos = fastlora.adapters(getattr(pipeline, denoiser(pipeline)))
    if kind in CHANNEL:
        assert {name: info.scale for name, info in infos.items()} == {"a": 1.0, "b": 1.0}
    model = getattr(pipeline, denoiser(pipeline))
    assert not model._forward_pre_hooks


def test_several_images_of_a_prompt():
    plain, pipeline, updates = with_adapters("sd", ("a",))
    scale = {"a": [0.0, 0.5, 1.0, 2.0]}
    images = run(
        pipeline,
        "sd",
        2,
        seeds=range(4),
        num_images_per_prompt=2,
        cross_attention_kwargs={"scale": scale},
    )
    for i, strength in enumerate(scale["a"]):
        given = {"prompt": [PROMPTS[i // 2]]}
        total = {place: strength * delta for place, delta in updates["a"].items()}
        wanted = run(changed(plain, total), "sd", seeds=[i], **given)
        torch.testing.assert_close(images[i : i + 1], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("scale", "error"),
    [
        ({"a": [1.0, 2.0, 3.0]}, "expected one strength for each of 2 images, got 3"),
        ({"nobody": 1.0}, r"no adapter named 'nobody'; this pipeline has \['a', 'b'\]"),
        ({"a": float("nan")}, "scale of 'a': expected a finite number"),
        ({"a": "much"}, "scale of 'a': expected a finite number"),
        ({"a": ["much"]}, "scale of 'a': expected numbers"),
        ({"start": {"a": "soon"}}, "start of 'a': expected a timestep"),
        ({"start": {"nobody": 5}}, "no adapter named 'nobody'"),
        (torch.ones(2), "expected a number, or strengths by adapter name"),
    ],
)
def test_what_is_no_strength(scale, error):
    _, pipeline, _ = with_adapters("sd")
    with pytest.raises(fastlora.AdapterError, match=error):
        run(pipeline, "sd", 2, cross_attention_kwargs={"scale": scale})
    assert {i.scale for i in fastlora.adapters(pipeline.unet).values()} == {1.0}


def test_a_number_is_for_all_adapters():
    plain, pipeline, updates = with_adapters("sd")
    fastlora.set_scale(pipeline.unet, {"a": 0.5, "b": 0.3})
    images = run(pipeline, "sd", cross_attention_kwargs={"scale": 0.7})
    wanted = expected(plain, updates, {"a": 0.35, "b": 0.21}, "sd", 0, 1)
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-5)
    scales = {n: i.scale for n, i in fastlora.adapters(pipeline.unet).items()}
    assert scales == {"a": 0.5, "b": 0.3}


def test_everything_is_put_back_after_an_error():
    _, pipeline, _ = with_adapters("sd")
    before = {name: info.scale for name, info in fastlora.adapters(pipeline.unet).items()}

    def fail(*_):
        raise RuntimeError("stop")

    scale = {"a": [1.0, 2.0], "start": {"b": 500}}
    with pytest.raises(RuntimeError, match="stop"):
        run(
            pipeline,
            "sd",
            2,
            cross_attention_kwargs={"scale": scale},
            callback_on_step_end=fail,
        )
    infos = fastlora.adapters(pipeline.unet)
    assert {name: info.scale for name, info in infos.items()} == before
    assert all(info.enabled for info in infos.values())
    assert not pipeline.unet._forward_pre_hooks


@pytest.mark.parametrize("kind", list(CHANNEL))
def test_adapters_that_start_at_a_timestep(kind):
    """As if somebody had switched them on between two steps."""
    _, pipeline, _ = with_adapters(kind)
    model = getattr(pipeline, denoiser(pipeline))
    steps = 4
    run(pipeline, kind, steps=steps)
    timesteps = pipeline.scheduler.timesteps.tolist()
    assert len(timesteps) == steps

    def switch(_, step, timestep, others):
        if step == 1:
            fastlora.enable(model, "a")
        return others

    fastlora.disable(model, "a")
    given = {"steps": steps, CHANNEL[kind]: {"scale": {"b": [1.0, 0.5]}}}
    never = run(pipeline, kind, 2, **given)
    wanted = run(pipeline, kind, 2, callback_on_step_end=switch, **given)
    fastlora.enable(model, "a")
    given[CHANNEL[kind]]["scale"]["start"] = {"a": timesteps[2]}
    images = run(pipeline, kind, 2, **given)
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-9)
    assert (wanted - never).abs().max() > 1e-3


def test_text_encoders_have_a_strength_for_every_prompt():
    plain = stable_diffusion()
    pipeline = accelerated(plain)
    component = "text_encoder"
    model = pipeline.text_encoder
    fastlora.inject(model, fastlora.LoRA(rank=2), where=r".*(q_proj|fc1)", name="t")
    generator = torch.Generator().manual_seed(0)
    updates = {}
    with torch.no_grad():
        for _, path in linears(plain, component, "q_proj", "fc1"):
            slot = model.get_submodule(path).fastlora["t"]
            down, up = factors(model.get_submodule(path).weight, 2, generator)
            slot.down.copy_(down)
            slot.up.copy_(up)
            updates[component, path] = update(down, up)
    scale = {"scale": {"t": [2.0, 2.0, -1.0, -1.0]}}
    given = {"num_images_per_prompt": 2, "cross_attention_kwargs": scale}
    images = run(pipeline, "sd", 2, seeds=range(4), **given)
    for i in range(4):
        prompt = {"prompt": [PROMPTS[i // 2]]}
        strength = scale["scale"]["t"][i]
        wanted = run(changed(plain, updates, strength), "sd", seeds=[i], **prompt)
        torch.testing.assert_close(images[i : i + 1], wanted, rtol=0, atol=1e-9)
    scale["scale"]["t"] = [2.0, 1.0, 0.0, 0.0]
    with pytest.raises(
        fastlora.AdapterError, match="text_encoder runs once a prompt, for 2 images"
    ):
        run(pipeline, "sd", 2, seeds=range(4), **given)
    assert fastlora.adapters(model)["t"].scale == 1.0


def test_signatures_are_the_pipelines_own():
    for make in MAKE.values():
        pipeline = make()
        before = inspect.signature(pipeline.__call__)
        fastlora.accelerate(pipeline)
        assert inspect.signature(pipeline.__call__) == before
    with pytest.raises(TypeError, match="class_labels"):  # diffusers' own error
        pipeline()


def test_nothing_happens_without_adapters():
    pipeline = doubled(stable_diffusion())
    wanted = run(pipeline, "sd")
    fast = accelerated(pipeline)
    assert torch.equal(run(fast, "sd"), wanted)
    assert torch.equal(run(fast, "sd", cross_attention_kwargs={"scale": 0.5}), wanted)
