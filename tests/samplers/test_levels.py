"""Noise levels by their closed forms, and grids that solvers cannot use."""

import math
import warnings

import numpy as np
import pytest
import torch

from fastlora.samplers import Grid, Schedule, grid_from_config
from fastlora.samplers.grid import listed, spaced
from fastlora.samplers.levels import (
    descending,
    euler_grid,
    exploding,
    flow,
    flow_grid,
    interpolated,
    multistep_grid,
    multistep_positions,
    positions,
    preserving,
    ramp,
    ratios,
    shifted,
    stretched,
    timesteps_of,
    without_zero_snr,
)

SD = Schedule.scaled_linear()


def test_timesteps_of_is_the_inverse_of_the_table():
    table = ratios(SD)
    everywhere = torch.arange(1000).double()
    torch.testing.assert_close(timesteps_of(table, table), everywhere, rtol=0, atol=1e-9)
    middle = (table[:-1] * table[1:]).sqrt()  # log-linear between
    torch.testing.assert_close(
        timesteps_of(middle, table), everywhere[:-1] + 0.5, rtol=0, atol=1e-9
    )
    beyond = torch.tensor([0.0, 1e-6, 1e6]).double()
    assert timesteps_of(beyond, table).tolist() == [0, 0, 999]


def test_interpolated_is_linear():
    values = torch.tensor([1.0, 3.0, 7.0]).double()
    at = interpolated(values, torch.tensor([-1.0, 0.0, 0.25, 1.5, 2.0, 9.0]).double())
    assert at.tolist() == [1.0, 1.0, 1.5, 5.0, 7.0, 7.0]


