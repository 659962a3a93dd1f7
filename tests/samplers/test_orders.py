"""Orders of convergence, on a mixture of two Gaussians with the exact model, in float64.

What is compared with is no finer run of a solver: in one dimension the probability flow keeps
quantiles, so that where a sample ends is known (`Mixture.flow`).
"""

import math

import pytest
import torch

from fastlora.samplers import Grid, ddim, dpm_solver, euler, flow_euler, sample
from fastlora.samplers.continuous import cosine_log_snr, karras, linear_log_snr
from fastlora.samplers.sde import VE, VP, SubVP
from fastlora.samplers.solvers.flow import flow_heun
from fastlora.samplers.solvers.heun import heun
from fastlora.samplers.solvers.score import predictor_corrector, probability_flow
from fastlora.samplers.solvers.unipc import unipc
from tests.samplers.exact import Mixture

DATA = Mixture()
X = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]


def even(n):
    """Even in lambda, which is what h measures."""
    return linear_log_snr(n, -10.0, 8.0, clean=False)


def cosine(n):
    return cosine_log_snr(n, -10.0, 8.0, clean=False)


def edm(n):
    return karras(n, 0.02, 80.0, clean=False)


def straight(n):
    sigma = torch.linspace(0.98, 0.02, n + 1, dtype=torch.float64)
    return Grid.through(sigma[:-1], 1 - sigma, sigma)


def on(levels, solver, **options):
    def make(n):
        grid = levels(n)
        return grid, solver(grid, **options)

    return make


def in_time(sde, end, solver=probability_flow, **options):
    def make(n):
        table = solver(sde, n, end=end, denoise=False, **options)
        return sde.grid(n, end, clean=False), table

    return make


SOLVERS = {
    "DDIM": (on(even, ddim), 1),
    "DDIM, cosine": (on(cosine, ddim), 1),
    "DDIM, v prediction": (on(even, ddim, prediction="v"), 1),
    "Euler": (on(edm, euler), 1),
    "Heun": (on(edm, heun), 2),
    "Heun, x0 prediction": (on(edm, heun, prediction="x0"), 2),
    "flow-matching Euler": (on(straight, flow_euler), 1),
    "flow-matching Heun": (on(straight, flow_heun), 2),
    "DPM-Solver++ 1S": (on(even, dpm_solver, order=1), 1),
    "DPM-Solver++ 2M": (on(even, dpm_solver), 2),
    "DPM-Solver++ 2M, Karras": (on(edm, dpm_solver), 2),
    "DPM-Solver++ 2M, heun": (on(even, dpm_solver, solver_type="heun"), 2),
    "DPM-Solver 2M": (on(even, dpm_solver, algorithm="dpmsolver"), 2),
    # Not 3: as it is published and used, half of the second derivative's term is missing.
    "DPM-Solver++ 3M": (on(even, dpm_solver, order=3), 2),
    "UniPC 1": (on(even, unipc, order=1), 2),  # the corrector is one order better
    "UniPC 2": (on(even, unipc), 3),
    "UniPC 2, bh1": (on(even, unipc, solver_type="bh1"), 3),
    "probability flow of VP": (in_time(VP(), 0.01), 1),
    "probability flow of sub-VP": (in_time(SubVP(), 0.05), 1),
    "probability flow of VE": (in_time(VE(), 0.1), 1),
    "probability flow, discretised as the predictor": (
        in_time(VP(), 0.01, predictor_corrector, corrector_steps=0, predictor="probability_flow"),
        1,
    ),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_order(solver):
    make, order = SOLVERS[solver]
    errors = []
    for n in (60, 120):
        grid, table = make(n)
        x = X * table.init_noise_sigma
        start = grid.alpha[0], grid.sigma[0]
        end = grid.alpha_next[-1], grid.sigma_next[-1]
        samples = sample(DATA.model(grid, table.prediction), table, X, progress=False)
        assert samples.dtype == torch.float64
        errors.append((samples - DATA.flow(x, start, end)).abs().max().item())
    assert errors[1] < 0.2  # VE, whose 120 steps go from 50 to 0.02, has the largest
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)
