"""Captured samplings on a GPU: real CUDA graphs give what eager steps give, and never wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import Sampler, Schedule, ddim, sample
from fastlora.samplers import noise
from tests.adapters.oracles import randomise
from tests.devices import no_gpu

pytestmark = [pytest.mark.gpu, no_gpu]
SHAPE, SEEDS = (2, 64, 48), [1, 2]
TABLE = ddim(Schedule.scaled_linear(), 8, eta=0.5)
per_step = pytest.mark.parametrize("per_step", [False, True], ids=["loop", "step"])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(48, 128), nn.SiLU(), nn.Linear(128, 48))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.inner(x + cond + 0.001 * t[:, None, None].to(x.dtype))


def network(reserve: int = 0, dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(0)
    model = Network().cuda().to(dtype).eval()
    if reserve:
        fastlora.reserve(model, reserve)
    for name in "ab":
        fastlora.inject(model, fastlora.LoRA(2), name=name, seed=0)
    randomise(model, size=0.1)
    fastlora.set_scale(model, {"a": 0.5, "b": -1.0})
    return model


def prompts(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SHAPE, generator=g).cuda().to(dtype) for _ in range(2))  # type: ignore


def plain(model: Any, cond: Tensor, uncond: Tensor, seeds: Any = SEEDS, **options: Any) -> Tensor:
    x = noise(seeds, SHAPE[1:], "cuda")
    return sample(model, TABLE, x, cond, uncond, 2.0, seeds, progress=False, **options)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@per_step
def test_replays_follow_what_changes(per_step: bool) -> None:
    model, (cond, uncond) = network(), prompts()
    sampler = Sampler(model, TABLE, SHAPE, cond, uncond, 2.0).capture(per_step)
    for seeds in (SEEDS, [3, 4]):
        close(sampler(seeds=seeds), plain(model, cond, uncond, seeds))
    for scales in ({"a": -2.0}, {"a": 0.0, "b": 0.7}):
        fastlora.set_scale(model, scales)
        for start in (None, {"a": 500}, {"b": -1}):
            close(sampler(seeds=SEEDS, start=start), plain(model, cond, uncond, start=start))
    close(sampler(seeds=SEEDS, cond=uncond), plain(model, uncond, uncond))
    assert sampler.captures == 1


@per_step
def test_adapters_come_and_go_in_a_reserve(per_step: bool) -> None:
    model, other, (cond, uncond) = network(reserve=8), network(), prompts()
    sampler = Sampler(model, TABLE, SHAPE, cond, uncond, 2.0).capture(per_step)
    for change in (
        lambda m: fastlora.remove(m, "a"),
        lambda m: fastlora.inject(m, fastlora.LoRA(4), name="c", seed=1),
        lambda m: randomise(m, seed=5, size=0.1),
    ):
        change(model), change(other)
        close(sampler(seeds=SEEDS), plain(other, cond, uncond))
    assert sampler.captures == 1


@per_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replay_does_not_wait(per_step: bool, dtype: torch.dtype) -> None:
    model, (cond, uncond) = network(dtype=dtype), prompts(dtype)
    sampler = Sampler(model, TABLE, SHAPE, cond, uncond, 2.0).capture(per_step)
    sampler(seeds=SEEDS, start={"a": 500})
    with no_waiting():
        sampler(seeds=[5, 6], start={"b": 300})
        fastlora.set_scale(model, {"a": 0.25})
        sampler(seeds=[5, 6], cond=uncond, guidance_scale=3.0)


def test_eager_steps_do_not_wait() -> None:
    model, (cond, uncond) = network(), prompts()
    x = noise(SEEDS, SHAPE[1:], "cuda")
    seeds = torch.tensor(SEEDS, device="cuda")
    steps = fastlora.sample_steps(model, TABLE, x, cond, uncond, 2.0, seeds)
    next(steps)
    with no_waiting():
        for _ in steps:
            pass


@per_step
def test_inpainting_rescale_and_thresholding(per_step: bool) -> None:
    model, (cond, uncond) = network(), prompts()
    mask = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    options = {"mask": mask, "known": cond * 0.5, "guidance_rescale": 0.7}
    table = ddim(Schedule.scaled_linear(), 6, threshold=(0.9, 2.0))
    sampler = Sampler(model, table, SHAPE, cond, uncond, 2.0, **options).capture(per_step)
    x = noise(SEEDS, SHAPE[1:], "cuda")
    expected = sample(model, table, x, cond, uncond, 2.0, SEEDS, progress=False, **options)
    close(sampler(seeds=SEEDS), expected)
