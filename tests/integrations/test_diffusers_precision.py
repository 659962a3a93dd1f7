"""Samples of 16 bits: errors against diffusers' formulas in float64, and what is remembered."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.integrations.diffusers_cases import Case, run, run_in_float64

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HALF = [torch.float16, torch.bfloat16]
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CASES = [
    Case("DDIMScheduler", {"clip_sample": False, **SD}),
    Case("DDIMScheduler", {"clip_sample": False}, 20, {"eta": 1.0}),
    Case("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    Case("DDPMScheduler", {"clip_sample": False}),
    Case("DPMSolverMultistepScheduler", SD),
    Case("DPMSolverMultistepScheduler", {"solver_order": 3, **SD}),
    Case("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    Case("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]
# diffusers itself computes their steps in float32 and rounds x once a step. What is left of the
# error of the trajectory is that the model sees x in 16 bits, which no scheduler can help.
# LCM starts from noise again at every step, so that errors do not add up, and half of what is left
# is that x is rounded to 16 bits.
ROUNDED = [
    Case("LCMScheduler", {}, 4),
    Case("EulerDiscreteScheduler", SD),
    Case("EulerAncestralDiscreteScheduler", SD),
]


def errors(case, dtype, outputs=None):
    """Root mean square of the errors over the trajectory, of max|x|: the drop-in's, diffusers'."""
    exact = run_in_float64(case, dtype, outputs)
    result = []
    for scheduler in (case.ours(), case.theirs()):
        found = run(case, scheduler, dtype, outputs)
        assert all(x.dtype == dtype for x in found.x)
        squares = [
            ((x.double() - e) / e.abs().max()).square().mean()
            for x, e in zip(found.x, exact.x, strict=True)
        ]
        result.append(torch.stack(squares).mean().sqrt().item())
    return result


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_of_diffusers_error(case, dtype):
    ours, theirs = errors(case, dtype)
    assert ours <= 0.5 * theirs


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_less_than_diffusers_where_roundings_are_left(case, dtype):
    ours, theirs = errors(case, dtype)
    assert ours <= 0.8 * theirs


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES + ROUNDED, ids=str)
def test_steps_alone(case, dtype):
    """The model's outputs given, the same for all: what the steps themselves lose."""
    outputs = [e.to(dtype) for e in run_in_float64(case, dtype).outputs]
    ours, theirs = errors(case, dtype, outputs)
    assert ours <= 0.5 * theirs


@pytest.fixture
def flow():
    scheduler = Case("FlowMatchEulerDiscreteScheduler").ours()
    scheduler.set_timesteps(4)
    return scheduler


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 3, 4, 4, generator=generator).half() for _ in range(4)]


def trajectory(scheduler, x, outputs, between=lambda x: x):
    scheduler.set_begin_index(0)
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        x = between(scheduler.step(output, t, x).prev_sample)
    return x


def rounded(scheduler, x, outputs):
    """The same, rounded to 16 bits after every step, in float64."""
    for d, output in zip(scheduler.sigmas.double().diff(), outputs, strict=True):
        x = (x.double() + d * output.double()).half()
    return x


def unrounded(scheduler, x, outputs):
    x = x.double()
    for d, output in zip(scheduler.sigmas.double().diff(), outputs, strict=True):
        x = x + d * output.double()
    return x.half()


def test_float32_is_remembered_for_the_very_tensor(flow, samples):
    x, outputs = samples[0], samples
    exact, coarse = unrounded(flow, x, outputs), rounded(flow, x, outputs)
    assert not torch.equal(exact, coarse)
    assert torch.equal(trajectory(flow, x, outputs), exact)


def written_to(x):
    x.add_(0)
    return x


@pytest.mark.parametrize(
    "between",
    [torch.clone, copy.deepcopy, lambda x: x.view(1, 3, 4, 4), written_to],
    ids=["clone", "deepcopy", "view", "written to"],
)
def test_what_the_caller_gives_counts(flow, samples, between):
    """Another tensor, or one that was written to, is taken as it is."""
    x, outputs = samples[0], samples
    expected = rounded(flow, x, outputs)
    assert torch.equal(trajectory(flow, x, outputs, between), expected)


def test_keep_float32_can_be_switched_off(flow, samples):
    flow.keep_float32 = False
    x, outputs = samples[0], samples
    assert torch.equal(trajectory(flow, x, outputs), rounded(flow, x, outputs))


def test_inference_tensors_are_not_trusted(samples):
    """Nobody can see whether they were written to."""
    with torch.inference_mode():
        flow = Case("FlowMatchEulerDiscreteScheduler").ours()
        flow.set_timesteps(4)
        x, outputs = samples[0], samples
        expected = rounded(flow, x, outputs)
        assert torch.equal(trajectory(flow, x, outputs, lambda x: x.add_(0)), expected)


def test_what_is_remembered_dies_with_the_sample(flow, samples):
    flow.set_begin_index(0)
    out = flow.step(samples[0], flow.timesteps[0], samples[1]).prev_sample
    assert flow._precise is not None
    del out
    assert flow._precise is None
