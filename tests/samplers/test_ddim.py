"""DDIM tables: golden values, and whole trajectories beside diffusers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastlora.ops import _philox
from fastlora.ops.sampler_step import COLUMNS
from fastlora.samplers import Schedule, ddim, sample, sample_steps
from fastlora.samplers import noise as noise_of
from fastlora.samplers.grid import spaced
from fastlora.samplers.table import Table

SPACINGS = ["leading", "trailing", "linspace"]
THEIR_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def exact_epsilon(schedule: Schedule):
    """The best prediction for data N(0, 1): x_t is N(0, 1) at every t, and E[eps | x] = sigma x."""
    sigma = schedule.sigma

    def model(x, t, cond):
        return sigma[t].view(-1, *[1] * (x.dim() - 1)).to(x.dtype) * x

    return model


# Final std of samples that started as N(0, 1): samples.md's golden values.
@pytest.mark.parametrize(
    ("steps", "eta", "std"),
    [
        (10, 0.0, 0.83170),
        (20, 0.0, 0.91253),
        (50, 0.0, 0.96408),
        (10, 1.0, 0.74041),
        (20, 1.0, 0.84305),
        (50, 1.0, 0.92598),
    ],
)
def test_golden_std(steps, eta, std):
    """Each row is linear: x' = (c_x + c_0 (k_x + k_e sigma) + c_e sigma) x + c_n z, so variances
    follow."""
    schedule = Schedule.linear()
    table = ddim(schedule, steps, eta)
    variance = 1.0
    sigma = schedule.sigma[table.timesteps]
    gain = table.column("c_0") * (table.column("k_x") + table.column("k_e") * sigma)
    gain = gain + table.column("c_x") + table.column("c_e") * sigma
    for a, c_n in zip(gain.tolist(), table.column("c_n").tolist(), strict=True):
        variance = a * a * variance + c_n * c_n
    assert math.sqrt(variance) == pytest.approx(std, abs=5e-6)


@pytest.mark.parametrize(("steps", "eta", "std"), [(20, 0.0, 0.91253), (20, 1.0, 0.84305)])
def test_golden_std_of_samples(steps, eta, std):
    schedule, seeds = Schedule.linear(), range(4)
    x = noise_of(seeds, (1 << 18,))
    table = ddim(schedule, steps, eta)
    samples = sample(exact_epsilon(schedule), table, x, seeds=seeds, progress=False)
    n = samples.numel()
    assert samples.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(2 * n))
    assert samples.mean().item() == pytest.approx(0, abs=4 * std / math.sqrt(n))


def test_golden_std_is_the_product_of_cosines():
    schedule = Schedule.linear()
    theta = schedule.alpha.acos()
    timesteps = torch.arange(0, 1000, 20)
    angles = torch.cat((torch.zeros(1).double(), theta[timesteps]))
    assert math.prod(angles.diff().cos().tolist()) == pytest.approx(0.96408, abs=5e-6)
    assert ddim(schedule).timesteps.tolist() == timesteps.flip(0).tolist()


# --- beside diffusers ----------------------------------------------------------------------------


def network(x, t, cond=None):
    """Something non-linear in x and t."""
    wave = (x.roll(1, -1) * 1.3 + t.view(-1, 1, 1, 1).to(x.dtype) * 0.01).sin()
    return 0.4 * x.tanh() + 0.7 * wave


def theirs(scheduler, x, steps, eta, noise):
    """x after every step of diffusers' scheduler."""
    scheduler.set_timesteps(steps)
    xs = []
    for i, t in enumerate(scheduler.timesteps):
        out = network(x, t.expand(x.shape[0]))
        options = {"eta": eta, "variance_noise": noise[i]} if eta else {}
        x = scheduler.step(out, t, x, **options).prev_sample
        xs.append(x)
    return xs


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0, 2.5])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_trajectory(prediction, spacing, clip, eta):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=THEIR_PREDICTION[prediction],
        timestep_spacing=spacing,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    compare(scheduler, Schedule.scaled_linear(), 23, eta, prediction, spacing, clip)


@pytest.mark.parametrize("final", ["one", "first"])
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_trajectory_ends(steps, final):
    diffusers = pytest.importorskip("diffusers")
    one = final == "one"
    scheduler = diffusers.DDIMScheduler(
        100, beta_schedule="squaredcos_cap_v2", clip_sample=False, set_alpha_to_one=one
    )
    schedule = Schedule.cosine(100)
    if not one:
        schedule = replace(schedule, final_alpha_cumprod=schedule.alphas_cumprod[0].item())
    compare(scheduler, schedule, steps, 0.3, "epsilon", "leading", None)


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_trajectory_from_snr_zero(prediction, eta):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=THEIR_PREDICTION[prediction],
        timestep_spacing="trailing",
        clip_sample=False,
        rescale_betas_zero_snr=True,
    )
    schedule = Schedule.scaled_linear().zero_terminal_snr()
    compare(scheduler, schedule, 20, eta, prediction, "trailing", None)


