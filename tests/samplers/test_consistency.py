"""Consistency models: beside diffusers, and on a Gaussian, whose f is known."""

import math
from dataclasses import replace

import pytest
import torch

from fastlora import ops
from fastlora.samplers import noise, sample, sample_steps
from fastlora.samplers.continuous import karras
from fastlora.samplers.solvers.consistency import consistency
from tests.samplers.exact import assert_moments, network


def stepped(table, x, noises):
    """x after all rows of a table with the given noise."""
    coefficients, weights = table.coefficients.to(x.dtype), torch.ones(1, 1, 1, dtype=x.dtype)
    x = x * table.init_noise_sigma
    seen = x * table.input_scale
    for i, z in enumerate(noises):
        output = network(seen, table.timesteps[i][None])
        x, _, seen = ops.sampler_step(
            x, [output], weights, coefficients, torch.tensor(i), noise=z, input_dtype=x.dtype
        )
    return x


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("levels", [[0], [0, 22, 39], [0, 10, 20, 30]], ids=["1", "3", "4"])
def test_consistency_like_diffusers(levels, clip):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=clip is not None)
    scheduler.set_timesteps(timesteps=levels[::-1])
    table = consistency(karras(40).sigma[levels], network=True, clip=clip)
    table = replace(table, timesteps=250 * table.timesteps.log())  # what their networks are told
    assert scheduler.timesteps.tolist() == pytest.approx(table.timesteps.tolist(), rel=1e-6)
    x = noise([3, 4], (6,)).double()
    theirs, noises, generator = x * scheduler.init_noise_sigma, [], torch.Generator()
    for i, t in enumerate(table.timesteps):
        seen = scheduler.scale_model_input(theirs, scheduler.timesteps[i])
        noises.append(torch.randn(x.shape, generator=generator.manual_seed(i), dtype=x.dtype))
        theirs = scheduler.step(
            network(seen, t[None]), scheduler.timesteps[i], theirs, generator.manual_seed(i)
        ).prev_sample
    ours = stepped(table, x, noises)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # their sigmas are float32


@pytest.mark.parametrize("network_of", [False, True], ids=["f", "F"])
@pytest.mark.parametrize("sigmas", [[80.0], [80.0, 0.7], [80.0, 5.0, 1.0, 0.3, 0.002]], ids=len)
def test_consistency_keeps_the_variance(sigmas, network_of):
    """On N(0, s^2), `f = x sqrt((s^2 + eps^2)/(s^2 + t^2))`: if x at 80 has the variance
    s^2 + 80^2, every x0 has s^2 + eps^2 and every noisy sample s^2 + tau^2."""
    s, eps, spread = 0.8, 0.002, 0.5

    def f(x, t):
        return x * math.sqrt((s**2 + eps**2) / (s**2 + t**2))

    def model(x, t, cond):
        t = t.flatten()[0].item()
        if not network_of:
            return f(x, t)
        c_skip = spread**2 / ((t - eps) ** 2 + spread**2)
        c_out = spread * (t - eps) / math.sqrt(t**2 + spread**2)
        x = x * math.sqrt(t**2 + spread**2)  # it sees c_in x
        return (f(x, t) - c_skip * x) / c_out if t > eps else torch.zeros_like(x)

    table = consistency(sigmas, network=network_of)
    assert table.init_noise_sigma == 80
    seeds = range(4)
    x = noise(seeds, (1 << 13,)) * math.sqrt(1 + (s / 80) ** 2)
    for step in sample_steps(model, table, x, seeds=seeds):
        tau = [*sigmas, eps][step.index + 1]
        assert_moments(step.x, 0, s**2 + tau**2)
        assert_moments(step.x0(), 0, s**2 + eps**2)


def test_consistency_is_the_identity_at_the_end():
    """f(x, eps) = x, whatever F is."""
    table = consistency([0.002], network=True)
    x = torch.linspace(-2, 2, 9).double()[None]
    result = sample(network, table, x, progress=False)
    torch.testing.assert_close(result, 0.002 * x, rtol=1e-15, atol=0)


def test_consistency_on_a_grid():
    """Its levels, timesteps and start; noise between the levels as from numbers."""
    grid = replace(karras(5), timesteps=250 * karras(5).sigma.log())
    table = consistency(grid)
    assert torch.equal(table.timesteps, grid.timesteps)
    assert torch.equal(table.coefficients, consistency(grid.sigma).coefficients)
    assert torch.equal(table.coefficients, consistency(grid.sigma.tolist()).coefficients)
