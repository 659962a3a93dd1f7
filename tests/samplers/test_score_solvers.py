"""Score-based solvers and Langevin dynamics: their rows, beside the papers and other code."""

import math
from dataclasses import replace

import pytest
import torch

from fastlora.ops import _philox
from fastlora.samplers import Schedule, ddpm, noise, sample
from fastlora.samplers.continuous import geometric, karras, linear_log_snr
from fastlora.samplers.grid import grid_of, strided
from fastlora.samplers.sde import VE, VP, SubVP
from fastlora.samplers.solvers.consistency import consistency
from fastlora.samplers.solvers.langevin import annealed_langevin, langevin
from fastlora.samplers.solvers.log_snr_ancestral import log_snr_ancestral
from fastlora.samplers.solvers.score import predictor_corrector, probability_flow, reverse_sde
from tests.samplers.exact import Mixture, network

SDES = [VE(), VP(), SubVP()]
each_sde = pytest.mark.parametrize("sde", SDES, ids=["VE", "VP", "SubVP"])


def drawn(seeds, step, x):
    """The noise of one row: what `sampler_step` draws."""
    return _philox.normal(torch.tensor(seeds), torch.tensor(step), x[0].numel(), x.dtype).view(
        x.shape
    )


# --- beside the paper's algorithms and other code -------------------------------------------------


def euler_maruyama_by_hand(sde, steps, end, x, seeds, ode):
    """The paper's update with the formulas of each SDE, written out once more."""
    t = torch.linspace(1, end, steps + 1, dtype=torch.float64).tolist()
    for i, (now, then) in enumerate(zip(t[:-1], t[1:], strict=True)):
        dt = then - now
        if isinstance(sde, VE):
            sigma = 0.01 * 5000**now
            told, f, square = sigma, 0.0, sigma**2 * 2 * math.log(5000)
        else:
            beta, B = 0.1 + 19.9 * now, 0.1 * now + 9.95 * now**2
            told, f, square = now, -beta / 2, beta
            if isinstance(sde, SubVP):
                square = beta * (1 - math.exp(-2 * B))
        score = network(x, torch.tensor([told]))
        x = x + dt * (f * x - square * score / (2 if ode else 1))
        if not ode:
            x = x + math.sqrt(square * -dt) * drawn(seeds, i, x)
    return x


@each_sde
@pytest.mark.parametrize("ode", [True, False], ids=["probability_flow", "reverse_sde"])
def test_euler_in_time(sde, ode):
    seeds, steps, end = [3, 4], 20, 0.01
    x = noise(seeds, (6,)).double()
    table = (probability_flow if ode else reverse_sde)(sde, steps, end=end, denoise=False)
    result = sample(network, table, x, seeds=seeds, progress=False)
    expected = euler_maruyama_by_hand(sde, steps, end, x * table.init_noise_sigma, seeds, ode)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)  # t is told as float32
    assert table.stochastic is not ode


def test_reverse_sde_like_diffusers():
    """One step of 1/N from t = 1 is what their scheduler for VP does; it takes eps."""
    pytest.importorskip("diffusers")
    from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

    scheduler = ScoreSdeVpScheduler()
    scheduler.set_timesteps(50)
    x, t = torch.linspace(-2, 2, 12).view(2, 6), torch.ones(2)
    theirs = scheduler.step_pred(network(x, t), x, t, torch.Generator().manual_seed(1))[0]
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    row = reverse_sde(VP(), 1, "epsilon", end=1 - 1 / 50, denoise=False)
    c_x, c_e, c_n = (row.column(name).item() for name in ("c_x", "c_e", "c_n"))
    torch.testing.assert_close(c_x * x + c_e * network(x, t) + c_n * z, theirs)


def test_predictor_like_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    scheduler.set_timesteps(30)
    scheduler.set_sigmas(30)
    x, t = torch.linspace(-90, 90, 12).view(2, 6), torch.ones(2)
    score = network(x, t)
    theirs = scheduler.step_pred(score, 1.0, x, torch.Generator().manual_seed(1)).prev_sample
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    table = predictor_corrector(geometric(30), prediction="score", corrector_steps=0)
    c_x, c_e, c_n = (table.column(name)[0].item() for name in ("c_x", "c_e", "c_n"))
    torch.testing.assert_close(c_x * x + c_e * score + c_n * z, theirs, rtol=1e-5, atol=1e-4)


