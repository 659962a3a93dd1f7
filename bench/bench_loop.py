"""A whole sampling with classifier-free guidance: fastlora's loop, eager and as one CUDA graph,
beside diffusers' pipeline loop, eager and compiled.

On a GPU: a U-Net of Stable Diffusion 1.5's shape (random weights, bfloat16), 50 steps, one 64 x 64
latent. On the CPU: a small one of the same class, 10 steps, where the model takes nearly all of the
time. The floor is the model alone, called as often, eagerly.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.timing import DEVICE, measure
from fastlora import Sampler, Schedule, ddim, sample

STEPS, SCALE = (50, 7.5) if DEVICE == "cuda" else (10, 7.5)
SIZE, WIDTH = (64, 768) if DEVICE == "cuda" else (32, 32)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SMALL = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


ON_GPU = ("fastlora, captured", "diffusers, compiled")
CONTENDERS = ("floor", "fastlora", "diffusers", *(ON_GPU if DEVICE == "cuda" else ()))


@pytest.fixture(scope="module")
def contenders() -> Iterator[dict[str, Callable[[], Callable[[], Any]]]]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    size = {"sample_size": SIZE, "cross_attention_dim": WIDTH}
    config = {} if DEVICE == "cuda" else SMALL
    net = diffusers.UNet2DConditionModel(**size, **config).to(DEVICE, DTYPE).eval()
    table = ddim(Schedule.scaled_linear(), STEPS)
    x = torch.randn(1, 4, SIZE, SIZE, device=DEVICE, dtype=DTYPE)
    cond, uncond = torch.randn(2, 1, 77, WIDTH, device=DEVICE, dtype=DTYPE)

    def model(x: Any, t: Any, cond: Any) -> Any:
        return net(x, t, cond, return_dict=False)[0]

    def captured() -> Callable[[], Any]:
        sampler = Sampler(model, table, x.shape, cond, uncond, SCALE, device=DEVICE, dtype=DTYPE)
        sampler.capture()
        return lambda: sampler(x)

    def compiled() -> Callable[[], Any]:
        return diffusers_loop(torch.compile(net, mode="reduce-overhead"), x, cond, uncond)

    yield {
        "floor": lambda: calls(net, cond, uncond),
        "fastlora": lambda: lambda: sample(model, table, x, cond, uncond, SCALE, progress=False),
        "diffusers": lambda: diffusers_loop(net, x, cond, uncond),
        "fastlora, captured": captured,
        "diffusers, compiled": compiled,
    }


@pytest.mark.parametrize("contender", CONTENDERS)
def test_loop(benchmark: Any, contenders: Any, contender: str) -> None:
    shape = "Stable Diffusion 1.5" if DEVICE == "cuda" else "a small U-Net"
    benchmark.group = f"loop of {STEPS} DDIM steps with guidance, {shape}"
    benchmark.extra_info["loop"] = True
    setup = torch.cuda.synchronize if DEVICE == "cuda" else None
    measure(benchmark, contenders[contender](), rounds=7, setup=setup)


def calls(net: Any, cond: Any, uncond: Any) -> Callable[[], Any]:
    """The model as often, on an input that is there."""
    x = torch.randn(2, 4, SIZE, SIZE, device=DEVICE, dtype=DTYPE)
    t, both = torch.full((2,), 500, device=DEVICE), torch.cat((cond, uncond))

    def run() -> Any:
        for _ in range(STEPS):
            y = net(x, t, both, return_dict=False)[0]
        return y

    return run


def diffusers_loop(net: Any, x: Any, cond: Any, uncond: Any) -> Callable[[], Any]:
    """The loop of its pipelines: two inputs in one, the guidance, the scheduler's step."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False)
    both = torch.cat((uncond, cond))

    def run() -> Any:
        latents = x.to(DTYPE)
        scheduler.set_timesteps(STEPS, device=DEVICE)
        for t in scheduler.timesteps:
            doubled = scheduler.scale_model_input(torch.cat((latents, latents)), t)
            u, c = net(doubled, t, both, return_dict=False)[0].chunk(2)
            latents = scheduler.step(u + SCALE * (c - u), t, latents, return_dict=False)[0]
        return latents

    return run
