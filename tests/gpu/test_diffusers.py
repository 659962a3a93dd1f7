"""The drop-ins on a GPU: what diffusers computes on the CPU, and no wait for the device."""

from __future__ import annotations

import pytest
import torch

from tests.devices import no_gpu
from tests.integrations.diffusers_cases import Case, diffusers, network

pytestmark = [
    pytest.mark.gpu,
    no_gpu,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CASES = [
    Case("DDIMScheduler", {"clip_sample": False, **SD}, 10, {"eta": 1.0}),
    Case("DDPMScheduler", SD, 10),
    Case("DPMSolverMultistepScheduler", SD, 10),
    Case("EulerDiscreteScheduler", SD, 10),
    Case("EulerAncestralDiscreteScheduler", SD, 10),
    Case("LCMScheduler", {}, 4),
    Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 10),
]


def loop(scheduler, x, generator, device, between):
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        with between():
            output = (0.3 * scaled).sin().to(device)
            arguments = {"eta": 1.0} if isinstance(scheduler, diffusers.DDIMScheduler) else {}
            x = scheduler.step(output, t, x, generator=generator, **arguments).prev_sample
    return x


class NoWait:
    """A block of code in which whoever waits for the device raises."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


class AsIs:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_wait_for_nothing(case):
    """Timesteps on the GPU, as pipelines have them; noise drawn there. The first loop makes
    the tables."""
    ours = case.ours()
    x = torch.randn(2, 3, 8, 8, device="cuda")
    ours.set_timesteps(case.steps, device="cuda")
    if hasattr(ours, "set_begin_index"):
        ours.set_begin_index(0)
    generator = torch.Generator("cuda").manual_seed(0)
    loop(ours, x, generator, "cuda", AsIs)
    if hasattr(ours, "_step_index"):
        ours._step_index = None
    if hasattr(ours, "lower_order_nums"):
        ours.lower_order_nums = 0
    assert loop(ours, x, generator, "cuda", NoWait).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_as_diffusers(case, dtype):
    x = torch.randn(2, 3, 8, 8)
    results = []
    # In 16 bits other numbers are drawn than in 32: there the peer runs on the GPU too.
    peer = ("cpu", dtype) if dtype == torch.float32 else ("cuda", dtype)
    for scheduler, device, kind in ((case.theirs(), *peer), (case.ours(), "cuda", dtype)):
        scheduler.set_timesteps(case.steps, device=device)
        generator = torch.Generator().manual_seed(0)  # of the CPU: the same numbers on both
        scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
        end = loop(scheduler, (scale * x).to(device, kind), generator, device, AsIs)
        results.append(end.cpu().float())
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    scale = results[0].abs().max().item()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=tolerance * scale)


def test_a_timestep_that_only_the_device_knows():
    ours = Case("DDIMScheduler").ours()
    ours.set_timesteps(10, device="cuda")
    x = torch.randn(2, 3, 8, 8, device="cuda")
    listed, copied = ours.timesteps[3], ours.timesteps[3].clone()
    expected = ours.step(network(x, 5), listed, x).prev_sample
    with NoWait():
        got = ours.step(x, copied, x).prev_sample
    assert got.shape == expected.shape
    assert torch.equal(ours.step(network(x, 5), copied, x).prev_sample, expected)