def test_corrector_like_diffusers():
    """Their step size has the norms of one batch; with d large and the exact score of noise alone
    those are what is expected of them."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.ScoreSdeVeScheduler(snr=0.16)
    scheduler.set_timesteps(3)
    sigma, d = geometric(3).sigma[1].item(), 1 << 18
    x = sigma * noise([1], (d,))
    score = -x / sigma**2
    theirs = scheduler.step_correct(score, x, torch.Generator().manual_seed(1)).prev_sample
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    table = predictor_corrector(geometric(3), prediction="score", snr=0.16)
    assert table.timesteps[1] == sigma
    c_x, c_e, c_n = (table.column(name)[1].item() for name in ("c_x", "c_e", "c_n"))
    scale = theirs.abs().max().item()
    torch.testing.assert_close(c_x * x + c_e * score + c_n * z, theirs, rtol=0, atol=2e-3 * scale)


def test_predictor_corrector_algorithm_3():
    """VP with discrete betas, as the paper has it (s is the score, its last step a mean)."""
    N, M, snr, seeds = 100, 2, 0.16, [5, 6]
    schedule = Schedule.linear(N, 1e-3, 0.2)
    table = predictor_corrector(schedule, N, "score", corrector_steps=M, snr=snr)
    assert len(table) == N + (N - 1) * M
    x = noise(seeds, (5,)).double()
    expected, row = x, 0
    betas = torch.linspace(1e-3, 0.2, N, dtype=torch.float64).tolist()
    abar = torch.cumprod(1 - torch.tensor(betas).double(), 0).tolist()
    for i in range(N - 1, 0, -1):
        score = network(expected, torch.tensor([i]))
        mean = (2 - math.sqrt(1 - betas[i])) * expected + betas[i] * score
        expected = mean + math.sqrt(betas[i]) * drawn(seeds, row, x)
        row += 1
        for _ in range(M):
            score = network(expected, torch.tensor([i - 1]))
            e = 2 * (1 - betas[i - 1]) * (snr * math.sqrt(1 - abar[i - 1])) ** 2
            expected = expected + e * score + math.sqrt(2 * e) * drawn(seeds, row, x)
            row += 1
    score = network(expected, torch.tensor([0]))
    expected = (expected + (1 - abar[0]) * score) / math.sqrt(abar[0])  # Tweedie's formula
    result = sample(network, table, x, seeds=seeds, progress=False)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_annealed_langevin_of_the_paper():
    sigmas, T, eps, seeds = geometric(8, 0.01, 1.0).sigma, 3, 2e-3, [1, 2]
    x = noise(seeds, (5,)).double()
    # Song and Ermon (2019) write a/2: so half of their step size
    table = annealed_langevin(geometric(8, 0.01, 1.0), steps_per_level=T, step_size=eps / 2)
    assert len(table) == 8 * T + 1 and table.timesteps.tolist() == [
        s for s in sigmas.tolist() for _ in range(T)
    ] + [sigmas[-1].item()]
    expected, row = x, 0
    for sigma in sigmas.tolist():
        alpha = eps * sigma**2 / 0.01**2
        for _ in range(T):
            score = network(expected, torch.tensor([sigma]))
            expected = expected + alpha / 2 * score + math.sqrt(alpha) * drawn(seeds, row, x)
            row += 1
    expected = expected + 0.01**2 * network(expected, torch.tensor([0.01]))
    result = sample(network, table, x, seeds=seeds, progress=False)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


# --- rows ---------------------------------------------------------------------------------------


def on(grid, solver, **options):
    return solver(grid, **options), grid


SOLVERS = {
    "probability_flow": lambda p: (probability_flow(SubVP(), 9, p), SubVP().grid(9)),
    "reverse_sde": lambda p: (reverse_sde(VP(), 9, p), VP().grid(9)),
    "reverse_sde of VE": lambda p: (reverse_sde(VE(0.05, 5.0), 9, p), VE(0.05, 5.0).grid(9)),
    "predictor_corrector": lambda p: (predictor_corrector(SubVP(), 9, p), SubVP().grid(9)),
    "annealed_langevin": lambda p: on(
        geometric(4, 0.05, 5.0), annealed_langevin, prediction=p, step_size=1e-4
    ),
    "annealed_langevin on a schedule": lambda p: (
        annealed_langevin(Schedule.linear(), 4, prediction=p, step_size=1e-4),
        grid_of(Schedule.linear(), 4).exploding(),
    ),
    "log_snr_ancestral": lambda p: on(linear_log_snr(9, -8, 8), log_snr_ancestral, prediction=p),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_predictions_are_one(solver):
    """Whatever the exact model predicts, samples are the same, also where alpha^2 + sigma^2 is not
    1 (sub-VP, VE) and where the model sees scaled inputs."""
    x, results = noise([1, 2], (7,)).double(), {}
    for prediction in ("score", "epsilon", "x0", "flow", "v"):
        table, grid = SOLVERS[solver](prediction)
        data = Mixture()
        if (grid.input_scale == 1).all():
            model = data.model(grid, prediction)
        else:
            model = preserving_model(data, grid, prediction)
        results[prediction] = sample(model, table, x, seeds=[1, 2], progress=False)
    for prediction, result in results.items():
        torch.testing.assert_close(result, results["score"], msg=prediction, rtol=1e-6, atol=1e-6)


def preserving_model(data, grid, prediction):
    """A model of `a x0 + s eps`, a = input_scale, on the exploding grid of it."""
    own = replace(
        grid, alpha=grid.input_scale, sigma=grid.input_scale * grid.sigma,
        input_scale=torch.ones_like(grid.sigma),
    )  # fmt: skip
    return data.model(own, prediction)


@each_sde
def test_the_last_step_denoises(sde):
    """Tweedie's formula: (x + sigma^2 s)/alpha at the last level, and no noise."""
    for solver in (probability_flow, reverse_sde, predictor_corrector):
        table, t = solver(sde, 5, prediction="score"), torch.tensor(sde.end, dtype=torch.float64)
        alpha, sigma = sde.alpha(t).item(), sde.sigma(t).item()
        columns = [table.column(name)[-1].item() for name in ("c_x", "c_e", "c_n")]
        assert columns == pytest.approx([1 / alpha, sigma**2 / alpha, 0], rel=1e-12)
        arrives = [table.column(name)[-1].item() for name in ("p_0", "p_e")]
        assert arrives == [1, 0]


