"""Classifier-free guidance of a two-component Gaussian mixture, whose exact eps is known."""

import math

import pytest
import torch

from fastlora.samplers import Schedule, ddim, noise, sample

MEAN, STD = 1.5, 0.5  # two components N(+-MEAN, STD^2), as likely


def mixture(schedule):
    """Exact eps: of the component that cond names by its sign, of the mixture where it is 0."""

    def model(x, t, cond):
        alpha, sigma = (s[t].to(x.dtype)[:, None] for s in (schedule.alpha, schedule.sigma))
        variance = alpha**2 * STD**2 + sigma**2
        mean = alpha * MEAN
        towards = torch.where(cond[:, None] == 0, (mean * x / variance).tanh(), cond[:, None])
        return sigma * (x - mean * towards) / variance

    return model


def test_guided_mixture_follows_the_closed_form():
    """eps_u + g (eps_c - eps_u) adds g - 1 times the gradient of log p(c | x) to the score."""
    schedule, g = Schedule.linear(), 3.0
    x = torch.linspace(-3, 3, 41).double().view(-1, 1)
    table = ddim(schedule, 40)
    plus, none = torch.ones(41).double(), torch.zeros(41).double()
    samples = sample(mixture(schedule), table, x, plus, none, g, progress=False)

    abar = [*schedule.alphas_cumprod[table.timesteps].tolist(), 1.0]
    for a, a_next in zip(abar[:-1], abar[1:], strict=True):
        alpha, sigma = math.sqrt(a), math.sqrt(1 - a)
        variance = a * STD**2 + 1 - a
        score = (alpha * MEAN - x) / variance  # of p(x | c = +1)
        log_odds = 2 * alpha * MEAN * x / variance
        classifier = 2 * alpha * MEAN / variance * (-log_odds).sigmoid()  # of log p(c = +1 | x)
        eps = -sigma * (score + (g - 1) * classifier)
        x0 = (x - sigma * eps) / alpha
        x = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next) * eps
    torch.testing.assert_close(samples, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_guided_mixture_statistics(eta):
    schedule, n = Schedule.linear(), 5000
    model, table = mixture(schedule), ddim(schedule, 100, eta)
    x, seeds = noise(range(n), (1,)), range(n)
    plus, none = torch.ones(n), torch.zeros(n)

    unguided = sample(model, table, x, none, seeds=seeds, progress=False)
    assert (unguided > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    conditional = sample(model, table, x, plus, none, 1.0, seeds=seeds, progress=False)
    assert conditional.mean().item() == pytest.approx(MEAN, abs=0.03)
    # 100 steps narrow the samples a little, noisy ones more: see the golden values of test_ddim
    assert conditional.std().item() == pytest.approx(STD, rel=0.08)
    guided = sample(model, table, x, plus, none, 3.0, seeds=seeds, progress=False)
    # further from the other component than the data itself
    assert guided.mean() > conditional.mean() + 0.01
    assert (guided < 0.2).sum() < (conditional < 0.2).sum()
