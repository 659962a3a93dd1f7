"""Stochastic differential equations that turn data into noise (Song et al., 2021).

`dx = f(t) x dt + g(t) dw` for t from 0 (data) to 1 (noise), whose x at t is
`alpha(t) x0 + sigma(t) eps`. All of it float64 on the CPU; t is a tensor of any shape.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.samplers.arguments import number, on_host
from fastlora.samplers.continuous import check_range, check_steps
from fastlora.samplers.grid import Grid


class SDE(ABC):
    """What `probability_flow`, `reverse_sde` and `predictor_corrector` need to know."""

    end: float = 1e-3  # where sampling stops: at t = 0 the score is unbounded

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f(t), per unit of x."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise that samples start from."""
        return 1.0

    def told(self, t: Tensor) -> Tensor:
        """What the model is told at t: t itself. (Published networks of VP and sub-VP are told
        999 t: multiply inside of the model, or replace a table's `timesteps`.)"""
        return t

    @on_host
    def times(self, steps: int, end: float | None = None, clean: bool = True) -> Tensor:
        """The times at which the model is called, evenly from 1 to `end` (`self.end`), float64
        [steps]; without `clean` one more, the time that the last step arrives at.

        Raises ValueError unless steps is an int >= 1 and 0 < end < 1.
        """
        operator = type(self).__name__
        count = check_steps(operator, steps) + (not clean)
        last = self.end if end is None else number(end)
        if not 0 < last < 1:
            raise ValueError(f"{operator}: end: expected a number in (0, 1), got {end!r}")
        return torch.linspace(1, last, count, dtype=torch.float64)

    @on_host
    def grid(self, steps: int, end: float | None = None, clean: bool = True) -> Grid:
        """The levels of `times`; `clean`: the last step goes on from `end` to x0 itself."""
        t = self.times(steps, end, clean)
        alpha, sigma = self.alpha(t), self.sigma(t)
        if clean:
            alpha = torch.cat((alpha, alpha.new_ones(1)))
            sigma = torch.cat((sigma, sigma.new_zeros(1)))
        told = self.told(t[: len(alpha) - 1])
        return Grid.through(told, alpha, sigma, init_noise_sigma=self.init_noise_sigma)


@dataclass(frozen=True)
class VE(SDE):
    """Variance exploding: `sigma(t) = min (max/min)^t`, f = 0, `g = sigma sqrt(2 log(max/min))`.

    The model is told sigma. As in practice x at t is x0 + sigma(t) eps: the equation alone, begun
    at x0, would give the variance sigma(t)^2 - sigma(0)^2. Raises ValueError unless
    0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    end = 1e-5

    def __post_init__(self) -> None:
        check_range("VE", "sigma_min", self.sigma_min, "sigma_max", self.sigma_max)

    @property
    def init_noise_sigma(self) -> float:
        return float(self.sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def told(self, t: Tensor) -> Tensor:
        return self.sigma(t)


@dataclass(frozen=True)
class VP(SDE):
    """Variance preserving: `beta(t) = min + t (max - min)`, f = -beta/2, `g^2 = beta`.

    `alpha = exp(-B/2)`, `sigma^2 = 1 - exp(-B)` with `B = int_0^t beta`. The model is told t. The
    continuous limit of DDPM's linear betas, times 1000. Raises ValueError unless 0 < min < max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_range(type(self).__name__, "beta_min", self.beta_min, "beta_max", self.beta_max)

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integral(self, t: Tensor) -> Tensor:
        """`B(t) = int_0^t beta`."""
        return t * self.beta_min + t**2 * (self.beta_max - self.beta_min) / 2

    def alpha(self, t: Tensor) -> Tensor:
        return (-self.integral(t) / 2).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-(-self.integral(t)).expm1()).sqrt()

    def drift(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-VP: the drift of `VP`, but `sigma = 1 - exp(-B)` and `g^2 = beta (1 - exp(-2 B))`, so
    that variances stay below those of VP."""

    def sigma(self, t: Tensor) -> Tensor:
        return -(-self.integral(t)).expm1()

    def diffusion(self, t: Tensor) -> Tensor:
        return (self.beta(t) * -(-2 * self.integral(t)).expm1()).sqrt()
