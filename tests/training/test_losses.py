"""Losses against closed forms: a model that knows x0 and is off by a constant."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora.training import denoising, prior_preservation, visual_slider
from fastlora.training.losses import draw_seeds, draw_timesteps
from tests.training.toys import SCHEDULE, Toy

PREDICTIONS = ("epsilon", "v", "x0")


def knowing(prediction: str, x0: torch.Tensor, off: torch.Tensor | float = 0.0):
    """The exact prediction for pictures x0 [B, ...], plus `off`, worked out from x_t in float64."""
    calls = []

    def model(x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        calls.append((x, t, cond))
        a, s = (c[t].view(-1, *[1] * (x.dim() - 1)) for c in (SCHEDULE.alpha, SCHEDULE.sigma))
        eps = (x.double() - a * x0) / s
        return {"epsilon": eps, "v": a * eps - s * x0, "x0": x0.double()}[prediction] + off

    model.calls = calls
    return model


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoising_loss_is_the_square_of_a_constant_error(prediction: str) -> None:
    x0 = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = {"x0": x0, "cond": None}
    for off in (0.0, 0.5):
        model = knowing(prediction, x0, off)
        loss, metrics = denoising(prediction)(model, batch, SCHEDULE, torch.Generator())
        # fp32 noise, divided by the smallest sigma to get eps back
        assert loss.item() == pytest.approx(off**2, abs=1e-5)
        assert metrics["loss"] == loss and not metrics["loss"].requires_grad


def test_denoising_reaches_t_range_and_depends_on_the_generator_alone() -> None:
    x0 = torch.zeros(40, 3)
    seen = []
    for seed in (1, 1, 2):
        model = knowing("v", x0)
        loss = denoising("v", low=10, high=50)
        loss(model, {"x0": x0, "cond": None}, SCHEDULE, torch.Generator().manual_seed(seed))
        seen.append(model.calls[0])
    t = seen[0][1].tolist()
    assert sorted(t) == list(range(10, 50)) and t != sorted(t)  # one from each of 40 equal parts
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][0], seen[2][0])
    assert len(seen[0][0].unique(dim=0)) == 40


def test_timesteps_are_uniform_over_many_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.cat([draw_timesteps(SCHEDULE, 7, generator) for _ in range(6000)])
    counts = torch.bincount(t, minlength=100).double()
    assert len(counts) == 100
    # 42,000 draws, 420 each; five standard deviations of a binomial count
    assert (counts - 420).abs().max() < 5 * 420**0.5


def test_timesteps_of_one_sample_of_a_fixed_batch_are_uniform() -> None:
    """Else the first of five pictures would be seen at little noise only."""
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([draw_timesteps(SCHEDULE, 5, generator)[0] for _ in range(4000)])
    counts = torch.bincount(first // 20, minlength=5).double()
    assert (counts - 800).abs().max() < 5 * 800**0.5


@pytest.mark.parametrize(("low", "high"), [(-1, 10), (10, 10), (0, 101)])
def test_timesteps_outside_the_schedule_are_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= low < high <= 100"):
        draw_timesteps(SCHEDULE, 4, torch.Generator(), low, high)


def test_noise_seeds_do_not_repeat() -> None:
    seeds = draw_seeds(100_000, torch.Generator().manual_seed(0))
    assert seeds.dtype == torch.int64 and len(seeds.unique()) == 100_000


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_prior_preservation_weighs_the_two_halves_of_one_batch(weight: float) -> None:
    x0 = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    off = torch.tensor([0.5] * 4 + [2.0] * 6)[:, None]
    used = 10 if weight else 4
    model = knowing("epsilon", x0[:used], off[:used])
    batch = {
        "x0": x0[:4],
        "prior_x0": x0[4:],
        "cond": torch.zeros(4, 2),
        "prior_cond": torch.ones(6, 2),
    }
    loss, metrics = prior_preservation("epsilon", weight)(model, batch, SCHEDULE, torch.Generator())
    assert loss.item() == pytest.approx(0.25 + weight * 4.0, abs=1e-4)
    ((_, t, cond),) = model.calls
    assert cond[:, 0].tolist() == [0.0] * 4 + [1.0] * (used - 4)
    if weight:
        assert metrics["subject"].item() == pytest.approx(0.25, abs=1e-4)
        assert metrics["prior"].item() == pytest.approx(4.0, abs=1e-4)
        assert t[:4].max() >= 75 and t[4:].max() >= 83  # each half is spread over all noise levels


def test_prior_weight_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="weight: expected >= 0, got -1"):
        prior_preservation("v", -1)


def slider_toy() -> Toy:
    model = Toy(seed=3)
    fastlora.inject(model, fastlora.LoRA(rank=2), where=["first", "last"], name="thickness", seed=0)
    with torch.no_grad():
        for i, p in enumerate(fastlora.parameters(model, "thickness")):
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_visual_slider_equals_two_passes_with_plain_strengths(prediction: str) -> None:
    """One pass with gates per sample against the published two: losses and gradients."""
    model = slider_toy().double()
    trained = fastlora.parameters(model, "thickness")
    generator = torch.Generator().manual_seed(5)
    low, high = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64)
    batch = {"low": low, "high": high, "cond": torch.randn(9, 4, generator=generator).double()}
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.extend(args[:2]))
    loss, metrics = visual_slider("thickness", prediction, strength=0.7)(
        model, batch, SCHEDULE, torch.Generator().manual_seed(1)
    )
    handle.remove()
    gradients = torch.autograd.grad(loss, trained)

    x_t, t = seen[0], seen[1][:9]
    assert torch.equal(seen[1][:9], seen[1][9:])
    a, s = SCHEDULE.alpha[t][:, None], SCHEDULE.sigma[t][:, None]
    eps_high, eps_low = (x_t[:9] - a * high) / s, (x_t[9:] - a * low) / s
    torch.testing.assert_close(eps_high, eps_low, rtol=0, atol=1e-4)  # fp32 table
    assert eps_high.std().item() == pytest.approx(1, abs=0.3)

    expected = torch.zeros((), dtype=torch.float64)
    for strength, x0, eps, noisy in ((0.7, high, eps_high, x_t[:9]), (-0.7, low, eps_low, x_t[9:])):
        target = {"epsilon": eps, "v": a * eps - s * x0, "x0": x0}[prediction]
        with fastlora.scaled(model, {"thickness": strength}):
            expected = expected + (model(noisy, t, batch["cond"]) - target).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics["high"] + metrics["low"], loss.detach())
    for got, want in zip(gradients, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert max(g.abs().max() for g in gradients) > 1e-3


def test_visual_slider_leaves_the_scale_alone() -> None:
    model = slider_toy()
    fastlora.set_scale(model, {"thickness": 0.25})
    batch = {"low": torch.zeros(2, 6), "high": torch.ones(2, 6), "cond": torch.zeros(2, 4)}
    visual_slider("thickness")(model, batch, SCHEDULE, torch.Generator())
    assert fastlora.adapters(model)["thickness"].scale == 0.25


def test_visual_slider_refuses_pairs_of_unequal_shape() -> None:
    batch = {"low": torch.zeros(3, 6), "high": torch.ones(2, 6), "cond": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=r"low: expected the shape of high \[2, 6\], got \[3, 6\]"):
        visual_slider("thickness")(slider_toy(), batch, SCHEDULE, torch.Generator())
