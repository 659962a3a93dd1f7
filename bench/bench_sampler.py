"""`sampler_step` and `add_noise` beside diffusers, and beside a copy of the same bytes.

Every contender of a group ends with what the next model call needs: the new sample, and that sample
twice in one tensor for classifier-free guidance. The floor is `copy_` of as many bytes as an ideal
step reads and writes, so its time is bytes over this machine's copy bandwidth.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.timing import DEVICE, measure
from fastlora import Schedule, ddim, ops
from fastlora.samplers.table import Table

SHAPES = [(1, 4, 64, 64), (4, 4, 64, 64), (4, 4, 128, 128)]
LARGE = [(16, 4, 128, 128)] + ([(64, 16, 128, 128)] if DEVICE == "cuda" else [])
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
STEPS, STEP, SCALE = 50, 10, 7.5
RESCALE, QUANTILE, LARGEST = 0.7, 0.995, 2.0
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

Step = Callable[[], Any]


def named(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def copy_of(size: int) -> Step:
    source = torch.zeros(size // 8, device=DEVICE)  # half of the bytes are read, half written
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def inputs(shape: tuple[int, ...]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE)
    return x, torch.randn(2 * shape[0], *shape[1:], device=DEVICE)


def fastlora_step(x: Any, output: Any, table: Table, **options: Any) -> Step:
    """`options`: what differs from guidance and a plain row."""
    coefficients = table.coefficients.to(DEVICE, torch.float32)
    weights = torch.tensor([[[SCALE], [1 - SCALE]]], device=DEVICE)
    row = torch.arange(STEPS, device=DEVICE)[STEP]
    names = ("history", "seeds", "noise", "rescale", "mask", "known")
    optional = [options.get(name) for name in names]
    quantile = options.get("quantile", 0.0)
    arguments: Any = (
        [output],
        weights,
        coefficients,
        row,
        *optional,
        quantile,
        LARGEST,
        2,
        x.dtype,
    )
    return lambda: ops.sampler_step(x, *arguments)


def diffusers_step(scheduler: Any, x: Any, output: Any, rescale: bool = False, **more: Any) -> Step:
    """Guidance as diffusers' pipelines compute it, and its scheduler."""
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its way of calling NumPy
        scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[STEP]

    def step() -> Any:
        uncond, cond = output.chunk(2)  # as its pipelines order them
        guided = uncond + SCALE * (cond - uncond)
        if rescale:
            guided = rescale_noise_cfg(guided, cond, RESCALE)
        latents = scheduler.step(guided, t, x, **more).prev_sample
        return latents, torch.cat([latents] * 2)

    return step


def run(benchmark: Any, contender: str, size: int, steps: dict[str, Callable[[], Step]]) -> None:
    """`size`: the bytes that have to be read and written."""
    step = copy_of(size) if contender == "floor" else steps[contender]()
    capture = contender != "diffusers"  # its step compares timesteps on the host
    measure(benchmark, step, rounds=40, iterations=10, size=size, capture=capture)


CASES = [
    pytest.param(shape, prediction, eta, id=f"{named(shape)}-{prediction}-eta{eta:g}")
    for prediction, eta in (("epsilon", 0.0), ("v", 0.0), ("epsilon", 1.0))
    for shape in SHAPES + (LARGE if (prediction, eta) == ("epsilon", 0.0) else [])
]


@pytest.mark.parametrize("contender", ["fastlora", "diffusers", "floor"])
@pytest.mark.parametrize(("shape", "prediction", "eta"), CASES)
def test_sampler_step(benchmark, shape, prediction, eta, contender):
    """Classifier-free guidance, one DDIM step and the doubled input of the next model call."""
    benchmark.group = f"sampler_step {named(shape)} {prediction} eta={eta:g}"
    x, output = inputs(shape)

    def ours() -> Step:
        seeds = torch.arange(len(x), device=DEVICE) if eta else None
        table = ddim(Schedule.scaled_linear(), STEPS, eta, prediction)
        return fastlora_step(x, output, table, seeds=seeds)

    def theirs() -> Step:
        diffusers = pytest.importorskip("diffusers")
        kind = PREDICTIONS[prediction]
        scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, prediction_type=kind)
        return diffusers_step(scheduler, x, output, eta=eta)

    # reads x and two outputs, writes x' and it twice more
    size = 6 * x.numel() * x.element_size()
    run(benchmark, contender, size, {"fastlora": ours, "diffusers": theirs})