def compare(scheduler, schedule, steps, eta, prediction, spacing, clip):
    table = ddim(schedule, steps, eta, prediction, spacing, clip)
    seeds = torch.tensor([5, 6])
    x = noise_of(seeds, (3, 8, 8))
    noise = [_philox.normal(seeds, i, 3 * 8 * 8, torch.float32).view(x.shape) for i in range(steps)]
    # diffusers keeps its schedule in float32, where sqrt(1 - abar' - s^2) loses half of the digits
    # as it nears 0; the steps are compared here, so it takes the float64 schedule
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.final_alpha_cumprod = torch.tensor(schedule.final_alpha_cumprod, dtype=torch.float64)
    expected = theirs(scheduler, x, steps, eta, noise)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    for step in sample_steps(network, table, x, seeds=seeds):
        reference = expected[step.index]
        scale = reference.abs().max().item()
        torch.testing.assert_close(step.x, reference, rtol=0, atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize("T", [1, 77, 100, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_like_diffusers(spacing, T):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=T, timestep_spacing=spacing)
    for steps in {*range(1, min(T, 130) + 1), T - T // 3, T}:
        scheduler.set_timesteps(steps)
        # For some numbers of steps diffusers' trailing list has a stray -1 at its end.
        listed = [t for t in scheduler.timesteps.tolist() if t >= 0]
        assert spaced(T, steps, spacing).tolist() == listed


# --- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_exact_model_recovers_x0(prediction, eta):
    """With the true x0, eps or v of one data point every step ends on it, noise or not."""
    schedule = Schedule.cosine()
    x0 = torch.linspace(-2, 2, 12).double().view(1, 12)

    def model(x, t, cond):
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction]

    x = noise_of([1], (12,)).double()
    table = ddim(schedule, 30, eta, prediction)
    samples = sample(model, table, x, seeds=[1], progress=False)
    torch.testing.assert_close(samples, x0, rtol=0, atol=1e-9)


def test_no_noise_without_eta():
    assert not ddim(Schedule.linear(), 10).stochastic
    table = ddim(Schedule.linear(), 10, eta=1.0)
    assert table.stochastic and table.column("c_n")[-1] == 0 and not table.histories


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_a_schedule_that_begins_clean(prediction):
    """Where abar is 1 there is no noise to divide by: the step is the identity."""
    schedule = Schedule(torch.tensor([1.0, 0.5]))
    table = ddim(schedule, 2, eta=1.0, prediction=prediction)
    row = dict(zip(COLUMNS, table.coefficients[-1].tolist(), strict=True))
    assert (row["c_x"], row["c_e"]) == ((0, 1) if prediction == "x0" else (1, 0))
    assert row["c_0"] == row["c_n"] == 0


def test_epsilon_is_refused_where_snr_is_zero():
    schedule = Schedule.linear().zero_terminal_snr()
    with pytest.raises(
        ValueError, match=r"SNR is 0, at t = 999, got epsilon: .* predict v and use"
    ):
        ddim(schedule, 10, spacing="trailing")
    assert len(ddim(schedule, 10, spacing="leading")) == 10  # which never visits t = 999


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1001}, "steps: expected an int from 1 to the schedule's length 1000, got 1001"),
        ({"steps": 0}, "steps: expected an int from 1 to the schedule's length 1000, got 0"),
        ({"steps": 2.5}, "steps: expected an int from 1 to the schedule's length 1000, got 2.5"),
        ({"eta": -0.1}, "ddim: eta: expected a number from 0 to 1, got -0.1"),
        ({"eta": 1.5}, "ddim: eta: expected a number from 0 to 1, got 1.5"),
        ({"eta": math.nan}, "ddim: eta: expected a number from 0 to 1, got nan"),
        ({"eta": "a"}, "ddim: eta: expected a number from 0 to 1, got 'a'"),
        ({"eta": None}, "ddim: eta: expected a number from 0 to 1, got None"),
        ({"eta": torch.zeros(2)}, "ddim: eta: expected a number from 0 to 1, got tensor"),
        ({"clip": "a"}, "ddim: clip: expected a positive number or None, got 'a'"),
        ({"steps": True}, "steps: expected an int from 1 to the schedule's length 1000, got True"),
        ({"steps": "5"}, "steps: expected an int from 1 to the schedule's length 1000, got '5'"),
        ({"clip": 0.0}, "ddim: clip: expected a positive number or None, got 0.0"),
        ({"clip": math.inf}, "ddim: clip: expected a positive number or None, got inf"),
        (
            {"prediction": "v_prediction"},
            "ddim: prediction: expected one of epsilon, v, x0, flow, score, got",
        ),
        ({"spacing": "even"}, "spacing: expected one of leading, trailing, linspace, got 'even'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ddim(Schedule.linear(), **options)


@pytest.mark.parametrize(
    ("schedule", "got"),
    [(None, "None"), ("cosine", "a str"), (torch.ones(3), r"float32 \[3\]")],
    ids=["none", "str", "tensor"],
)
def test_what_is_no_schedule(schedule, got):
    with pytest.raises(
        TypeError, match=f"^ddim: schedule: expected a Schedule or a Grid, got {got}$"
    ):
        ddim(schedule, 3)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_numbers_of_numpy_and_torch_are_numbers(spacing):
    plain = ddim(Schedule.linear(), 7, 0.5, spacing=spacing, clip=1.0)
    for steps, eta, clip in (
        (np.int64(7), np.float64(0.5), np.float32(1)),
        (torch.tensor(7), torch.tensor(0.5), torch.tensor(1.0)),
    ):
        table = ddim(Schedule.linear(), steps, eta, spacing=spacing, clip=clip)
        assert torch.equal(table.coefficients, plain.coefficients)
        assert torch.equal(table.timesteps, plain.timesteps) and table.name == plain.name


def test_table_refuses_what_is_not_finite():
    timesteps = torch.tensor([1, 0])
    with pytest.raises(ValueError, match=r"got c_x = nan at step 1 \(t = 0\)"):
        Table.of("broken", "epsilon", timesteps, c_x=torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"clip > 0, got clip = -1.0 at step 0"):
        Table.of("broken", "epsilon", timesteps, clip=-1.0)
    with pytest.raises(
        ValueError, match=r"coefficients: expected float64 \[2, 22\], got .*\[1, 12\]"
    ):
        Table(torch.zeros(1, 12).double(), timesteps, "epsilon", "broken")
    with pytest.raises(ValueError, match="timesteps: expected at least one"):
        Table.of("empty", "epsilon", timesteps[:0])
