"""`sampler_step` and `add_noise` beside diffusers, and beside a copy of the same bytes.

Every contender of a group ends with what the next model call needs: the new sample, and that sample
twice in one tensor for classifier-free guidance. The floor is `copy_` of as many bytes as an ideal
step reads and writes, so its time is bytes over this machine's copy bandwidth.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.timing import DEVICE, measure
from fastlora import Schedule, ddim, ops

SHAPES = [(1, 4, 64, 64), (4, 4, 64, 64), (4, 4, 128, 128)]
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
STEPS, STEP, SCALE = 50, 10, 7.5


def copy_of(size: int) -> Callable[[], Any]:
    source = torch.zeros(size // 8, device=DEVICE)  # half of the bytes are read, half written
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


CASES = [
    pytest.param(shape, prediction, eta, id=f"{'x'.join(map(str, shape))}-{prediction}-eta{eta:g}")
    for prediction, eta in (("epsilon", 0.0), ("v", 0.0), ("epsilon", 1.0))
    for shape in SHAPES
]


@pytest.mark.parametrize("contender", ["fastlora", "diffusers", "floor"])
@pytest.mark.parametrize(("shape", "prediction", "eta"), CASES)
def test_sampler_step(benchmark, shape, prediction, eta, contender):
    """Classifier-free guidance, one DDIM step and the doubled input of the next model call."""
    benchmark.group = f"sampler_step {'x'.join(map(str, shape))} {prediction} eta={eta:g}"
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE)
    output = torch.randn(2 * shape[0], *shape[1:], device=DEVICE)
    # reads x and two outputs, writes x' and it twice more
    size = 6 * x.numel() * x.element_size()
    contenders = {"fastlora": fastlora_step, "diffusers": diffusers_step}
    step = copy_of(size)
    if contender in contenders:
        step = contenders[contender](x, output, prediction, eta)
    capture = contender != "diffusers"  # its step compares timesteps on the host
    measure(benchmark, step, rounds=40, iterations=10, size=size, capture=capture)


def fastlora_step(x: Any, output: Any, prediction: str, eta: float) -> Callable[[], Any]:
    table = ddim(Schedule.scaled_linear(), STEPS, eta, prediction)
    coefficients = table.coefficients.to(DEVICE, torch.float32)
    weights = torch.tensor([[[SCALE], [1 - SCALE]]], device=DEVICE)
    row = torch.arange(STEPS, device=DEVICE)[STEP]
    seeds = torch.arange(len(x), device=DEVICE) if eta else None
    dtype = x.dtype

    def step():
        return ops.sampler_step(
            x, [output], weights, coefficients, row, seeds=seeds, copies=2, input_dtype=dtype
        )

    return step


def diffusers_step(x: Any, output: Any, prediction: str, eta: float) -> Callable[[], Any]:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=PREDICTIONS[prediction],
    )
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[STEP]

    def step():
        uncond, cond = output.chunk(2)  # as its pipelines order them
        guided = uncond + SCALE * (cond - uncond)
        latents = scheduler.step(guided, t, x, eta=eta).prev_sample
        return latents, torch.cat([latents] * 2)

    return step


@pytest.mark.parametrize("contender", ["fastlora", "fastlora-seeds", "diffusers", "floor"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_add_noise(benchmark, shape, contender):
    """The noisy sample and the target of v prediction."""
    benchmark.group = f"add_noise {'x'.join(map(str, shape))} v"
    torch.manual_seed(0)
    x0, eps = torch.randn(2, *shape, device=DEVICE)
    t = torch.randint(1000, shape[:1], device=DEVICE)
    seeds = torch.arange(shape[0], device=DEVICE)
    table = Schedule.scaled_linear().noise_table("v").to(DEVICE)
    size = 4 * x0.numel() * x0.element_size()
    function = copy_of(size)
    if contender == "fastlora":
        function = lambda: ops.add_noise(x0, eps, None, t, table)  # noqa: E731
    elif contender == "fastlora-seeds":
        function = lambda: ops.add_noise(x0, None, seeds, t, table)  # noqa: E731
    elif contender == "diffusers":
        scheduler = pytest.importorskip("diffusers").DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )

        def function():
            return scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t)

    measure(
        benchmark,
        function,
        rounds=40,
        iterations=10,
        size=size,
        capture=contender != "diffusers",
    )