@pytest.mark.parametrize("contender", ["fastlora", "diffusers", "floor"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], *LARGE], ids=named)
def test_multistep(benchmark, shape, contender):
    """Guidance and a step of DPM-Solver++ (2M), which remembers the last x0."""
    benchmark.group = f"sampler_step {named(shape)} 2M"
    x, output = inputs(shape)

    def ours() -> Step:
        # The row of a step in the middle: x, x0 and the last x0, of which x0 is x and e
        columns = {"k_x": 1.1, "k_e": -0.4, "c_x": 0.9, "c_e": 0.1, "c_h": -0.05}
        timesteps = torch.arange(STEPS)
        table = Table.of("2M", "epsilon", timesteps, **columns, g_x=1.1, g_e=-0.4)
        return fastlora_step(x, output, table, history=torch.randn_like(x)[None])

    def theirs() -> Step:
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS)
        step = diffusers_step(scheduler, x, output)
        for t in scheduler.timesteps[:2]:  # from here on there is a last x0
            scheduler.step(output[: len(x)], t, x)

        def again() -> Any:
            scheduler._step_index = STEP  # it counts its own calls
            return step()

        return again

    # reads x, two outputs and the last x0, writes x', it twice more, and x0
    size = 8 * x.numel() * x.element_size()
    run(benchmark, contender, size, {"fastlora": ours, "diffusers": theirs})


@pytest.mark.parametrize("contender", ["fastlora", "diffusers", "floor"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=named)
def test_statistics(benchmark, shape, contender):
    """DDIM with rescaled guidance and dynamic thresholding: both look at whole samples first."""
    benchmark.group = f"sampler_step {named(shape)} rescale and threshold"
    x, output = inputs(shape)

    def ours() -> Step:
        table = ddim(Schedule.scaled_linear(), STEPS, threshold=(QUANTILE, LARGEST))
        phi = torch.tensor([RESCALE], device=DEVICE)
        return fastlora_step(x, output, table, rescale=phi, quantile=QUANTILE)

    def theirs() -> Step:
        diffusers = pytest.importorskip("diffusers")
        scheduler = diffusers.DDIMScheduler(
            **BETAS,
            clip_sample=False,
            thresholding=True,
            dynamic_thresholding_ratio=QUANTILE,
            sample_max_value=LARGEST,
        )
        return diffusers_step(scheduler, x, output, rescale=True)

    # reads x and two outputs for the step, and once before it, writes x' and it twice more
    size = 9 * x.numel() * x.element_size()
    run(benchmark, contender, size, {"fastlora": ours, "diffusers": theirs})


@pytest.mark.parametrize("contender", ["fastlora", "fastlora-seeds", "diffusers", "floor"])
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_add_noise(benchmark, shape, contender):
    """The noisy sample and the target of v prediction."""
    benchmark.group = f"add_noise {named(shape)} v"
    torch.manual_seed(0)
    x0, eps = torch.randn(2, *shape, device=DEVICE)
    t = torch.randint(1000, shape[:1], device=DEVICE)
    seeds = torch.arange(shape[0], device=DEVICE)
    table = Schedule.scaled_linear().noise_table("v").to(DEVICE)

    def theirs() -> Step:
        scheduler = pytest.importorskip("diffusers").DDIMScheduler(**BETAS)
        return lambda: (scheduler.add_noise(x0, eps, t), scheduler.get_velocity(x0, eps, t))

    steps = {
        "fastlora": lambda: lambda: ops.add_noise(x0, eps, None, t, table),
        "fastlora-seeds": lambda: lambda: ops.add_noise(x0, None, seeds, t, table),
        "diffusers": theirs,
    }
    run(benchmark, contender, 4 * x0.numel() * x0.element_size(), steps)
