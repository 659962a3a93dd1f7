"""What stochastic solvers sample: moments in closed form, and of samples."""

import math

import pytest

from fastlora.samplers import Schedule, ddim, ddpm, dpm_solver, euler_ancestral, noise, sample
from fastlora.samplers.continuous import geometric, karras, linear_log_snr
from fastlora.samplers.grid import grid_of, strided
from fastlora.samplers.sde import VE, VP, SubVP
from fastlora.samplers.solvers.langevin import annealed_langevin
from fastlora.samplers.solvers.log_snr_ancestral import log_snr_ancestral
from fastlora.samplers.solvers.score import predictor_corrector, reverse_sde
from tests.samplers.exact import assert_moments, gaussian, moments

DATA = gaussian(0.4, 0.6)

STOCHASTIC = {
    "reverse_sde of VP": lambda n: (reverse_sde(VP(), n), VP().grid(n)),
    "reverse_sde of sub-VP": lambda n: (reverse_sde(SubVP(), n), SubVP().grid(n)),
    "reverse_sde of VE": lambda n: (reverse_sde(VE(), n), VE().grid(n)),
    "predictor_corrector of VP": lambda n: (predictor_corrector(VP(), n), VP().grid(n)),
    "predictor_corrector of VE": lambda n: (predictor_corrector(VE(), n), VE().grid(n)),
    "predictor_corrector of sub-VP, euler_maruyama": lambda n: (
        predictor_corrector(SubVP(), n, predictor="euler_maruyama"),
        SubVP().grid(n),
    ),
    "predictor_corrector of VP, probability_flow": lambda n: (
        predictor_corrector(VP(), n, predictor="probability_flow"),
        VP().grid(n),
    ),
    "log_snr_ancestral": lambda n: on(linear_log_snr(n), log_snr_ancestral),
    "ddpm": lambda n: on(grid_of(Schedule.linear(), n), ddpm),
    "ddim with eta 1": lambda n: on(strided(Schedule.linear(), n), ddim, eta=1.0),
    "euler_ancestral": lambda n: on(karras(n), euler_ancestral),
    "DPM-Solver++ 2M SDE": lambda n: on(
        strided(Schedule.linear(), n), dpm_solver, algorithm="sde-dpmsolver++"
    ),
}


def on(grid, solver, **options):
    return solver(grid, **options), grid


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_moments_of_samples(solver):
    """Samples of 12 steps have the moments that the rows have in closed form: the noise of every
    row is standard normal and independent of that of all others."""
    table, grid = STOCHASTIC[solver](12)
    mean, variance = moments(table, grid, DATA)
    seeds = range(4)
    x = noise(seeds, (1 << 13,))
    model = DATA.model(grid, table.prediction)
    assert_moments(sample(model, table, x, seeds=seeds, progress=False), mean, variance)


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_moments_approach_those_of_the_data(solver):
    """In closed form, with ever more steps; where a solver ends by x0, the model's mean, the
    variance is lower by what the last level still leaves open."""
    errors = []
    for steps in (30, 60, 120):
        table, grid = STOCHASTIC[solver](steps)
        alpha, sigma = grid.alpha[-1].item(), grid.sigma[-1].item()
        square = (0.6 * alpha) ** 2 + sigma**2
        denoised = 0.6**2 * (0.6 * alpha) ** 2 / square
        start = grid.alpha[0].item(), grid.sigma[0].item()
        # from the very distribution of the first level, not from noise
        mean, variance = moments(
            table, grid, DATA, 0.4 * start[0], (0.6 * start[0]) ** 2 + start[1] ** 2
        )
        errors.append(abs(math.sqrt(variance) - math.sqrt(denoised)) / 0.6)
        assert mean == pytest.approx(0.4, abs=0.05)
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.62 * errors[1]


@pytest.mark.parametrize("corrector_steps", [0, 1, 3])
def test_predictor_corrector_by_hand(corrector_steps):
    """Algorithm 2 on N(0, s^2), whose score is -x/(s^2 + sigma^2): variances by hand."""
    s, snr, grid = 0.7, 0.2, geometric(20, 0.01, 10.0)
    table = predictor_corrector(grid, prediction="score", corrector_steps=corrector_steps, snr=snr)
    levels, V = grid.sigma.tolist(), 10.0**2
    for now, then in zip(levels[:-1], levels[1:], strict=True):
        gap = now**2 - then**2
        V = (1 - gap / (s**2 + now**2)) ** 2 * V + gap
        e = 2 * (snr * then) ** 2
        for _ in range(corrector_steps):
            V = (1 - e / (s**2 + then**2)) ** 2 * V + 2 * e
    V *= (s**2 / (s**2 + levels[-1] ** 2)) ** 2
    mean, variance = moments(table, grid, gaussian(0, s))
    assert mean == 0 and variance == pytest.approx(V, rel=1e-12)


def test_annealed_langevin_reaches_the_data():
    """On a Gaussian, with levels close together and enough steps; variances in closed form."""
    grid = geometric(60, 0.05, 10.0)
    table = annealed_langevin(grid, steps_per_level=60, step_size=2e-4, prediction="epsilon")
    mean, variance = moments(table, grid, DATA)
    assert mean == pytest.approx(0.4, abs=2e-3)
    assert math.sqrt(variance) == pytest.approx(0.6, rel=2e-2)
