"""What the drop-ins refuse, and by which names."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.diffusers_cases import Case, diffusers, first_step, pair, start

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

REFUSED = [
    ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "variance_type"),
    ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "prediction_type"),
    ("DDIMScheduler", {"clip_sample_range": 0.0}, "clip_sample_range"),
    ("DDIMScheduler", {"thresholding": True, "sample_max_value": 0.0}, "sample_max_value"),
    (
        "LCMScheduler",
        {"thresholding": True, "dynamic_thresholding_ratio": 1.5},
        "dynamic_thresholding_ratio",
    ),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, "prediction_type"),
    ("EulerDiscreteScheduler", {"prediction_type": "noise"}, "prediction_type"),
    ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order"),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type"),
    (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "v_prediction", "use_flow_sigmas": True},
        "prediction_type",
    ),
]


@pytest.mark.parametrize(("name", "options", "named"), REFUSED, ids=lambda v: str(v))
def test_refused_by_name(name, options, named):
    with pytest.raises(ValueError, match=rf"^Fast{name}: {named}: expected .*, got .*diffusers"):
        Case(name, options).ours()
    theirs = Case(name, options).theirs()  # diffusers constructs it, whatever comes of it
    with pytest.raises(ValueError, match=rf"^Fast{name}: {named}: expected"):
        Case(name).ours().from_config(theirs.config)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler"])
def test_noise_prediction_where_there_is_nothing_but_noise(name):
    ours = Case(name, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}).ours()
    with pytest.raises(ValueError, match="prediction_type: expected v_prediction or sample.* 999"):
        ours.set_timesteps(4)


@pytest.mark.parametrize(
    ("name", "timestep", "message"),
    [
        ("DDIMScheduler", 1000, "expected a timestep below 1000"),
        ("DDIMScheduler", -1, "expected a timestep below 1000"),
        ("DDIMScheduler", 3.5, "expected a whole number"),
        ("DDIMScheduler", torch.tensor([1, 2]), "expected one number"),
        ("DDPMScheduler", 749, "expected one of the listed timesteps"),
    ],
)
def test_timesteps_that_are_none(name, timestep, message):
    _, ours = pair(name)
    with pytest.raises(ValueError, match=f"^Fast{name}: timestep: {message}"):
        ours.step(start(), timestep, start())


@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler"])
def test_step_before_set_timesteps(name):
    with pytest.raises(ValueError, match=rf"Fast{name}: step: expected set_timesteps"):
        Case(name).ours().step(start(), 999, start())


def test_other_arguments_of_step():
    _, ours = pair("DDIMScheduler")
    with pytest.raises(ValueError, match="eta: expected a number from 0 to 1, got 2"):
        first_step(ours, eta=2.0)
    with pytest.raises(ValueError, match=r"outputs\[0\]: expected"):
        ours.step(start()[:1], ours.timesteps[0], start())
    _, ours = pair("DDPMScheduler", variance_type="learned")
    with pytest.raises(ValueError, match="model_output: expected 6 channels .* got 3"):
        first_step(ours)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_more_steps_than_there_are(name):
    _, ours = pair(name, 2)
    for _ in range(2):
        first_step(ours)
    with pytest.raises(ValueError, match="timestep: expected a step index below 2.*, got 2"):
        first_step(ours)


def test_model_input_that_was_not_scaled_is_warned_of(caplog):
    _, ours = pair("EulerDiscreteScheduler")
    logger = diffusers.utils.logging.get_logger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        ours.step(start(), ours.timesteps[0], start())
    finally:
        logger.removeHandler(caplog.handler)
    assert "should see scale_model_input" in caplog.text


@pytest.mark.parametrize("t", [3, torch.tensor(3), torch.tensor(3, dtype=torch.int32)])
@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ],
)
def test_indices_for_timesteps_are_refused(name, t):
    _, ours = pair(name)
    with pytest.raises(ValueError, match=rf"Fast{name}: timestep: expected one of .* not an index"):
        ours.step(start(), t, start())
