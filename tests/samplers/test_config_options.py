"""What configurations may say and ask for, and what is refused."""

import json
import math
import warnings

import numpy as np
import pytest
import torch

from fastlora.samplers import grid_from_config, schedule_from_config, table_from_config
from tests.samplers.test_config import (
    FLOW,
    MIN,
    RAMPS,
    SAMPLE,
    SD,
    SNR_ZERO,
    THRESHOLD,
    ZERO,
    V,
    label,
)


def test_configurations_of_real_models(tmp_path):
    """SDXL's file, with options of other classes, as a dict, a file, and its folder."""
    sdxl = {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    }
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(sdxl))
    table = table_from_config(sdxl, 5)
    assert table.timesteps.tolist() == [801, 601, 401, 201, 1] and table.prediction == "epsilon"
    for where in (path, tmp_path, str(tmp_path)):
        assert torch.equal(table_from_config(where, 5).coefficients, table.coefficients)
    assert schedule_from_config(path).alphas_cumprod[-1].item() == pytest.approx(
        0.0046601, rel=1e-4
    )
    assert grid_from_config(path, 5).sigma_next[-1] == 0


def test_every_timestep():
    """DDIM's step from any timestep, as its list has it where it has it."""
    config = {"_class_name": "DDIMScheduler", **SD}
    table, every = (
        table_from_config(config, 20, eta=0.5),
        table_from_config(config, 20, eta=0.5, every=True),
    )
    assert every.timesteps.tolist() == list(range(999, -1, -1))
    assert torch.equal(every.coefficients[999 - table.timesteps], table.coefficients)
    inverse = {"_class_name": "DDIMInverseScheduler", **SD}
    table, every = table_from_config(inverse, 20), table_from_config(inverse, 20, every=True)
    assert every.timesteps.tolist() == list(range(1000))
    assert torch.equal(every.coefficients[table.timesteps], table.coefficients)
    config = {"_class_name": "DDPMScheduler", **SD}
    every, table = table_from_config(config, every=True), table_from_config(config, 1000)
    assert torch.equal(every.coefficients, table.coefficients)
    config = {"_class_name": "DDIMScheduler", **SD, **ZERO}
    assert table_from_config(config, 20, every=True).timesteps.tolist() == list(range(998, -1, -1))
    assert len(table_from_config(config | V, 20, every=True)) == 1000


