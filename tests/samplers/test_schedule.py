import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from fastlora import Schedule

SCHEDULES = {
    "linear": (Schedule.linear, {"beta_schedule": "linear"}),
    "scaled_linear": (
        Schedule.scaled_linear,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (Schedule.cosine, {"beta_schedule": "squaredcos_cap_v2"}),
}


def test_golden_values():
    assert Schedule.linear().alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert Schedule.scaled_linear().alphas_cumprod[-1].item() == pytest.approx(0.0046601, rel=1e-4)


def test_cosine_by_its_formula():
    def abar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    # all but the capped end of the product telescopes
    schedule = Schedule.cosine(100)
    for t in (0, 1, 50, 97):
        expected = abar((t + 1) / 100) / abar(0)
        assert schedule.alphas_cumprod[t].item() == pytest.approx(expected, rel=1e-12)
    last = schedule.alphas_cumprod[-1] / schedule.alphas_cumprod[-2]
    assert last.item() == pytest.approx(1e-3)


@pytest.mark.parametrize("T", [1, 2, 100, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_like_diffusers(name, T):
    diffusers = pytest.importorskip("diffusers")
    make, options = SCHEDULES[name]
    theirs = diffusers.DDIMScheduler(num_train_timesteps=T, **options).alphas_cumprod
    assert len(make(T)) == T
    torch.testing.assert_close(make(T).alphas_cumprod, theirs.double(), rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_zero_terminal_snr(name):
    diffusers = pytest.importorskip("diffusers")
    make, options = SCHEDULES[name]
    schedule, zero = make(), make().zero_terminal_snr()
    assert zero.alphas_cumprod[-1] == 0 and zero.log_snr[-1] == -math.inf
    assert zero.alphas_cumprod[0].item() == pytest.approx(schedule.alphas_cumprod[0].item())
    theirs = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, **options).alphas_cumprod
    torch.testing.assert_close(zero.alphas_cumprod, theirs.double(), rtol=0, atol=1e-6)
    again = zero.zero_terminal_snr()
    torch.testing.assert_close(again.alphas_cumprod, zero.alphas_cumprod)


@pytest.mark.parametrize("name", SCHEDULES)
def test_alpha_sigma_and_snr(name):
    schedule = SCHEDULES[name][0]()
    assert schedule.alphas_cumprod.dtype == torch.float64 and schedule.final_alpha_cumprod == 1
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(1000).double())
    expected = 2 * (schedule.alpha / schedule.sigma).log()
    torch.testing.assert_close(schedule.log_snr, expected)
    assert (schedule.log_snr.diff() < 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_noise_table(prediction):
    """x_t and the target of known x0 and eps."""
    schedule = Schedule.linear()
    alpha, sigma, p_0, p_e = schedule.noise_table(prediction).double().unbind(1)
    x0, eps = 0.3, -1.7
    x, target = alpha * x0 + sigma * eps, p_0 * x0 + p_e * eps
    expected = {"epsilon": eps, "x0": x0, "v": schedule.alpha * eps - schedule.sigma * x0}
    torch.testing.assert_close(
        target, torch.as_tensor(expected[prediction]).double().expand(1000), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(x, schedule.alpha * x0 + schedule.sigma * eps, rtol=1e-6, atol=1e-6)
    assert schedule.noise_table(prediction).dtype == torch.float32


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        Schedule.linear().final_alpha_cumprod = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ([0.9, 0.5], r"alphas_cumprod: expected a tensor \[T\], T >= 1, got list"),
        (torch.ones(2, 2), r"alphas_cumprod: expected a tensor \[T\], T >= 1, got \[2, 2\]"),
        (torch.ones(0), r"alphas_cumprod: expected a tensor \[T\], T >= 1, got \[0\]"),
        (torch.tensor([0.9, -0.1]), r"expected values within \[0, 1\], got -0.1.* to 0.8"),
        (torch.tensor([1.5, 0.1]), r"expected values within \[0, 1\], got 0.1.* to 1.5"),
        (torch.tensor([0.9, math.nan]), r"expected values within \[0, 1\], got nan"),
        (torch.tensor([0.9, 0.4, 0.5]), "never increase with t, got an increase after t = 1"),
    ],
    ids=["list", "matrix", "empty", "negative", "above-one", "nan", "increasing"],
)
def test_bad_alphas(alphas, message):
    with pytest.raises(ValueError, match=message):
        Schedule(alphas)


@pytest.mark.parametrize("final", [0.0, 0.99, 1.01, math.nan])
def test_bad_final_alpha(final):
    schedule = Schedule.linear()
    with pytest.raises(ValueError, match="final_alpha_cumprod: expected a number from"):
        replace(schedule, final_alpha_cumprod=final)


@pytest.mark.parametrize("T", [2.5, 0, -3, "10", None, True], ids=repr)
@pytest.mark.parametrize("make", [Schedule.linear, Schedule.scaled_linear, Schedule.cosine])
def test_bad_length(make, T):
    with pytest.raises(ValueError, match=f"^Schedule: T: expected an int >= 1, got {T!r}$"):
        make(T)


@pytest.mark.parametrize("name", SCHEDULES)
def test_length_of_numpy(name):
    made = getattr(Schedule, name)(np.int32(9))
    assert torch.equal(made.alphas_cumprod, getattr(Schedule, name)(9).alphas_cumprod)


def test_what_is_no_number_or_tensor():
    with pytest.raises(ValueError, match="final_alpha_cumprod: expected a number .*, got 'a'"):
        Schedule(torch.tensor([0.9, 0.5]), "a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"betas: expected a tensor \[T\], got a list of 1"):
        Schedule.from_betas([0.1])  # type: ignore[arg-type]


def test_bad_prediction():
    names = "epsilon, v, x0, flow, score"
    with pytest.raises(ValueError, match=f"prediction: expected one of {names}, got 'sample'"):
        Schedule.linear().noise_table("sample")


@pytest.mark.parametrize("T", [1, 3])
def test_no_terminal_snr_to_move(T):
    schedule = Schedule(torch.full((T,), 0.5))
    with pytest.raises(ValueError, match="zero_terminal_snr: schedule: expected abar_0 > abar_T"):
        schedule.zero_terminal_snr()
