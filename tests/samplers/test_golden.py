"""Golden values: solvers on data whose exact model is linear, so that the end is a product.

Those of DDIM are in test_ddim.py.
"""

import math

import pytest
import torch

from fastlora.samplers import Schedule, euler, noise, sample
from fastlora.samplers.continuous import karras, linear_log_snr
from fastlora.samplers.sde import VP
from fastlora.samplers.solvers.heun import heun
from fastlora.samplers.solvers.langevin import langevin
from fastlora.samplers.solvers.log_snr_ancestral import log_snr_ancestral
from fastlora.samplers.solvers.score import probability_flow
from tests.samplers.exact import gaussian, moments


@pytest.mark.parametrize(
    ("schedule", "end", "digits"),
    [(Schedule.linear(), 4.0358e-5, 1e-9), (Schedule.scaled_linear(), 0.0046601, 1e-7)],
    ids=["linear", "scaled_linear"],
)
def test_last_alpha_cumprod(schedule, end, digits):
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(end, abs=digits / 2)


# Ho and Salimans' Algorithm 2 on N(0, 1), lambda from -20 to 20.
@pytest.mark.parametrize(
    ("v", "steps", "variance"),
    [
        *((0.0, n, V) for n, V in ((32, 0.5617), (64, 0.7403), (128, 0.8578), (256, 0.9255))),
        *((0.3, n, V) for n, V in ((32, 0.6585), (64, 0.8073), (128, 0.8974), (256, 0.9471))),
    ],
)
def test_log_snr_ancestral(v, steps, variance):
    grid = linear_log_snr(steps)
    mean, end = moments(log_snr_ancestral(grid, v=v), grid, gaussian(0, 1))
    assert mean == 0 and end == pytest.approx(variance, abs=5e-5)


@pytest.mark.parametrize("steps", [2, 3, 32, 64, 128, 256])
def test_log_snr_ancestral_keeps_the_variance_with_v_1(steps):
    """Exactly 1 between the steps; the last returns E[x0 | x], which has the variance alpha^2."""
    grid = linear_log_snr(steps)
    _, end = moments(log_snr_ancestral(grid, v=1.0), grid, gaussian(0, 1))
    assert end == pytest.approx(grid.alpha[-1].item() ** 2, abs=1e-13)
    assert end == pytest.approx(1, abs=3e-9)


# EDM: data N(0, 0.5^2), error of the standard deviation relative to that of the exact flow.
@pytest.mark.parametrize(
    ("solver", "steps", "error"),
    [(euler, 10, -0.2696), (euler, 40, -0.0703), (heun, 10, 0.2196), (heun, 40, 0.0098)],
)
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "score"])
def test_edm(solver, steps, error, prediction):
    grid, std = karras(steps), 0.5
    table = solver(grid, prediction=prediction)
    _, variance = moments(table, grid, gaussian(0, std))
    exact = 80 * std / math.hypot(std, 80)  # x / sqrt(std^2 + sigma^2) is constant along the flow
    assert math.sqrt(variance) / exact - 1 == pytest.approx(error, abs=5e-5)


@pytest.mark.parametrize("prediction", ["score", "epsilon", "v"])
@pytest.mark.parametrize("steps", [1, 10, 300])
def test_probability_flow_of_vp_is_the_identity(steps, prediction):
    """On N(0, 1), whose score is -x at every level: f x - g^2 s / 2 = 0."""
    sde, data = VP(), gaussian(0, 1)
    table = probability_flow(sde, steps, prediction, denoise=False)
    grid = sde.grid(steps, clean=False)
    x = torch.linspace(-3, 3, 13).double()[None]
    result = sample(data.model(grid, prediction), table, x, progress=False)
    torch.testing.assert_close(result, x, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("variance", "step_size"), [(1.0, 0.1), (1.0, 1.0), (4.0, 0.5), (0.25, 0.3)]
)
def test_langevin(variance, step_size):
    """The stationary variance on N(0, S) is S/(1 - a/(2 S)), by the rows and by sampling them."""
    expected = variance / (1 - step_size / (2 * variance))
    table = langevin(step_size, steps=200)

    def model(x, t, cond):
        return -x / variance

    c_x, c_e, c_n = (table.column(name)[0].item() for name in ("c_x", "c_e", "c_n"))
    gain = c_x - c_e / variance
    assert c_n**2 / (1 - gain**2) == pytest.approx(expected, rel=1e-12)

    seeds = range(4)
    x = noise(seeds, (1 << 13,))
    samples = sample(model, table, x, seeds=seeds, progress=False)
    n = samples.numel()
    assert samples.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / n))
    assert samples.mean().item() == pytest.approx(0, abs=4 * math.sqrt(expected / n))
