"""Configurations of schedulers in use, and those that are refused by the name of an option."""

import diffusers
import pytest
import torch

from fastlora.samplers import schedule_from_config, table_from_config

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DPM = "DPMSolverMultistepScheduler"


def same(a, b):
    assert a.coefficients.tolist() == b.coefficients.tolist()
    assert a.timesteps.tolist() == b.timesteps.tolist()


def test_scheduler_itself():
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    expected = table_from_config(SD | {"_class_name": "DDIMScheduler", "clip_sample": False}, 20)
    same(table_from_config(scheduler, 20), expected)
    assert expected.timesteps.tolist() == list(range(950, -1, -50))
    assert len(schedule_from_config(scheduler)) == 1000


def test_scheduler_made_from_the_configuration_of_another():
    """Its own class counts, not the one that its configuration names."""
    first = diffusers.DDIMScheduler(**SD)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        dict(first.config, _class_name="DDIMScheduler")
    )
    assert table_from_config(scheduler, 20).name.startswith("dpm_solver(")


def test_subclass():
    class Mine(diffusers.DDIMScheduler):
        pass

    same(table_from_config(Mine(**SD), 7), table_from_config(diffusers.DDIMScheduler(**SD), 7))


def test_fast_schedulers():
    from fastlora.integrations.diffusers import FastDDIMScheduler

    expected = table_from_config(diffusers.DDIMScheduler(**SD), 7)
    same(table_from_config(FastDDIMScheduler(**SD), 7), expected)
    same(table_from_config(SD | {"_class_name": "FastDDIMScheduler"}, 7), expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(SD), "_class_name: expected .* got none: pass the scheduler itself, or add"),
        (SD | {"_class_name": "FastPony"}, "_class_name: expected one of .* got 'FastPony'"),
        (SD | {"_class_name": "FastPNDMScheduler"}, "_class_name: expected one of"),
        (SD | {"_class_name": 3}, "_class_name: expected one of .* got 3"),
        (diffusers.PNDMScheduler(), "PNDMScheduler is not supported"),
        (diffusers.EDMEulerScheduler(), "_class_name: expected one of .* got 'EDMEuler"),
    ],
)
def test_classes_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        table_from_config(config, 5)


def test_what_has_no_configuration():
    with pytest.raises(TypeError, match="config: expected a dict, a path or a scheduler, got"):
        table_from_config(torch.nn.Linear(1, 1), 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DDIMScheduler", {"thresholding": True, "sample_max_value": 0.5}, "sample_max_value"),
        (DPM, {"thresholding": True, "sample_max_value": 0.0}, "sample_max_value"),
        (
            "DDPMScheduler",
            {"thresholding": True, "dynamic_thresholding_ratio": 1.5},
            "dynamic_thresholding_ratio",
        ),
        ("DDIMScheduler", {"clip_sample_range": -1.0}, "clip_sample_range"),
        ("DDPMScheduler", {"timestep_values": [1, 2]}, "timestep_values: expected None"),
        (DPM, {"sigma_max": "big", "use_karras_sigmas": True}, "sigma_max: expected a number"),
        (DPM, {"sigma_min": [1.0], "use_karras_sigmas": True}, "sigma_min: expected a number"),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": "x"}, "shift_terminal"),
        ("UniPCMultistepScheduler", {"disable_corrector": 3}, "disable_corrector"),
        ("DDIMScheduler", {"trained_betas": "x"}, "trained_betas: expected numbers"),
        ("DDIMScheduler", {"trained_betas": ["a", "b"]}, "trained_betas: expected numbers"),
        ("DDIMScheduler", {"trained_betas": 0.1}, "trained_betas: expected num_train_timesteps"),
    ],
)
def test_options_that_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        table_from_config(options | {"_class_name": name}, 5)


def test_timestep_values_of_old_configurations():
    config = SD | {"_class_name": "DDPMScheduler"}
    same(table_from_config(config | {"timestep_values": None}, 5), table_from_config(config, 5))


def test_sample_max_value_without_thresholding():
    config = SD | {"_class_name": "DDIMScheduler"}
    same(table_from_config(config | {"sample_max_value": 0.5}, 5), table_from_config(config, 5))