def test_where_rows_arrive():
    """A corrector's row stays at its level: what is known there (inpainting) has its noise."""
    grid = geometric(4, 0.1, 10.0)
    table = predictor_corrector(grid, prediction="score", corrector_steps=2)
    levels = grid.sigma.tolist()
    visited = [levels[0]] + [level for level in levels[1:] for _ in range(3)]
    assert table.timesteps.tolist() == visited
    assert table.column("p_e").tolist() == [s for s in levels[1:] for _ in range(3)] + [0.0]
    walk = annealed_langevin(grid, steps_per_level=2)
    assert walk.column("p_e").tolist() == [s for s in levels for _ in range(2)] + [0.0]


@pytest.mark.parametrize(("v", "variance"), [(0.0, "small"), (1.0, "large")])
def test_log_snr_ancestral_is_ddpm_at_both_ends(v, variance):
    """On a schedule; the last step alone differs: here it never has noise."""
    ours = log_snr_ancestral(Schedule.cosine(), 20, v, spacing="trailing")
    theirs = ddpm(Schedule.cosine(), 20, spacing="trailing", variance=variance)
    torch.testing.assert_close(
        ours.coefficients[:-1], theirs.coefficients[:-1], rtol=1e-9, atol=1e-9
    )
    assert ours.column("c_n")[-1] == 0


@pytest.mark.parametrize("solver", [log_snr_ancestral, predictor_corrector])
def test_from_an_snr_of_zero(solver):
    """With v prediction, whose x0 is -v there: one data point is found from noise alone."""
    schedule, point = Schedule.scaled_linear().zero_terminal_snr(), 0.7
    table = solver(schedule, 10, prediction="v", spacing="trailing")

    def model(x, t, cond):
        alpha, sigma = schedule.alpha[t[0]], schedule.sigma[t[0]]
        return alpha * (x - alpha * point) / sigma - sigma * point

    result = sample(model, table, noise([1], (5,)).double(), seeds=[1], progress=False)
    torch.testing.assert_close(result, torch.full_like(result, point), rtol=0, atol=1e-12)


# --- bad arguments --------------------------------------------------------------------------------

