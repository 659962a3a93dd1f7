"""`accelerate` and `restore` on pipelines of tiny random models, offline."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import fastlora
from tests.integrations.diffusers_cases import diffusers

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers' own
]

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD |= {"clip_sample": False, "steps_offset": 1}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    blocks = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=blocks[0],
        up_block_types=blocks[1],
    ).eval()


@pytest.fixture(scope="module")
def latent_models():
    """An autoencoder and a UNet that is conditioned on 12 numbers for every token."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=16
    ).eval()
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()
    return vae, unet


def stable_diffusion(latent_models, scheduler, cls="StableDiffusionPipeline"):
    vae, unet = latent_models
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = getattr(diffusers, cls)(
        vae=vae, unet=unet, scheduler=scheduler, **parts, requires_safety_checker=False
    )
    return quiet(pipeline)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline, **arguments):
    generator = torch.Generator().manual_seed(1)
    return pipeline(generator=generator, output_type="np", **arguments).images


def embeddings():
    generator = torch.Generator().manual_seed(2)
    names = "prompt_embeds", "negative_prompt_embeds"
    return {name: torch.randn(1, 5, 12, generator=generator) for name in names}


def compare(pipeline, tolerance=1e-4, **arguments):
    """The same image before, with the drop-in, and after; and the drop-in made the steps."""
    before = images(pipeline, **arguments)
    original = pipeline.scheduler
    report = fastlora.accelerate(pipeline)
    assert list(report.replaced) == ["scheduler"] and not report.left
    assert isinstance(pipeline.scheduler, type(original)) and pipeline.scheduler is not original
    with_ours = images(pipeline, **arguments)
    assert pipeline.scheduler._tables.placed  # tables were made where the samples are
    assert np.abs(with_ours - before).max() <= tolerance
    assert before.std() > 1e-3  # an image, not one colour
    report = fastlora.restore(pipeline)
    assert list(report.replaced) == ["scheduler"] and pipeline.scheduler is original
    assert np.array_equal(images(pipeline, **arguments), before)


def test_ddim_pipeline(unet):
    pipeline = quiet(diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()))
    compare(pipeline, batch_size=2, num_inference_steps=4, eta=0.5)


def test_ddpm_pipeline(unet):
    pipeline = quiet(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()))
    compare(pipeline, batch_size=2, num_inference_steps=6)


@pytest.mark.parametrize(
    "name", ["DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "LCM", "DDPM"]
)
def test_stable_diffusion(latent_models, name):
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(dict(SD))
    pipeline = stable_diffusion(latent_models, scheduler)
    compare(pipeline, num_inference_steps=4, guidance_scale=4.0, **embeddings())


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep"])
def test_image_to_image(latent_models, name):
    """Steps begin in the middle, at what add_noise made."""
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(dict(SD))
    cls = "StableDiffusionImg2ImgPipeline"
    pipeline = stable_diffusion(latent_models, scheduler, cls)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    arguments = {"image": image, "strength": 0.6, "num_inference_steps": 6}
    compare(pipeline, guidance_scale=4.0, **arguments, **embeddings())


def test_flow_matching(latent_models):
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        out_channels=4,
    ).eval()
    names = [f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict.fromkeys(names) | {"transformer": transformer, "scheduler": scheduler}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()
    pipeline = quiet(diffusers.StableDiffusion3Pipeline(vae=vae, **parts))
    generator = torch.Generator().manual_seed(2)
    given = {n: torch.randn(1, 5, 12, generator=generator) for n in embeddings()}
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        given[name] = torch.randn(1, 6, generator=generator)
    compare(pipeline, num_inference_steps=4, height=8, width=8, **given)


def test_state_comes_along(unet):
    """Also in the middle of a sampling, and with levels that somebody has set."""
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    scheduler.sigmas = scheduler.sigmas * 0.9
    scheduler.set_begin_index(2)
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipeline.scheduler = scheduler
    fastlora.accelerate(pipeline)
    x, t = torch.randn(1, 3, 4, 4), scheduler.timesteps[2]
    steps = [s.step(0.1 * x, t, x).prev_sample for s in (scheduler, pipeline.scheduler)]
    torch.testing.assert_close(steps[1], steps[0])


def test_saved_pipelines_need_no_fastlora(unet, tmp_path):
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(beta_end=0.015))
    fastlora.accelerate(pipeline)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    assert loaded.scheduler.config.beta_end == 0.015


def test_what_has_no_counterpart_is_left_and_named(unet):
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())

    class Mine(diffusers.DDIMScheduler):
        pass

    refused = diffusers.DDPMScheduler(variance_type="fixed_large_log")
    for scheduler, why in (
        (diffusers.PNDMScheduler(), "PNDMScheduler has no counterpart"),
        (Mine(), "Mine has no counterpart"),
        (refused, "variance_type: expected"),
    ):
        pipeline.scheduler = scheduler
        with pytest.warns(UserWarning, match=f"no scheduler was replaced\n(.*\n)*.*{why}"):
            report = fastlora.accelerate(pipeline)
        assert pipeline.scheduler is scheduler
        assert not report.replaced and why in report.left["scheduler"]
        assert why in str(report)


def test_twice_and_without(unet):
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    fastlora.accelerate(pipeline)
    ours = pipeline.scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fastlora.accelerate(pipeline)
    assert pipeline.scheduler is ours and "already" in report.left["scheduler"]
    fastlora.restore(pipeline)
    original = pipeline.scheduler
    assert "replaces nothing" in fastlora.restore(pipeline).left["scheduler"]
    assert pipeline.scheduler is original
    pipeline.scheduler = type(ours)()  # put there by hand
    assert "replaces nothing" in fastlora.restore(pipeline).left["scheduler"]


def test_pipelines_in_pipelines_share_schedulers(unet):
    outer = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    original = outer.scheduler
    outer.inner = diffusers.DDIMPipeline(unet, original)
    outer.inner.scheduler = original  # of which its constructor has made a copy
    report = fastlora.accelerate(outer)
    assert set(report.replaced) == {"scheduler", "inner.scheduler"}
    assert outer.inner.scheduler is outer.scheduler is not original
    fastlora.restore(outer)
    assert outer.inner.scheduler is outer.scheduler is original


@pytest.mark.parametrize("function", [fastlora.accelerate, fastlora.restore])
def test_what_is_no_pipeline(function):
    name = function.__name__
    for wrong, got in (
        (3, "a int"),
        (None, "None"),
        (diffusers.DDIMPipeline, "DDIMPipeline itself"),
        (diffusers.DDIMScheduler(), "a scheduler, DDIMScheduler"),
    ):
        with pytest.raises(TypeError, match=rf"^{name}: target: expected .*, got {got}"):
            function(wrong)


def test_without_diffusers():
    """Both functions are there, and say what is missing."""
    code = """
import sys
import fastlora
assert not any(m.partition(".")[0] == "diffusers" for m in sys.modules)
sys.modules["diffusers"] = None
for function in fastlora.accelerate, fastlora.restore:
    try:
        function(object())
    except ImportError as error:
        assert "pip install" in str(error), error
    else:
        raise AssertionError(function)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
