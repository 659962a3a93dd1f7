"""`step` of the drop-ins beside that of diffusers' schedulers, called as its pipelines call it."""

import warnings
from typing import Any

import pytest
import torch

from bench.timing import DEVICE, measure

# class, options, steps, arguments of step
CASES = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, 50, {}),
    "DDIM eta=1": ("DDIMScheduler", {"clip_sample": False}, 50, {"eta": 1.0}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}, 50, {}),
    "Euler": ("EulerDiscreteScheduler", {}, 50, {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}, 50, {}),
    "LCM": ("LCMScheduler", {}, 8, {}),
    "DDPM": ("DDPMScheduler", {}, 50, {}),
    "flow matching": ("FlowMatchEulerDiscreteScheduler", {}, 50, {}),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
STEP = 3


@pytest.mark.parametrize("contender", ["fastlora", "diffusers"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_scheduler_step(benchmark: Any, case: str, dtype: str, contender: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    benchmark.group = f"scheduler.step 1x4x64x64 {dtype} {case}"
    name, options, steps, arguments = CASES[case]
    cls = getattr(diffusers, name)
    if contender == "fastlora":
        from fastlora.integrations import diffusers as fast

        cls = getattr(fast, f"Fast{name}")
    scheduler = cls(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its way of calling NumPy
        scheduler.set_timesteps(steps, device=DEVICE)
    torch.manual_seed(0)
    x, output = torch.randn(2, 1, 4, 64, 64, device=DEVICE).to(DTYPES[dtype])
    counts = hasattr(scheduler, "_step_index")
    if counts:
        scheduler.set_begin_index(0)
    for t in scheduler.timesteps[:STEP]:  # what looks back has something to look at
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, return_dict=False, **arguments)[0]
    t = scheduler.timesteps[STEP]

    def step() -> Any:
        if counts:
            scheduler._step_index = STEP  # it counts its own calls
        return scheduler.step(output, t, x, return_dict=False, **arguments)

    size = 3 * x.numel() * x.element_size()
    measure(benchmark, step, rounds=40, iterations=10, size=size, capture=False)
