"""Data whose every noise level is known in closed form: mixtures of Gaussians, and one Gaussian.

If data is `sum_k w_k N(m_k, s_k^2)`, then `alpha x0 + sigma eps` is `sum_k w_k N(alpha m_k, alpha^2
s_k^2 + sigma^2)`: the score, the best prediction of noise, and where the probability flow takes a
sample (in one dimension it keeps the value of the distribution function) follow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlora.ops.sampler_step import COLUMNS
from fastlora.samplers import Grid, Table


@dataclass(frozen=True)
class Mixture:
    weights: tuple[float, ...] = (0.3, 0.7)
    means: tuple[float, ...] = (-1.0, 0.5)
    stds: tuple[float, ...] = (0.3, 0.5)

    def _parts(self, alpha, sigma):
        """w, m and s of every component at levels of any shape: [..., K]."""
        w, m, s = (
            torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds)
        )
        alpha, sigma = torch.as_tensor(alpha)[..., None], torch.as_tensor(sigma)[..., None]
        return w, alpha * m, (alpha**2 * s**2 + sigma**2).sqrt()

    def score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """d/dx log p(x) at the level."""
        w, m, s = self._parts(alpha, sigma)
        z = (x.double()[..., None] - m) / s
        responsibility = ((w / s).log() - z**2 / 2).softmax(-1)
        return (responsibility * -z / s).sum(-1)

    def cdf(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        w, m, s = self._parts(alpha, sigma)
        return (w * torch.special.ndtr((x[..., None] - m) / s)).sum(-1)

    def flow(self, x: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
        """Where the probability flow takes x from one level (alpha, sigma) to another: the same
        quantile, by bisection."""
        target = self.cdf(x, *start)
        low, high = torch.full_like(x, -1e3), torch.full_like(x, 1e3)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, *end) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def model(self, grid: Grid, prediction: str = "epsilon") -> Callable[..., Tensor]:
        """The best model, told (for each sample) what the grid tells: it finds its level there."""
        told = grid.timesteps.float()

        def model(x: Tensor, t: Tensor, cond: object) -> Tensor:
            level = (told - t.float().view(-1, 1)).abs().argmin(1)
            assert torch.equal(told[level], t.float()), "told what is not in the grid"
            each = (-1, *[1] * (x.dim() - 1))
            alpha, sigma, scale = (
                values[level].view(each) for values in (grid.alpha, grid.sigma, grid.input_scale)
            )
            seen = x.double() / scale
            eps = -sigma * self.score(seen, alpha, sigma)
            x0 = (seen - sigma * eps) / alpha
            given = {
                "epsilon": eps,
                "x0": x0,
                "score": -eps / sigma,
                "flow": eps - x0,
                "v": alpha * eps - sigma * x0,
            }[prediction]
            return given.to(x.dtype)

        return model


def gaussian(mean: float, std: float) -> Mixture:
    return Mixture((1.0,), (mean,), (std,))


def moments(
    table: Table, grid: Grid, data: Mixture, mean: float = 0.0, variance: float | None = None
) -> tuple[float, float]:
    """Mean and variance of the samples of a Gaussian `data` with the exact model, in closed form.

    Every row is then affine in (x, h, r), so that moments follow by matrices: nothing is sampled.
    Samples start as N(mean, variance), the variance by default that of the table's start noise.
    """
    model = data.model(grid, table.prediction)
    # what the model gives at each timestep: intercept and slope in its own input
    at = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(len(grid), 2)
    given = model(at, grid.timesteps, None)
    affine = zip(given[:, 0].tolist(), given.diff(dim=1)[:, 0].tolist(), strict=True)
    seen = dict(zip(grid.timesteps.tolist(), affine, strict=True))
    m = np.array([mean, 0.0, 0.0])
    cov = np.diag([table.init_noise_sigma**2 if variance is None else variance, 0.0, 0.0])
    scale = table.input_scale
    for t, values in zip(table.timesteps.tolist(), table.coefficients.tolist(), strict=True):
        c = dict(zip(COLUMNS, values, strict=True))
        intercept, slope = seen[t]
        matrix, offset = np.zeros((3, 3)), np.zeros(3)
        for i, p in enumerate("cgr"):
            of_output = c[f"{p}_0"] * c["k_e"] + c[f"{p}_e"]
            of_x = c[f"{p}_x"] + c[f"{p}_0"] * c["k_x"] + of_output * slope * scale
            matrix[i] = of_x, c[f"{p}_h"], c[f"{p}_r"]
            offset[i] = of_output * intercept
        m, cov = matrix @ m + offset, matrix @ cov @ matrix.T
        cov[0, 0] += c["c_n"] ** 2
        scale = c["m"]
    return m[0].item(), cov[0, 0].item()


def assert_moments(samples, mean, variance):
    """Within four standard errors."""
    n = samples.numel()
    assert samples.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert samples.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


def network(x, t, cond=None):
    """Something non-linear in x and t, and tame enough for a score: large steps stay stable."""
    t = t.flatten()[0].float()
    return -(x + 0.3 * (1.3 * x.roll(1, -1) + t).sin()) / (1 + t**2)