RISING = replace(karras(3), sigma_next=karras(3).sigma * 2)
APART = strided(Schedule.linear(), 7, "linspace")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: probability_flow(VP(), 0), "VP: steps: expected an int >= 1, got 0"),
        (lambda: reverse_sde(VP(), end=2), r"VP: end: expected a number in \(0, 1\), got 2"),
        (lambda: reverse_sde(VP(), prediction="eps"), "reverse_sde: prediction: expected one of"),
        (
            lambda: predictor_corrector(VP(), predictor="heun"),
            "predictor_corrector: predictor: expected one of .*, got 'heun'",
        ),
        (
            lambda: predictor_corrector(VP(), corrector_steps=-1),
            "predictor_corrector: corrector_steps: expected an int >= 0, got -1",
        ),
        (lambda: predictor_corrector(VP(), snr=0), "predictor_corrector: snr: .* > 0, got 0"),
        (
            lambda: predictor_corrector(karras(3), predictor="euler_maruyama"),
            "predictor_corrector: predictor: expected an SDE for euler_maruyama, got a Grid",
        ),
        (
            lambda: predictor_corrector(karras(3), denoise=False),
            "predictor_corrector: denoise: expected for an SDE alone, got it for a Grid",
        ),
        (
            lambda: predictor_corrector(Schedule.linear(), end=0.1),
            "predictor_corrector: end: expected for an SDE alone, got it for a Schedule",
        ),
        (lambda: predictor_corrector(karras(3), 4), "predictor_corrector: steps: expected none"),
        (lambda: predictor_corrector(APART), "predictor_corrector: schedule: .* its next level"),
        (
            lambda: predictor_corrector(RISING, corrector_steps=0),
            "predictor_corrector: schedule: ",
        ),
        (lambda: log_snr_ancestral(karras(3), v=1.5), "log_snr_ancestral: v: .* 0 to 1, got 1.5"),
        (lambda: log_snr_ancestral(RISING), "log_snr_ancestral: schedule: .* rises at every step"),
        (lambda: langevin(0, 5), "langevin: step_size: expected a number > 0, got 0"),
        (lambda: langevin(0.1, 0), "langevin: steps: expected an int >= 1, got 0"),
        (lambda: langevin(0.1, 5, sigma=-1), "langevin: sigma: expected a number > 0, got -1"),
        (
            lambda: annealed_langevin(karras(3), steps_per_level=0),
            "annealed_langevin: steps_per_level: expected an int >= 1, got 0",
        ),
        (
            lambda: annealed_langevin(karras(3), step_size=math.nan),
            "annealed_langevin: step_size: expected a number > 0, got nan",
        ),
        (
            lambda: annealed_langevin(Schedule.linear().zero_terminal_snr(), spacing="trailing"),
            "Grid: exploding: expected alpha > 0",
        ),
        (lambda: consistency([]), "consistency: sigmas: expected numbers that fall"),
        (lambda: consistency([1.0, 2.0]), "consistency: sigmas: expected numbers that fall"),
        (lambda: consistency([1.0, 0.001]), "consistency: sigmas: .* none below sigma_min = 0.002"),
        (lambda: consistency([math.inf, 1.0]), "consistency: sigmas: .* got .inf, 1.0"),
        (lambda: consistency(["a"]), "consistency: sigmas: .*, got .nan"),
        (lambda: consistency(VP().grid(3)), "consistency: sigmas: expected a Grid with alpha = 1"),
        (lambda: consistency([1.0], sigma_data=0), "consistency: sigma_data: .* > 0, got 0"),
        (lambda: consistency([1.0], clip=-1), "consistency: clip: expected a positive number"),
    ],
    ids=range(28),
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: reverse_sde(karras(3)),
            "reverse_sde: sde: expected an SDE such as .*, got a Grid",
        ),
        (lambda: probability_flow("vp"), "probability_flow: sde: expected an SDE .*, got a str"),
        (lambda: predictor_corrector(None), "predictor_corrector: schedule: .*, got None"),
        (lambda: log_snr_ancestral(VP()), "log_snr_ancestral: schedule: .*, got a VP"),
        (lambda: annealed_langevin([1.0]), "annealed_langevin: schedule: .*, got a list of 1"),
        (lambda: consistency("80"), "consistency: sigmas: expected a Grid or numbers, got a str"),
        (lambda: consistency(80.0), "consistency: sigmas: expected a Grid or numbers, got a float"),
    ],
    ids=range(7),
)
def test_wrong_kinds(make, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        make()
