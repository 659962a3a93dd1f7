"""Strengths per image beside what else a pipeline may have: ControlNet, IP-Adapter, offloading,
tiling, other schedulers, compiled models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from fastlora.integrations.pipelines.timesteps import Clock
from fastlora.integrations.pipelines.watching import before_calls
from tests.integrations.adapter_samples import doubled
from tests.integrations.tiny_pipelines import (
    FRAGILE,
    PROMPTS,
    SCALED_LINEAR,
    SIZE,
    controlnet_pipeline,
    diffusers,
    run,
    stable_diffusion,
)

pytestmark = FRAGILE


def adapt(model, name="a"):
    """A native adapter in the attentions of a model."""
    generator = torch.Generator().manual_seed(0)
    fastlora.inject(model, fastlora.LoRA(rank=2), where=r".*attn\d\.to_[qv]", name=name)
    with torch.no_grad():
        for parameter in fastlora.parameters(model, name):
            drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(0.5 * drawn)


def check_each(pipeline, models, scale=(1.0, -2.0), **given):
    """A batch whose images have these strengths is what its images are alone, with a number."""
    fastlora.accelerate(pipeline)
    channel = {"cross_attention_kwargs": {"scale": {"a": list(scale)}}}
    images = run(pipeline, "sd", len(scale), **given, **channel)
    for i, strength in enumerate(scale):
        for model in models:
            fastlora.set_scale(model, strength)
        alone = run(pipeline, "sd", seeds=[i], **given | {"prompt": [PROMPTS[i]]})
        torch.testing.assert_close(images[i : i + 1], alone, rtol=0, atol=1e-9)
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize("guess", [False, True])
def test_controlnet(guess):
    """It has the batch of guidance, or in guess mode the images alone."""
    pipeline = doubled(controlnet_pipeline())
    for model in (pipeline.unet, pipeline.controlnet):
        adapt(model)
    hint = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).double()
    models = pipeline.unet, pipeline.controlnet
    check_each(pipeline, models, image=hint, guess_mode=guess)


def test_ip_adapter():
    pipeline = doubled(stable_diffusion())
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    layers = {}
    for i, name in enumerate(pipeline.unet.attn_processors):
        if name.endswith("attn2.processor"):
            width = pipeline.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for kind in "kv":
                layers[f"{i}.to_{kind}_ip.weight"] = draw(width, 12)
    image = {"proj.weight": draw(4 * 12, 6), "proj.bias": draw(48)}
    image |= {"norm.weight": draw(12), "norm.bias": draw(12)}
    pipeline.unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": layers}])
    pipeline.unet.double()
    adapt(pipeline.unet)
    embeddings = draw(2, 1, 6).double()  # unconditional, conditional
    check_each(pipeline, [pipeline.unet], ip_adapter_image_embeds=[embeddings])


def test_offloading_of_models():
    accelerate = pytest.importorskip("accelerate")
    pipeline = doubled(stable_diffusion())
    adapt(pipeline.unet)
    accelerate.cpu_offload_with_hook(pipeline.unet, execution_device="cpu")
    check_each(pipeline, [pipeline.unet])


def test_offloading_of_layers():
    """The parameters of layers are elsewhere between their calls. Native adapters say what they
    need; PEFT's come and go with their layers."""
    accelerate = pytest.importorskip("accelerate")
    pipeline = doubled(stable_diffusion())
    adapt(pipeline.unet)
    whole = {"preload_module_classes": ["AdaptedLinear"]}
    accelerate.cpu_offload(pipeline.unet, execution_device="cpu", **whole)
    check_each(pipeline, [pipeline.unet])
    pipeline = doubled(stable_diffusion())
    adapt(pipeline.unet)
    accelerate.cpu_offload(pipeline.unet, execution_device="cpu")
    fastlora.accelerate(pipeline)
    with pytest.raises(fastlora.AdapterError, match="needs preload_module_classes"):
        run(pipeline, "sd")
    peft = pytest.importorskip("peft")
    pipeline = doubled(stable_diffusion())
    config = peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False)
    pipeline.unet.add_adapter(config, "a")
    accelerate.cpu_offload(pipeline.unet, execution_device="cpu")
    before = run(pipeline, "sd")
    fastlora.accelerate(pipeline)
    torch.testing.assert_close(run(pipeline, "sd"), before, rtol=0, atol=1e-5)


def test_vae_tiling():
    pipeline = doubled(stable_diffusion())
    adapt(pipeline.unet)
    pipeline.vae.enable_tiling()
    pipeline.vae.tile_sample_min_size, pipeline.vae.tile_latent_min_size = 8, 4
    check_each(pipeline, [pipeline.unet], output_type="pt")


@pytest.mark.filterwarnings("ignore:accelerate. no scheduler was replaced:UserWarning")
@pytest.mark.parametrize("name", ["PNDM", "HeunDiscrete", "UniPCMultistep", "DDPM", "LCM"])
def test_start_steps_of_other_schedulers(name):
    """Those that count their steps, those that do not, and those that call twice a step."""
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(dict(SCALED_LINEAR))
    pipeline = doubled(stable_diffusion(scheduler=scheduler))
    adapt(pipeline.unet)
    fastlora.accelerate(pipeline)
    seen = []
    pipeline.unet.register_forward_pre_hook(
        lambda unet, args: seen.append((float(args[1]), fastlora.adapters(unet)["a"].enabled))
    )
    # hooks of the call come after this one: look at what the step before has left
    run(pipeline, "sd", steps=4, cross_attention_kwargs={"scale": {"start": {"a": 500}}})
    timesteps = [t for t, _ in seen]
    assert [on for _, on in seen[1:]] == [t <= 500 for t in timesteps[:-1]]
    assert len({on for _, on in seen[1:]}) == 2
    assert fastlora.adapters(pipeline.unet)["a"].enabled


def test_the_clock_reads_no_values():
    """It is the scheduler's count or an address; a timestep on a device would have to be waited
    for, as a meta tensor cannot be read."""
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(4)
    clock = Clock(scheduler)
    assert [clock.step(t) for t in scheduler.timesteps] == [0, 1, 2, 3]
    assert clock.step(scheduler.timesteps[2].expand(6)) == 2
    assert clock.step(scheduler.timesteps[1:][1]) == 2
    assert clock.timesteps == [float(t) for t in scheduler.timesteps]
    assert clock.step(scheduler.timesteps[3].clone()) == 3  # by value, where nothing else tells
    euler = diffusers.FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(4)
    euler.set_begin_index(1)
    clock = Clock(euler)
    meta = torch.empty(2, device="meta")
    assert clock.step(meta) == 1
    euler.step(torch.zeros(1), euler.timesteps[1], torch.zeros(1))
    assert clock.step(meta) == 2


class Plus(nn.Module):
    def forward(self, x):
        return x + 1


def test_compiled_models_do_not_trace_what_stands_before_them():
    model = Plus()
    model.compile(backend="eager", fullgraph=True)
    compiled, seen = model._compiled_call_impl, []

    def note(args, kwargs):
        torch._dynamo.graph_break()  # which a full graph cannot have
        seen.append(len(args[0]))

    with before_calls(model, [note]):
        assert torch.equal(model(torch.ones(3, 2)), torch.full((3, 2), 2.0))
        model(torch.ones(3, 2))
    assert seen == [3, 3] and model._compiled_call_impl is compiled
    assert not model._forward_pre_hooks
