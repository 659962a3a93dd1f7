"""Schedules, grids and tables are float64 on the CPU, whatever the defaults of torch are."""

import dataclasses

import pytest
import torch

import fastlora.samplers as fs
from fastlora.samplers import Grid, Schedule, levels
from fastlora.samplers.grid import spaced
from fastlora.samplers.options import DEFAULTS

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def sd():
    return Schedule.scaled_linear(100)


def configured(name, make=fs.table_from_config, steps=5, **options):
    betas = {} if name in FLOW else BETAS
    return make(betas | options | {"_class_name": name}, steps)


def sampled() -> torch.Tensor:
    """Guidance, a preview, noise: all of it where x is."""
    x = torch.linspace(-1, 1, 8, device="cpu", dtype=torch.float32).view(2, 4)
    cond, uncond = torch.ones_like(x), torch.zeros_like(x)

    def model(x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return (x + cond).sin()

    table = fs.ddim(sd(), 3, eta=1.0)
    steps = [*fs.sample_steps(model, table, x, cond, uncond, 2.0, [1, 2], guidance_rescale=0.5)]
    return torch.stack([t for step in steps for t in (step.x, step.x0())])


MADE = {
    "linear": lambda: Schedule.linear(50),
    "scaled_linear": sd,
    "cosine": lambda: Schedule.cosine(50),
    "sigmoid": lambda: Schedule.sigmoid(50),
    "laplace": lambda: Schedule.laplace(50),
    "exponential": lambda: Schedule.exponential(50),
    "from_betas": lambda: Schedule.from_betas(torch.tensor([0.25, 0.5], device="cpu")),
    "zero_terminal_snr": lambda: sd().zero_terminal_snr(),
    "alpha": lambda: [sd().alpha, sd().sigma, sd().log_snr, sd().noise_table("score")],
    "spaced": lambda: [spaced(100, 7, s) for s in ("leading", "trailing", "linspace")],
    "grid_of": lambda: fs.grid_of(sd(), 7, "trailing"),
    "strided": lambda: fs.strided(sd(), 7),
    "listed": lambda: fs.listed(sd(), [99, 60, 3]),
    "exploding": lambda: fs.grid_of(sd(), 7).exploding(),
    "readings": lambda: [p for k in ("v", "flow", "x0") for p in fs.grid_of(sd(), 7).readings(k)],
    "euler_grid": lambda: [fs.euler_grid(sd(), 5, s) for s in ("linspace", "leading", "trailing")],
    "multistep_grid": lambda: fs.multistep_grid(sd(), 5, sigmas="karras"),
    "flow_grid": lambda: fs.flow_grid(5, 3.0),
    "ramp": lambda: levels.ramp("exponential", 10.0, 0.1, 5),
    "karras": lambda: fs.karras(5),
    "geometric": lambda: fs.geometric(5, clean=False),
    "cosine_log_snr": lambda: fs.cosine_log_snr(5),
    "linear_log_snr": lambda: fs.linear_log_snr(5, clean=False),
    "VE": lambda: [fs.VE().grid(5), fs.VE().times(4)],
    "VP": lambda: fs.VP().grid(5, clean=False),
    "SubVP": lambda: fs.SubVP().grid(5),
    "ddim": lambda: fs.ddim(sd(), 5, eta=0.5, clip=1.0, rederive=True),
    "ddim_inversion": lambda: fs.ddim_inversion(sd(), 5),
    "dpm_solver": lambda: [
        fs.dpm_solver(sd(), 5, algorithm=a, order=2)
        for a in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
    ],
    "dpm_solver_3": lambda: fs.dpm_solver(sd(), 20, order=3, begin=4, sigmas="lu"),
    "euler": lambda: fs.euler(sd(), 5, sigmas="karras", threshold=(0.9, 2.0)),
    "euler_ancestral": lambda: fs.euler_ancestral(sd(), 5),
    "heun": lambda: fs.heun(sd(), 5),
    "flow_euler": lambda: [fs.flow_euler(5, shift=3.0), fs.flow_euler(5, stochastic=True)],
    "flow_heun": lambda: fs.flow_heun(5),
    "unipc": lambda: fs.unipc(sd(), 5, disable_corrector=[1]),
    "ddpm": lambda: [fs.ddpm(sd(), 5), fs.ddpm(sd(), 5, variance="large", clip=1.0)],
    "lcm": lambda: fs.lcm(sd(), 4),
    "sampled": lambda: sampled(),
    "unipc_eps": lambda: fs.unipc(sd(), 5, predict_x0=False),
    "consistency": lambda: fs.consistency([80.0, 24.4, 5.84], network=True, clip=1.0),
    "langevin": lambda: fs.langevin(0.1, 5),
    "annealed_langevin": lambda: fs.annealed_langevin(sd(), 5),
    "log_snr_ancestral": lambda: fs.log_snr_ancestral(sd(), 5),
    "probability_flow": lambda: fs.probability_flow(fs.VE(), 5),
    "reverse_sde": lambda: fs.reverse_sde(fs.VP(), 5),
    "predictor_corrector": lambda: [
        fs.predictor_corrector(fs.SubVP(), 5),
        fs.predictor_corrector(sd(), 5),
    ],
    "schedule_from_config": lambda: fs.schedule_from_config(
        BETAS | {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
    ),
    "trained_betas": lambda: fs.schedule_from_config(
        {"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2], "num_train_timesteps": 2}
    ),
    # what is told is cut off to ints, which depends on roundings in float32
    "dpm_karras": lambda: configured(
        "DPMSolverMultistepScheduler", steps=20, use_karras_sigmas=True, beta_schedule="linear"
    ),
    "unipc_beta": lambda: configured(
        "UniPCMultistepScheduler", steps=20, use_exponential_sigmas=True
    ),
    "timesteps": lambda: fs.table_from_config(
        BETAS | {"_class_name": "EulerDiscreteScheduler"}, timesteps=[999.0, 500.1, 3.0]
    ),
    "sigmas": lambda: fs.table_from_config(
        {"_class_name": "FlowMatchEulerDiscreteScheduler"}, sigmas=[1.0, 0.51, 0.3]
    ),
} | {name: lambda name=name: configured(name) for name in DEFAULTS}


def tensors(made):
    """All the numbers of what was made, by name."""
    if isinstance(made, list):
        return {f"{i}.{k}": v for i, part in enumerate(made) for k, v in tensors(part).items()}
    if isinstance(made, torch.Tensor):
        return {"": made}
    return {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}


@pytest.fixture(params=["meta", torch.float64, torch.bfloat16], ids=str)
def defaults(request):
    """Switches to other defaults when it is called, and back when the test is over."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()

    def switch():
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(request.param)

    yield switch
    torch.set_default_dtype(dtype)
    torch.set_default_device(None if device == torch.device("cpu") else device)


@pytest.mark.parametrize("name", MADE)
def test_whatever_the_defaults(name, defaults):
    expected = tensors(MADE[name]())
    defaults()
    got = tensors(MADE[name]())
    assert list(got) == list(expected)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert got[key].device.type == "cpu", key
            assert got[key].dtype == value.dtype, key
            assert got[key].tolist() == value.tolist(), key
        else:
            assert got[key] == value, key


def test_noise_is_float32(defaults):
    expected = fs.noise([3, 4], (2, 5))
    assert expected.dtype == torch.float32
    defaults()
    got = fs.noise([3, 4], (2, 5))
    assert got.dtype == torch.float32 and got.tolist() == expected.tolist()


GRID = {
    "timesteps": torch.tensor([5, 2]),
    "alpha": torch.tensor([0.6, 0.8], dtype=torch.float64),
    "sigma": torch.tensor([0.8, 0.6], dtype=torch.float64),
    "alpha_next": torch.tensor([0.8, 1.0], dtype=torch.float64),
    "sigma_next": torch.tensor([0.6, 0.0], dtype=torch.float64),
    "input_scale": torch.tensor([1.0, 1.0], dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("timesteps", [5, 2], "timesteps: expected int64 or float64"),
        ("timesteps", torch.tensor([5.0, 2.0]), "timesteps: expected int64 or float64"),
        ("timesteps", torch.tensor([5, 2], dtype=torch.int32), "timesteps: expected int64 or"),
        ("timesteps", torch.tensor([[5, 2]]), "timesteps: expected int64 or float64"),
        ("timesteps", torch.tensor([5.0, torch.nan]).double(), "timesteps: expected finite"),
        ("timesteps", torch.tensor([torch.inf, 2.0]).double(), "timesteps: expected finite"),
        ("alpha", [0.6, 0.8], "alpha: expected float64"),
        ("sigma_next", None, "sigma_next: expected float64"),
        ("input_scale", torch.ones(3).double(), "input_scale: expected float64"),
        ("init_noise_sigma", "1", "init_noise_sigma: expected a number"),
        ("init_noise_sigma", torch.nan, "init_noise_sigma: expected a number"),
    ],
)
def test_grid_says_what_it_refuses(field, value, message):
    assert len(Grid(**GRID)) == 2
    with pytest.raises(ValueError, match=f"Grid: {message}"):
        Grid(**(GRID | {field: value}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fs.dpm_solver(sd(), 5, begin="a"), "dpm_solver: begin: expected an int"),
        (lambda: fs.dpm_solver(sd(), 5, begin=-1), "dpm_solver: begin: expected an int"),
        (lambda: fs.unipc(sd(), 5, begin="a"), "unipc: begin: expected an int"),
        (lambda: fs.unipc(sd(), 5, begin=1.5), "unipc: begin: expected an int"),
        (lambda: fs.unipc(sd(), 5, disable_corrector=3), "unipc: disable_corrector: expected"),
        (lambda: fs.unipc(sd(), 5, disable_corrector="ab"), "unipc: disable_corrector: expected"),
        (lambda: fs.flow_euler(5, shift="3"), "flow_grid: shift: expected a number > 0, got '3'"),
        (lambda: fs.flow_grid(5, T="x"), "flow_grid: T: expected a number >= 1"),
    ],
)
def test_arguments_that_are_no_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