def test_the_alpha_to_one_of_before():
    config = {"_class_name": "DDIMInverseScheduler", **SD}
    first = schedule_from_config(config).alphas_cumprod[0].item()
    assert schedule_from_config(config).final_alpha_cumprod == 1
    assert schedule_from_config(config | {"set_alpha_to_zero": False}).final_alpha_cumprod == first


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize(
    "options",
    [
        *RAMPS,
        RAMPS[0] | {"beta_schedule": "squaredcos_cap_v2"},
        RAMPS[1] | ZERO,
        {"use_lu_lambdas": True, "beta_schedule": "squaredcos_cap_v2"},
        FLOW,
        FLOW | {"flow_shift": 3.0},
    ],
    ids=label,
)
def test_timesteps_that_are_cut_off(name, options):
    """As diffusers has them, whose float32 schedule makes 998 of 999 here and there."""
    diffusers = pytest.importorskip("diffusers")
    if "use_beta_sigmas" in options:
        pytest.importorskip("scipy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name).from_config(SD | options)
        for steps in (1, 2, 3, 5, 8, 13, 20, 25, 30, 31, 41, 50):
            scheduler.set_timesteps(steps)
            grid = grid_from_config({"_class_name": name, **SD, **options}, steps)
            assert torch.equal(grid.timesteps, scheduler.timesteps)


# --- refused -------------------------------------------------------------------------------------

REFUSED = [
    ("PNDMScheduler", {}, {}, "PNDMScheduler is not supported: it looks back on three"),
    ("KarrasVeScheduler", {}, {}, "_class_name: expected one of DDIMScheduler, .*, got 'KarrasVe"),
    ("DDIMScheduler", {"beta_schedule": "cubic"}, {}, "beta_schedule: expected one of .*'cubic'"),
    ("DDIMScheduler", {"new_option": 3}, {}, "DDIMScheduler: new_option: no such option; a newer"),
    ("DDIMScheduler", {"clip_sample": "yes"}, {}, "clip_sample: expected a bool, got 'yes'"),
    ("DDIMScheduler", {"beta_start": "a"}, {}, "beta_start: expected a number, got 'a'"),
    ("DDIMScheduler", {"steps_offset": 0.5}, {}, "steps_offset: expected an int, got 0.5"),
    ("DDIMScheduler", {"prediction_type": "x"}, {}, "prediction_type: expected one of .* got 'x'"),
    ("DDIMScheduler", {"prediction_type": 3}, {}, "prediction_type: expected a name, got 3"),
    ("DDIMScheduler", {"num_train_timesteps": 0}, {}, "num_train_timesteps: expected an int >= 1"),
    ("DDIMScheduler", {"timestep_spacing": "even"}, {}, "spacing: expected one of .* got 'even'"),
    ("DDIMScheduler", {"steps_offset": 200}, {}, "offset: expected an int from 0 to 111, got 200"),
    ("DDIMScheduler", {"trained_betas": [0.1]}, {}, "trained_betas: expected num_train_timesteps"),
    (
        "DDIMScheduler",
        SNR_ZERO,
        {},
        "prediction: expected v, x0 or flow where the SNR is 0, at t =",
    ),
    (
        "DDIMScheduler",
        {},
        {"timesteps": [1]},
        "timesteps: expected none .DDIMScheduler takes steps",
    ),
    ("DDIMScheduler", {}, {"eta": 1.5}, "eta: expected a number from 0 to 1, got 1.5"),
    ("DDIMScheduler", {}, {"steps": 2000}, "steps: expected an int from 1 to .* 1000, got 2000"),
    ("DDIMScheduler", {}, {"begin": 9}, "begin: expected an int from 0 to 8, got 9"),
    ("UniPCMultistepScheduler", {}, {"begin": "1"}, "begin: expected an int, got '1'"),
    ("DDIMScheduler", {}, {"sigmas": np.ones(2)}, "sigmas: expected none .DDIMScheduler takes"),
    ("DDIMInverseScheduler", SAMPLE, {}, "expected epsilon, v or flow where sigma is 0, got x0"),
    ("DDPMScheduler", {"variance_type": "learned"}, {}, "variance_type: expected fixed_small or"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, {}, "half of the model's channels"),
    ("DDPMScheduler", {"variance_type": "fixed_large_log"}, {}, "root of a negative logarithm"),
    ("DDPMScheduler", {"variance_type": "best"}, {}, "variance_type: expected .* got 'best'"),
    (
        "DDPMScheduler",
        {},
        {"timesteps": [900, 10]},
        "expected one of steps or timesteps .* steps and",
    ),
    (
        "DDPMScheduler",
        {},
        {"steps": None, "timesteps": [10, 900]},
        "timesteps: expected numbers that",
    ),
    ("DDPMScheduler", {}, {"steps": None, "timesteps": [9, 9]}, "without repetition"),
    (
        "DDPMScheduler",
        {},
        {"steps": None, "timesteps": [1000, 9]},
        "expected numbers from 0 to 999",
    ),
    ("DDPMScheduler", {}, {"steps": None, "timesteps": [9.5, 1.0]}, "timesteps: expected ints"),
    (
        "DDPMScheduler",
        {},
        {"steps": None, "timesteps": []},
        "timesteps: expected a list of numbers",
    ),
    ("DDPMScheduler", {}, {"every": True}, "steps: expected none beside every, got steps"),
    ("DDPMScheduler", {}, {"eta": 0.5}, "eta: expected none .DDPMScheduler takes steps, timesteps"),
    ("EulerDiscreteScheduler", {}, {"steps": None}, "expected one of steps or timesteps or sigmas"),
    ("EulerDiscreteScheduler", {}, {"steps": 0}, "steps: expected an int >= 1, got 0"),
    ("EulerDiscreteScheduler", {}, {"rederive": True}, "rederive: expected none"),
    (
        "EulerDiscreteScheduler",
        {"final_sigmas_type": "two"},
        {},
        "final_sigmas_type: expected zero",
    ),
    ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, {}, "interpolation_type: expected"),
    (
        "EulerDiscreteScheduler",
        {"timestep_type": "even"},
        {},
        "timestep_type: expected discrete or",
    ),
    ("EulerDiscreteScheduler", RAMPS[0] | RAMPS[1], {}, "expected False beside use_karras_sigmas"),
    (
        "EulerDiscreteScheduler",
        RAMPS[0],
        {"steps": None, "timesteps": [900, 10]},
        "timesteps: expected none beside use_karras_sigmas",
    ),
    (
        "EulerDiscreteScheduler",
        {"timestep_type": "continuous"} | V,
        {"steps": None, "timesteps": [900, 10]},
        "timesteps: expected none beside continuous",
    ),
    (
        "EulerDiscreteScheduler",
        {},
        {"steps": None, "sigmas": [1.0, 2.0, 0.0]},
        "that descend, from",
    ),
    (
        "EulerDiscreteScheduler",
        {},
        {"steps": None, "sigmas": [2.0, 2.0, 0.0]},
        "without repetition",
    ),
    (
        "EulerDiscreteScheduler",
        RAMPS[0] | {"sigma_min": 500.0},
        {},
        "sigma_min: expected 0 < sigma_min",
    ),
    ("EulerAncestralDiscreteScheduler", {}, {"sigmas": [1.0, 0.0]}, "sigmas: expected none"),
    ("HeunDiscreteScheduler", {}, {"begin": 3}, "begin: expected an even number, .* got 3"),
    ("HeunDiscreteScheduler", ZERO, {}, None),  # an option of other classes
    ("DPMSolverMultistepScheduler", {"solver_order": 4}, {}, "order: expected 1, 2 or 3, got 4"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "x"}, {}, "algorithm: expected one of dpms"),
    ("DPMSolverMultistepScheduler", {"solver_type": "x"}, {}, "solver_type: expected one of midp"),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver"},
        {},
        "expected sigma_min for dpm",
    ),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver", "solver_order": 3} | MIN,
        {},
        "order: expected 1 or 2 for sde-dpmsolver, got 3",
    ),
    (
        "DPMSolverMultistepScheduler",
        {"variance_type": "learned"},
        {},
        "variance_type: expected None",
    ),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, {}, "without use_flow"),
    (
        "DPMSolverMultistepScheduler",
        FLOW | V,
        {},
        "prediction_type: expected epsilon, sample or flow",
    ),
    ("DPMSolverMultistepScheduler", FLOW | RAMPS[0], {}, "use_flow_sigmas: expected False beside"),
    (
        "DPMSolverMultistepScheduler",
        {},
        {"mu": 1.0},
        "mu: expected None, since use_dynamic_shifting",
    ),
    ("DPMSolverMultistepScheduler", {}, {"steps": 1000}, "schedule|sigmas: expected"),
    ("LCMScheduler", {}, {"steps": 51}, "steps: expected an int from 1 to original_steps = 50"),
    (
        "LCMScheduler",
        {"original_inference_steps": 2000},
        {},
        "original_steps: expected an int from 1",
    ),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True},
        {},
        "mu: expected a number",
    ),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 0.0},
        {},
        "shift: expected a number > 0, got 0.0",
    ),
    ("FlowMatchEulerDiscreteScheduler", {}, {"mu": math.nan}, "mu: expected a number, got nan"),
    (
        "FlowMatchEulerDiscreteScheduler",
        {},
        {"sigmas": [1.0, 0.5]},
        "steps: expected as many as sig",
    ),
    ("FlowMatchEulerDiscreteScheduler", {}, {"steps": None, "sigmas": [1.5, 0.5]}, "and up to 1"),
    ("FlowMatchEulerDiscreteScheduler", {}, {"steps": None, "sigmas": [0.5, 0.7]}, "that descend"),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"invert_sigmas": True, "stochastic_sampling": True},
        {},
        "stochastic_sampling: expected False beside invert_sigmas",
    ),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True, "time_shift_type": "cubic"},
        {"mu": 1.0},
        "time_shift_type: expected exponential or linear, got 'cubic'",
    ),
    ("UniPCMultistepScheduler", {"solver_order": 3}, {}, "order: expected 1 or 2, got 3: it looks"),
    ("UniPCMultistepScheduler", {"solver_order": 0}, {}, "order: expected 1 or 2, got 0"),
    ("UniPCMultistepScheduler", {"solver_type": "x"}, {}, "solver_type: expected bh1 or bh2"),
    ("UniPCMultistepScheduler", {"solver_p": "x"}, {}, "solver_p: expected None"),
    ("UniPCMultistepScheduler", {"predict_x0": False}, {}, "expected a last sigma above 0"),
    ("UniPCMultistepScheduler", {"lower_order_final": False}, {}, "expected a last sigma above 0"),
    ("UniPCMultistepScheduler", {"predict_x0": False} | MIN | THRESHOLD, {}, "without predict_x0"),
    (
        "UniPCMultistepScheduler",
        {"shift_terminal": 0.1},
        {},
        "shift_terminal: expected None without",
    ),
    (
        "UniPCMultistepScheduler",
        {},
        {"steps": None, "sigmas": [0.9]},
        "sigmas: expected none without",
    ),
    ("UniPCMultistepScheduler", FLOW | RAMPS[1], {}, "expected False beside exponential sigmas"),
    ("UniPCMultistepScheduler", FLOW | {"use_dynamic_shifting": True}, {}, "mu: expected a number"),
]


