"""Grids of noise levels that are formulas, not timesteps of a schedule.

`timesteps`, what the model is told, is float64 and reaches it as float32: sigma for `karras` and
`geometric`, the log-SNR for `cosine_log_snr` and `linear_log_snr`. A model that wants something
else is served by `dataclasses.replace(grid, timesteps=grid.sigma.log() / 4)`, which is c_noise of
Karras et al. (2022). `fastlora.samplers.sde` has the levels of stochastic differential equations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlora.samplers.arguments import integer, number, on_host
from fastlora.samplers.grid import Grid


@on_host
def karras(
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    clean: bool = True,
) -> Grid:
    """`sigma_i = (max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho`, `x = x0 + sigma eps`.

    Karras et al. (2022, arXiv 2206.00364), equation 5. `clean`: n = `steps` levels, and the last
    step goes on to sigma = 0, as theirs does; otherwise n is one more and the last step arrives at
    `sigma_min`. The model is told sigma, and sees x as it is: a denoiser D(x; sigma), which scales
    its input itself. Raises ValueError unless steps >= 1, 0 < sigma_min < sigma_max, rho > 0.
    """
    u, low, high = _exploding_arguments("karras", steps, sigma_min, sigma_max, clean)
    power = number(rho)
    if not 0 < power < math.inf:
        raise ValueError(f"karras: rho: expected a number > 0, got {rho!r}")
    start, end = high ** (1 / power), low ** (1 / power)
    return _exploding((start + u * (end - start)) ** power, low, high, clean)


@on_host
def geometric(
    steps: int, sigma_min: float = 0.01, sigma_max: float = 50.0, clean: bool = True
) -> Grid:
    """`sigma_i = max (min/max)^(i/(n-1))`, `x = x0 + sigma eps`: the levels of NCSN and of VE.

    Song and Ermon (2019, arXiv 1907.05600); 0.01 to 50 are those for CIFAR-10 of Song and Ermon
    (2020, arXiv 2006.09011) and Song et al. (2021, arXiv 2011.13456). `clean`, what the model is
    told, and errors: as for `karras`.
    """
    u, low, high = _exploding_arguments("geometric", steps, sigma_min, sigma_max, clean)
    return _exploding(high * (low / high) ** u, low, high, clean)


@on_host
def cosine_log_snr(
    steps: int, log_snr_min: float = -20.0, log_snr_max: float = 20.0, clean: bool = True
) -> Grid:
    """`lambda(u) = -2 log tan(a u + b)`, u from 1 to 0: alpha = cos(a u + b), sigma = sin(a u + b).

    `b = arctan(e^(-max/2))`, `a = arctan(e^(-min/2)) - b`: Ho and Salimans (2022, arXiv
    2207.12598), section 2, whose models are trained at uniform u. lambda is log(alpha^2/sigma^2),
    and what the model is told. `clean`: `steps` levels, and the last step goes on to x0; otherwise
    one more, and it arrives at log_snr_max. Raises ValueError unless steps >= 1 and min < max.
    """
    u, low, high = _log_snr_arguments("cosine_log_snr", steps, log_snr_min, log_snr_max, clean)
    b = math.atan(math.exp(-high / 2))
    a = math.atan(math.exp(-low / 2)) - b
    return _preserving(-2 * (a * (1 - u) + b).tan().log(), low, high, clean)


@on_host
def linear_log_snr(
    steps: int, log_snr_min: float = -20.0, log_snr_max: float = 20.0, clean: bool = True
) -> Grid:
    """lambda = log(alpha^2/sigma^2) evenly spaced: what Algorithm 2 of Ho and Salimans (2022)
    samples with (`log_snr_ancestral`). Otherwise as `cosine_log_snr`."""
    u, low, high = _log_snr_arguments("linear_log_snr", steps, log_snr_min, log_snr_max, clean)
    return _preserving(low + u * (high - low), low, high, clean)


def check_steps(operator: str, steps: int) -> int:
    """`steps` as an int. Raises ValueError unless it is one >= 1."""
    count = integer(steps)
    if count is None or count < 1:
        raise ValueError(f"{operator}: steps: expected an int >= 1, got {steps!r}")
    return count


def check_range(operator: str, low_name: str, low: float, high_name: str, high: float) -> None:
    """Raises ValueError unless 0 < low < high < inf."""
    if not 0 < number(low) < math.inf:
        raise ValueError(f"{operator}: {low_name}: expected a number > 0, got {low!r}")
    if not number(low) < number(high) < math.inf:
        raise ValueError(
            f"{operator}: {high_name}: expected a number above {low_name} = {low!r}, got {high!r}"
        )


def _exploding_arguments(
    operator: str, steps: int, sigma_min: float, sigma_max: float, clean: bool
) -> tuple[Tensor, float, float]:
    """(u, sigma_min, sigma_max); u runs from 0 at the noisiest level to 1."""
    count = check_steps(operator, steps) + (not clean)
    check_range(operator, "sigma_min", sigma_min, "sigma_max", sigma_max)
    return torch.linspace(0, 1, count, dtype=torch.float64), number(sigma_min), number(sigma_max)


def _log_snr_arguments(
    operator: str, steps: int, low: float, high: float, clean: bool
) -> tuple[Tensor, float, float]:
    count = check_steps(operator, steps) + (not clean)
    # beyond 700 the float64 SNR overflows
    if not -700 <= number(low) < number(high) <= 700:
        raise ValueError(
            f"{operator}: log_snr_min: expected numbers log_snr_min < log_snr_max within ±700, got"
            f" {low!r} and {high!r}"
        )
    return torch.linspace(0, 1, count, dtype=torch.float64), number(low), number(high)


def _exploding(sigma: Tensor, low: float, high: float, clean: bool) -> Grid:
    sigma = _with_ends(sigma, high, low)
    levels = torch.cat((sigma, sigma.new_zeros(1))) if clean else sigma
    return Grid.through(levels[:-1], torch.ones_like(levels), levels, init_noise_sigma=high)


def _preserving(log_snr: Tensor, low: float, high: float, clean: bool) -> Grid:
    log_snr = _with_ends(log_snr, low, high)
    # not 1 - sigmoid, which would lose the digits of the smaller of the two
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    if clean:
        alpha = torch.cat((alpha, alpha.new_ones(1)))
        sigma = torch.cat((sigma, sigma.new_zeros(1)))
    return Grid.through(log_snr[: len(alpha) - 1], alpha, sigma)


def _with_ends(levels: Tensor, first: float, last: float) -> Tensor:
    """The ends as they were given: powers and tangents are off by a rounding."""
    levels[-1] = last
    levels[0] = first  # last, so that a single level is the noisiest
    return levels
