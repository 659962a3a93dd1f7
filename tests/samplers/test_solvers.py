"""Solvers called by name: exact models, agreement with configurations, and what they refuse."""

import math

import pytest
import torch

from fastlora import samplers
from fastlora.samplers import (
    Grid,
    Schedule,
    ddim,
    ddim_inversion,
    ddpm,
    dpm_solver,
    euler,
    euler_ancestral,
    flow_euler,
    flow_heun,
    heun,
    lcm,
    noise,
    sample,
    table_from_config,
    unipc,
)
from fastlora.samplers.grid import listed, strided
from fastlora.samplers.levels import euler_grid, flow, flow_grid, multistep_grid
from fastlora.samplers.solvers.lcm import distilled
from fastlora.samplers.table import EPS, X0, Combination, H, R, Table, X

SD = Schedule.scaled_linear()
X_0 = torch.linspace(-2, 2, 12).double().view(1, 12)


def exact(grid, prediction):
    """The model of one data point, on a grid that has each timestep once."""
    levels = {
        t: (a, s, m)
        for t, a, s, m in zip(
            *(v.tolist() for v in (grid.timesteps, grid.alpha, grid.sigma, grid.input_scale)),
            strict=True,
        )
    }

    def model(x, t, cond):
        alpha, sigma, scale = levels[t[0].item()]
        a, s = alpha * scale, sigma * scale
        eps = (x - a * X_0) / s
        return {
            "epsilon": eps,
            "x0": X_0.expand_as(x),
            "v": a * eps - s * X_0,
            "flow": eps - X_0,
            "score": -eps / s,
        }[prediction]

    return model