@pytest.mark.parametrize("name", ["karras", "exponential", "lu", "beta"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_ramps(name, steps):
    if name == "beta":
        pytest.importorskip("scipy")
    sigmas = ramp(name, 80.0, 0.002, steps)
    assert len(sigmas) == steps and sigmas[0].item() == pytest.approx(80.0)
    if steps > 1:
        assert sigmas[-1].item() == pytest.approx(0.002) and bool((sigmas.diff() < 0).all())
    u = torch.linspace(0, 1, steps).double()
    even = {  # what is evenly spaced
        "karras": (sigmas / 80.0) ** (1 / 7),
        "exponential": sigmas.log(),
        "lu": sigmas.log(),
    }
    if name in even and steps > 1:
        first, last = even[name][0], even[name][-1]
        torch.testing.assert_close(even[name], first + u * (last - first), rtol=1e-6, atol=1e-6)


def test_beta_quantiles():
    """Symmetric about the middle, and as much of Beta(0.6, 0.6) between any two of them."""
    pytest.importorskip("scipy")
    sigmas = ramp("beta", 1.0, 1e-12, 101).numpy()
    np.testing.assert_allclose(sigmas + sigmas[::-1], 1.0, atol=1e-9)
    x = (np.arange(1, 400001) - 0.5) / 400000  # the midpoint rule
    density = (x * (1 - x)) ** -0.4
    mass = np.cumsum(density) / density.sum()
    np.testing.assert_allclose(np.interp(sigmas, x, mass), np.linspace(1, 0, 101), atol=2e-3)


def test_shifts():
    sigmas = torch.tensor([1.0, 0.5, 0.25]).double()
    assert shifted(sigmas, 3.0).tolist() == [1.0, 0.75, 0.5]
    assert stretched(sigmas, 0.1)[-1].item() == pytest.approx(0.1)
    assert stretched(sigmas, 0.1)[0] == 1
    mu = math.log(3.0)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    grid = grid_from_config(config, sigmas=[1.0, 0.5, 0.25], mu=mu)
    torch.testing.assert_close(grid.sigma, shifted(sigmas, 3.0))


@pytest.mark.parametrize("make", [exploding, preserving, flow])
def test_coordinates(make):
    """The same ratio sigma / alpha in all of them; the model sees unit variance of unit data."""
    sigmas = torch.tensor([0.9, 0.5, 0.1, 0.0]).double()
    grid = make(torch.tensor([9, 5, 1]), sigmas)
    ratio = sigmas[:-1] / (1 - sigmas[:-1]) if make is flow else sigmas[:-1]
    torch.testing.assert_close(grid.sigma / grid.alpha, ratio)
    assert torch.equal(grid.sigma_next[:-1], grid.sigma[1:]) and grid.sigma_next[-1] == 0
    if make is not flow:
        power = grid.input_scale**2 * (grid.alpha**2 + grid.sigma**2)
        torch.testing.assert_close(power, torch.ones(3).double())


def test_exploding_coordinates_of_a_grid():
    grid = multistep_grid(SD, 10)
    other = grid.exploding()
    torch.testing.assert_close(other.sigma, grid.sigma / grid.alpha)
    torch.testing.assert_close(other.input_scale, (other.sigma**2 + 1).rsqrt())
    torch.testing.assert_close(other.half_log_snr, grid.half_log_snr)
    assert other.init_noise_sigma == pytest.approx(1 / grid.alpha[0].item())


@pytest.mark.parametrize("T", [77, 100, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_timesteps_like_diffusers(name, spacing, T):
    """For every number of steps; not in float64, but as it is used."""
    diffusers = pytest.importorskip("diffusers")
    kind = getattr(diffusers, name)
    scheduler = kind(num_train_timesteps=T, timestep_spacing=spacing)
    make = positions if name.startswith("Euler") else multistep_positions
    for steps in (*range(1, 65), T // 3, T // 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.set_timesteps(steps)
        # for some numbers of steps diffusers' trailing list has a stray -1 at its end
        expected = [t for t in scheduler.timesteps.tolist() if t >= 0]
        assert make(T, steps, spacing).tolist() == expected


def test_offset():
    assert spaced(1000, 5, "leading", 1).tolist() == [801, 601, 401, 201, 1]
    with pytest.raises(ValueError, match="offset: expected an int from 0 to 199, got 200"):
        spaced(1000, 5, "leading", 200)
    with pytest.raises(ValueError, match="offset: expected an int from 0 to 199, got -1"):
        spaced(1000, 5, "leading", -1)


def test_listed_arrives_at_the_next_one():
    grid = listed(SD, [900, 30])
    expected = [SD.alphas_cumprod[30].item(), 1.0]
    torch.testing.assert_close(grid.alpha_next**2, torch.tensor(expected).double())
    assert torch.equal(listed(SD, np.array([900.0, 30.0])).timesteps, torch.tensor([900, 30]))


def test_zero_snr_is_refused_or_made_large():
    zero = SD.zero_terminal_snr()
    with pytest.raises(ValueError, match="schedule: expected abar > 0, got an SNR of 0 at t = 999"):
        ratios(zero)
    table = ratios(without_zero_snr(zero))
    assert table[-1].item() == pytest.approx(4096, rel=1e-6)
    assert torch.equal(table[:-1], (zero.sigma / zero.alpha)[:-1])
    assert torch.equal(without_zero_snr(SD).alphas_cumprod, SD.alphas_cumprod)
    with pytest.raises(ValueError, match="exploding: expected alpha > 0, got an SNR of 0"):
        listed(zero, [999, 5]).exploding()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ramp("cubic", 10.0, 0.1, 5), "name: expected one of karras, .*, got 'cubic'"),
        (lambda: ramp("karras", 0.1, 10.0, 5), "sigma_min: expected 0 < sigma_min <= sigma_max"),
        (lambda: positions(1000, 0, "linspace"), "steps: expected an int >= 1, got 0"),
        (lambda: positions(1000, 5, "even"), "spacing: expected one of .*, got 'even'"),
        (lambda: multistep_positions(1000, 2.5, "linspace"), "steps: expected an int >= 1"),
        (lambda: multistep_positions(1000, 5, "even"), "spacing: expected one of .*, got 'even'"),
        (lambda: euler_grid(SD, 2000, "leading"), "euler_grid: sigmas: expected positive numbers"),
        (lambda: multistep_grid(SD, 1000), "without repetition"),
        (lambda: multistep_grid(SD, 5, final="one"), "expected zero or sigma_min, got 'one'"),
        (lambda: flow_grid(0), "steps: expected an int >= 1, got 0"),
        (lambda: flow_grid(5, -1.0), "shift: expected a number > 0, got -1.0"),
        (lambda: descending([1.0], "f"), "f: sigmas: expected a list of numbers, got a list of 1"),
        (lambda: descending([1.0, math.nan], "f"), "f: sigmas: expected positive numbers"),
        (lambda: descending([1.0, 0.5, -0.1], "f"), "f: sigmas: expected positive numbers"),
        (lambda: listed(SD, [5, 9]), "listed: timesteps: expected numbers that descend"),
        (
            lambda: Grid.through(torch.ones(0).double(), *torch.ones(2, 1).double()),
            "expected at least one",
        ),
        (
            lambda: flow(torch.ones(1).double(), torch.tensor([1.0, 2.0]).double()),
            "finite numbers >= 0",
        ),
        (
            lambda: flow(torch.ones(2).double(), torch.tensor([1.0, 0.0]).double()),
            r"expected float64 \[2\]",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("call", [lambda: descending(["a"], "f"), lambda: listed(SD, "ab")])
def test_no_numbers(call):
    with pytest.raises(TypeError, match="expected numbers, got"):
        call()
