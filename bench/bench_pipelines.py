"""Whole pipelines of diffusers with a LoRA of rank 16 on attention and feed-forward layers.

Random weights; guidance; prompts come as embeddings and latents come out, so that what is timed is
the denoiser and the sampler. On the CPU a small UNet, which shows what a call costs on the host; on
a GPU those of SD 1.5 and SDXL in float16 at 50 steps, eager and under torch.compile.

"floor": the pipeline without an adapter; "peft": as diffusers loads one; "fastlora": that pipeline
after `fastlora.accelerate`; "fastlora, loaded": `fastlora.load` into an accelerated pipeline;
"folded": the same folded. A "+ compile" has its UNet compiled.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from bench.bench_load import SDXL
from bench.timing import DEVICE, SECONDS, Turns, on_cpu, quartiles, replay, synchronised

RANK, FILE = 16, "a.safetensors"
STD = 0.02  # of U: pictures that differ
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
SMALL = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
# The configuration of the UNet, its steps, the seconds for all contenders together.
SIZES: dict[str, tuple[dict[str, Any], int, float]] = (
    {"small": (SMALL, 10, 4 * SECONDS)}
    if DEVICE == "cpu"
    else {"SD 1.5": (SD15, 50, 40.0), "SDXL": (SDXL, 50, 90.0)}
)
DTYPE = torch.float32 if DEVICE == "cpu" else torch.float16
EAGER = ("floor", "peft", "fastlora", "fastlora, loaded", "folded")
COMPILED = () if DEVICE == "cpu" else ("floor", "peft", "fastlora", "fastlora, loaded")
CONTENDERS = (*EAGER, *(f"{name} + compile" for name in COMPILED))


def pipeline(config: dict[str, Any]) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet = diffusers.UNet2DConditionModel(**config).to(DTYPE).eval()
    vae = diffusers.AutoencoderKL(norm_num_groups=8, block_out_channels=(8,)).to(DEVICE, DTYPE)
    parts: dict[str, Any] = {"unet": unet, "vae": vae, "text_encoder": None, "tokenizer": None}
    parts["scheduler"] = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    if config is SDXL:
        made = diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
        )
    else:
        made = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    made.set_progress_bar_config(disable=True)
    return made


def write(made: Any, folder: str) -> None:
    """The adapter of all contenders, as diffusers saves one."""
    fastlora.inject(made.unet, fastlora.LoRA(RANK), TARGETS, name="a", seed=2)
    for up in fastlora.parameters(made.unet)[1::2]:
        nn.init.normal_(up, std=STD)
    fastlora.save({"unet": made.unet}, f"{folder}/{FILE}", "a", format="diffusers")


def with_lora(made: Any, name: str, folder: str) -> Any:
    """The pipeline as a contender has it."""
    how = name.removesuffix(" + compile")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of text encoders that are not there
        if how in ("peft", "fastlora"):
            made.load_lora_weights(folder, weight_name=FILE, adapter_name="a")
        if how not in ("floor", "peft"):
            fastlora.accelerate(made)
    if how in ("fastlora, loaded", "folded"):
        fastlora.load({"unet": made.unet}, f"{folder}/{FILE}", name="a")
    if how == "folded":
        fastlora.fold(made)
    made.unet.requires_grad_(False)
    if name != how:
        made.unet.compile(fullgraph=True)
    return made


def call(made: Any, steps: int) -> Callable[[], Any]:
    width = made.unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, DTYPE)

    given: dict[str, Any] = {
        "prompt_embeds": random(1, 77, width),
        "negative_prompt_embeds": random(1, 77, width),
    }
    if type(made).__name__ == "StableDiffusionXLPipeline":
        given["pooled_prompt_embeds"] = random(1, 1280)
        given["negative_pooled_prompt_embeds"] = random(1, 1280)
    size = made.unet.config.sample_size
    given["latents"] = random(1, 4, size, size)
    return lambda: made(**given, num_inference_steps=steps, guidance_scale=7.5,
                        output_type="latent").images  # fmt: skip


@cache
def turns(size: str) -> dict[str, Turns]:
    config, steps, seconds = SIZES[size]
    jobs: dict[str, list[Callable[[], Any]]] = {}
    with TemporaryDirectory() as folder:
        write(pipeline(config), folder)
        for name in CONTENDERS:
            run = call(with_lora(pipeline(config), name, folder), steps)
            run = run if DEVICE == "cpu" else synchronised(run)
            run()  # compiles
            jobs[name] = [run]
    with torch.no_grad():
        found = on_cpu(jobs, seconds)
    for name, one in found.items():
        floor = found["floor + compile" if name.endswith("compile") else "floor"]
        one.info |= {"device": DEVICE, "steps": steps, **quartiles(one.times, floor.times)}
        ratios = [a / b for a, b in zip(one.times, found["peft"].times, strict=True)]
        one.info["over_peft"] = statistics.median(ratios)
    return found


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("size", SIZES)
def test_pipeline(benchmark: Any, size: str, contender: str) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    benchmark.group = f"pipeline {size}, rank {RANK}"
    replay.show(benchmark, turns(size)[contender])