FLOW = flow(torch.tensor([900, 500, 100]), torch.tensor([0.9, 0.5, 0.1, 0.0]).double())
SOLVERS = {
    "ddim": (ddim, strided(SD, 9)),
    "ddim, eta": (lambda g, **o: ddim(g, eta=1.0, **o), strided(SD, 9)),
    "ddpm": (ddpm, listed(SD, [999, 700, 300, 0])),
    "ddpm, large": (lambda g, **o: ddpm(g, variance="large", **o), listed(SD, [999, 300, 0])),
    "euler": (euler, euler_grid(SD, 9)),
    "euler_ancestral": (euler_ancestral, euler_grid(SD, 9)),
    "heun": (heun, euler_grid(SD, 9, sigmas="karras")),
    "dpm_solver": (dpm_solver, multistep_grid(SD, 20)),
    "dpm_solver, 3": (lambda g, **o: dpm_solver(g, order=3, **o), multistep_grid(SD, 20)),
    "dpm_solver, sde": (
        lambda g, **o: dpm_solver(g, algorithm="sde-dpmsolver++", **o),
        multistep_grid(SD, 20),
    ),
    "unipc": (unipc, multistep_grid(SD, 9)),
    "flow_euler": (flow_euler, flow_grid(9, 3.0)),
    "flow_euler, stochastic": (lambda g, **o: flow_euler(g, stochastic=True, **o), flow_grid(9)),
    "flow_heun": (flow_heun, flow_grid(9, 3.0)),
    "heun on a flow": (heun, flow_grid(9, 3.0)),
    "unipc on a flow": (unipc, FLOW),
    "dpm_solver on a flow": (dpm_solver, FLOW),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow", "score"])
@pytest.mark.parametrize("name", SOLVERS)
def test_exact_model_recovers_x0(name, prediction):
    """With what is true of one data point every sampling ends on it, noise or not."""
    make, grid = SOLVERS[name]
    if prediction in ("epsilon", "score") and grid.alpha[0] == 0:
        with pytest.raises(ValueError, match="where the SNR is 0"):
            make(grid, prediction=prediction)
        return
    table = make(grid, prediction=prediction)
    assert table.prediction == prediction
    x = noise([1], (12,)).double()
    samples = sample(exact(grid, prediction), table, x, seeds=[1], progress=False)
    torch.testing.assert_close(samples, X_0, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("table", "name", "options", "steps"),
    [
        (ddim(SD, 9), "DDIM", {"clip_sample": False}, 9),
        (ddim_inversion(SD, 9), "DDIMInverse", {"clip_sample": False}, 9),
        (ddpm(SD, 9, clip=1.0), "DDPM", {}, 9),
        (
            ddpm(SD, variance="large"),
            "DDPM",
            {"clip_sample": False, "variance_type": "fixed_large"},
            1000,
        ),
        (euler(SD, 9, spacing="trailing"), "EulerDiscrete", {"timestep_spacing": "trailing"}, 9),
        (euler(SD, 9, sigmas="karras"), "EulerDiscrete", {"use_karras_sigmas": True}, 9),
        (euler_ancestral(SD, 9), "EulerAncestralDiscrete", {}, 9),
        (heun(SD, 9, sigmas="exponential"), "HeunDiscrete", {"use_exponential_sigmas": True}, 9),
        (dpm_solver(SD, 20, order=3), "DPMSolverMultistep", {"solver_order": 3}, 20),
        (dpm_solver(SD, 9, sigmas="karras"), "DPMSolverMultistep", {"use_karras_sigmas": True}, 9),
        (
            dpm_solver(SD, 9, algorithm="dpmsolver"),
            "DPMSolverMultistep",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            9,
        ),
        (unipc(SD, 9), "UniPCMultistep", {}, 9),
        (
            unipc(SD, 9, predict_x0=False),
            "UniPCMultistep",
            {"predict_x0": False, "final_sigmas_type": "sigma_min"},
            9,
        ),
        (lcm(SD), "LCM", {}, 4),
        (flow_euler(9), "FlowMatchEulerDiscrete", {}, 9),
        (flow_heun(9), "FlowMatchHeunDiscrete", {}, 9),
    ],
    ids=lambda value: value.name if isinstance(value, Table) else "",
)
def test_like_their_configurations(table, name, options, steps):
    sd = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config = {"_class_name": f"{name}Scheduler", **({} if "Flow" in name else sd), **options}
    other = table_from_config(config, steps)
    torch.testing.assert_close(table.coefficients, other.coefficients, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(table.timesteps, other.timesteps, check_dtype=False)
    assert table.init_noise_sigma == pytest.approx(other.init_noise_sigma)
    assert table.input_scale == pytest.approx(other.input_scale)


def test_inversion_and_back():
    """Of a Gaussian with its exact eps: the way back ends nearer, the smaller the steps are."""
    schedule = Schedule.cosine()
    spread = 0.5

    def model(x, t, cond):
        alpha, sigma = schedule.alpha[t][:, None], schedule.sigma[t][:, None]
        return sigma * x / (alpha**2 * spread**2 + sigma**2)

    errors = []
    for steps in (25, 50, 100, 200):
        latents = sample(model, ddim_inversion(schedule, steps), X_0, progress=False)
        back = sample(model, ddim(schedule, steps), latents, progress=False)
        errors.append((back - X_0).abs().max().item())
    assert errors[0] < 0.5 and all(b < 0.6 * a for a, b in zip(errors, errors[1:], strict=False))


def test_ancestral_steps_are_noise_of_the_right_size():
    """sigma_up^2 + sigma_down^2 = sigma'^2, eta 0 is Euler's."""
    table, grid = euler_ancestral(SD, 9, eta=0.7), euler_grid(SD, 9)
    up, down = table.column("c_n"), table.column("c_e") + grid.sigma
    torch.testing.assert_close(up**2 + down**2, grid.sigma_next**2)
    full = euler_ancestral(SD, 9).column("c_n")
    torch.testing.assert_close(up, 0.7 * full)
    assert torch.equal(euler_ancestral(SD, 9, eta=0.0).coefficients, euler(SD, 9).coefficients)


def test_ddpm_variances():
    """The best of data at one point, and of data N(0, 1), by their closed forms."""
    for variance in ("small", "large"):
        table = ddpm(SD, 1000, variance=variance)
        beta = 1 - SD.alphas_cumprod[500] / SD.alphas_cumprod[499]
        if variance == "small":
            beta = beta * (1 - SD.alphas_cumprod[499]) / (1 - SD.alphas_cumprod[500])
        assert table.column("c_n")[999 - 500].item() == pytest.approx(math.sqrt(beta.item()))
        assert table.column("c_n")[-1] == 0


def test_distilled_timesteps():
    assert distilled(1000, 4).tolist() == [999, 759, 499, 259]
    assert distilled(1000, 50, 50).tolist() == list(range(999, 0, -20))


def test_since():
    table = euler(SD, 9)
    later = table.since(4)
    assert torch.equal(later.coefficients, table.coefficients[4:])
    assert torch.equal(later.timesteps, table.timesteps[4:])
    sigma = euler_grid(SD, 9).sigma[4].item()
    assert later.input_scale == pytest.approx(1 / math.sqrt(sigma**2 + 1))
    assert later.init_noise_sigma == 1 and table.since(0) is table
    for begin in (-1, 9, 1.5, None):
        with pytest.raises(ValueError, match="begin: expected an int from 0 to 8, got"):
            table.since(begin)


def test_combinations():
    a = X * 2.0 + X0 * torch.tensor([1.0, 2.0]) - EPS * 3.0 + (H - R) * 0.5
    b = Combination(2.0, torch.tensor([1.0, 2.0]), -3.0, 0.5, -0.5)
    for part in ("x", "x0", "eps", "h", "r"):
        assert torch.equal(*(torch.as_tensor(getattr(c, part)).expand(2) for c in (a, b)))


@pytest.mark.parametrize(
    ("solver", "histories", "stochastic"),
    [
        (lambda: ddpm(SD, 9), 0, True),
        (lambda: heun(SD, 9), 1, False),
        (lambda: dpm_solver(SD, 9), 1, False),
        (lambda: dpm_solver(SD, 9, order=1), 0, False),
        (lambda: dpm_solver(SD, 20, order=3), 2, False),
        (lambda: dpm_solver(SD, 20, algorithm="sde-dpmsolver++"), 1, True),
        (lambda: unipc(SD, 9), 2, False),
        (lambda: lcm(SD), 0, True),
        (lambda: flow_euler(9), 0, False),
    ],
)
def test_what_is_remembered(solver, histories, stochastic):
    table = solver()
    assert (table.histories, table.stochastic) == (histories, stochastic)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ddpm(SD, variance="best"), "ddpm: variance: expected small or large, got 'best'"),
        (lambda: euler_ancestral(SD, eta=2), "euler_ancestral: eta: expected a number from 0 to 1"),
        (lambda: euler(SD, 9, sigmas="even"), "ramp: name: expected one of karras, "),
        (
            lambda: euler(euler_grid(SD, 9), 8),
            "euler: steps: expected none beside a Grid, which has 9",
        ),
        (lambda: heun(strided(SD, 9)), "heun: schedule: expected a Grid with alpha = 1, as"),
        (
            lambda: heun(listed(Schedule(torch.tensor([1.0])), [0]).exploding()),
            "heun: schedule: expec",
        ),
        (
            lambda: ddim_inversion(strided(SD, 9)),
            "expected steps towards noise, got one towards data",
        ),
        (lambda: ddim_inversion(SD, 9, "x0"), "predicted data says nothing about eps"),
        (lambda: dpm_solver(SD, 9, order=2.5), "dpm_solver: order: expected 1, 2 or 3, got 2.5"),
        (
            lambda: dpm_solver(SD, 9, algorithm="x"),
            "dpm_solver: algorithm: expected one of dpmsolver",
        ),
        (
            lambda: dpm_solver(SD, 9, solver_type="x"),
            "dpm_solver: solver_type: expected one of mid",
        ),
        (lambda: dpm_solver(SD, 9, clip=1.0, threshold=(0.9, 2.0)), "threshold: expected None or"),
        (
            lambda: dpm_solver(multistep_grid(SD, 9), algorithm="dpmsolver"),
            "final: expected sigma_min",
        ),
        (lambda: unipc(SD, 9, order=3), "unipc: order: expected 1 or 2, got 3"),
        (lambda: unipc(SD, 9, solver_type="bh3"), "unipc: solver_type: expected bh1 or bh2"),
        (
            lambda: unipc(SD, 9, predict_x0=False, clip=1.0),
            "unipc: threshold: expected None without",
        ),
        (lambda: unipc(multistep_grid(SD, 9), predict_x0=False), "expected a last sigma above 0"),
        (lambda: unipc(flow_grid(9), prediction="flow"), "unipc: schedule: expected levels"),
        (
            lambda: dpm_solver(flow_grid(9), prediction="flow"),
            "dpm_solver: schedule: expected levels",
        ),
        (lambda: lcm(SD, 60), "lcm: steps: expected an int from 1 to original_steps = 50, got 60"),
        (lambda: lcm(SD, original_steps=0), "lcm: original_steps: expected an int from 1 to"),
        (lambda: flow_euler(0), "steps: expected an int >= 1, got 0"),
        (
            lambda: flow_euler(flow_grid(9), shift=2.0),
            "flow_euler: shift: expected none beside a Grid",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "solver", [ddpm, euler, euler_ancestral, heun, dpm_solver, unipc, ddim_inversion], ids=str
)
def test_what_is_no_schedule(solver):
    with pytest.raises(TypeError, match="schedule: expected a Schedule or a Grid, got a str"):
        solver("cosine", 9)


@pytest.mark.parametrize("grid", [None, "9", 2.5], ids=str)
def test_what_is_no_flow(grid):
    with pytest.raises(TypeError, match="flow_heun: grid: expected a Grid or a number of steps"):
        flow_heun(grid)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("algorithm", "order"),
    [(a, n) for a in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++") for n in (1, 2, 3)]
    + [("sde-dpmsolver", 1), ("sde-dpmsolver", 2)],
)
def test_a_last_step_that_repeats_its_level_stays_there(algorithm, order, solver_type):
    alpha = torch.tensor([0.2, 0.5, 0.8, 0.95, 0.99, 0.99]).double()
    grid = Grid.through(torch.tensor([900, 600, 300, 100, 0]), alpha, (1 - alpha**2).sqrt())
    options = {"order": order, "algorithm": algorithm, "solver_type": solver_type}
    table = dpm_solver(grid, **options, lower_order_final=False)
    row = {name: table.column(name)[-1].item() for name in ("c_x", "c_e", "c_h", "c_r", "c_n")}
    assert row == pytest.approx({"c_x": 1, "c_e": 0, "c_h": 0, "c_r": 0, "c_n": 0}, abs=1e-12)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_adds_noise_where_a_model_is_told_0_in_the_middle(variance):
    grid = samplers.linear_log_snr(5)  # told -20, -10, 0, 10, 20
    c_n = ddpm(grid, prediction="v", variance=variance).column("c_n")
    if variance == "small":  # DDPM's posterior is Algorithm 2 with v = 0
        theirs = samplers.log_snr_ancestral(grid, v=0.0, prediction="v").column("c_n")
        torch.testing.assert_close(c_n, theirs)
    assert bool((c_n[:4] > 0).all())


def test_a_table_shows_its_rows():
    lines = str(ddim(Schedule.linear(), 3)).splitlines()
    assert lines[0].startswith("Table ddim(steps=3") and lines[1].split()[:3] == [
        *("timestep", "k_x", "k_e")
    ]
    assert [line.split()[0] for line in lines[2:]] == ["666", "333", "0"]
    assert len(str(dpm_solver(Schedule.linear(), 50)).splitlines()) == 2 + 8