@pytest.mark.parametrize(("name", "options", "arguments", "message"), REFUSED, ids=label)
def test_refused(name, options, arguments, message):
    config = {"_class_name": name, **options}
    if message is None:
        table_from_config(config, **({"steps": 9} | arguments))
        return
    with pytest.raises(ValueError, match=message):
        table_from_config(config, **({"steps": 9} | arguments))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (3, TypeError, "config: expected a dict, a path or a scheduler, got a int"),
        ({}, ValueError, "_class_name: expected the class of the scheduler, got none"),
        ("nowhere", FileNotFoundError, "expected a scheduler_config.json or its folder"),
    ],
    ids=label,
)
def test_no_configuration(config, error, message):
    with pytest.raises(error, match=message):
        table_from_config(config, 9)


@pytest.mark.parametrize(("text", "message"), [("{", "expected JSON"), ("[]", "expected a dict")])
def test_no_configuration_in_the_file(text, message, tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        schedule_from_config(path)


def test_flow_matching_has_no_schedule():
    with pytest.raises(ValueError, match="schedule: expected betas, got none"):
        schedule_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})


@pytest.mark.parametrize("sigmas", [["a", "b"], 3.0, None], ids=str)
def test_no_numbers(sigmas):
    for name, options in (("EulerDiscreteScheduler", {}), ("FlowMatchEulerDiscreteScheduler", {})):
        with pytest.raises((TypeError, ValueError), match="sigmas|steps: expected one of"):
            table_from_config({"_class_name": name, **options}, sigmas=sigmas)
