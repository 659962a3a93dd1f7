"""Noise schedules: `x_t = alpha x0 + sigma eps`, `alpha^2 = abar_t`, `sigma^2 = 1 - abar_t`.

All of it is float64 on the CPU: a schedule is a handful of kilobytes that tables are computed from
once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.samplers.arguments import describe, integer, number, on_host

PREDICTIONS = ("epsilon", "v", "x0", "flow", "score")  # what a model may predict


def check_prediction(prediction: str, operator: str) -> None:
    """Raises ValueError unless `prediction` is one of `PREDICTIONS`."""
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"{operator}: prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}"
            " (diffusers' v_prediction is v, its sample is x0, flow_prediction is flow)"
        )


def _length(T: int) -> int:
    length = integer(T)
    if length is None or length < 1:
        raise ValueError(f"Schedule: T: expected an int >= 1, got {T!r}")
    return length


@dataclass(frozen=True, eq=False)
class Schedule:
    """`abar_t = prod(1 - beta)`, for t = 0 (nearly clean) to T - 1 (nearly noise).

    `alphas_cumprod` [T] float64 on the CPU, within [0, 1] and never increasing;
    `final_alpha_cumprod` is the abar that the last step arrives at: 1 (no noise at all), or
    `float(alphas_cumprod[0])`. Raises ValueError for anything else.
    """

    alphas_cumprod: Tensor  # [T]
    final_alpha_cumprod: float = 1.0

    @on_host
    def __post_init__(self) -> None:
        given = self.alphas_cumprod
        if not isinstance(given, Tensor) or given.ndim != 1 or given.numel() == 0:
            got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"Schedule: alphas_cumprod: expected a tensor [T], T >= 1, got {got}")
        abar = given.detach().to("cpu", torch.float64)
        if not bool(((abar >= 0) & (abar <= 1)).all()):  # also false for NaN
            raise ValueError(
                "Schedule: alphas_cumprod: expected values within [0, 1], got"
                f" {abar.min().item()} to {abar.max().item()}"
            )
        if not bool((abar.diff() <= 0).all()):
            raise ValueError(
                "Schedule: alphas_cumprod: expected values that never increase with t, got"
                f" an increase after t = {int((abar.diff() > 0).nonzero()[0])}"
            )
        if not abar[0].item() <= number(self.final_alpha_cumprod) <= 1:
            raise ValueError(
                "Schedule: final_alpha_cumprod: expected a number from alphas_cumprod[0] ="
                f" {abar[0].item()} to 1, got {self.final_alpha_cumprod!r}"
            )
        object.__setattr__(self, "alphas_cumprod", abar)

    @classmethod
    @on_host
    def from_betas(cls, betas: Tensor, final_alpha_cumprod: float = 1.0) -> Schedule:
        """`abar = cumprod(1 - betas)`; betas [T]. Raises TypeError where they are no tensor."""
        if not isinstance(betas, Tensor):
            raise TypeError(f"Schedule: betas: expected a tensor [T], got {describe(betas)}")
        return cls((1 - betas.to("cpu", torch.float64)).cumprod(0), final_alpha_cumprod)

    @classmethod
    @on_host
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Betas evenly spaced (Ho et al., 2020). Raises ValueError unless T is an int >= 1."""
        T = _length(T)
        return cls.from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))

    @classmethod
    @on_host
    def scaled_linear(
        cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> Schedule:
        """Square roots of the betas evenly spaced (Stable Diffusion 1 and 2, SDXL).

        Raises ValueError unless T is an int >= 1.
        """
        T = _length(T)
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64)
        return cls.from_betas(roots**2)

    @classmethod
    @on_host
    def cosine(cls, T: int = 1000) -> Schedule:
        """`abar(u) = cos^2((u + 0.008)/1.008 pi/2)`, beta <= 0.999 (Nichol and Dhariwal, 2021).

        Raises ValueError unless T is an int >= 1.
        """
        T = _length(T)
        u = torch.arange(T + 1, dtype=torch.float64) / T
        return cls._of_abar(((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2)

    @classmethod
    @on_host
    def sigmoid(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Betas along a logistic curve from -6 to 6 (GeoDiff, Xu et al., 2022).

        Raises ValueError unless T is an int >= 1.
        """
        T = _length(T)
        curve = torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid()
        return cls.from_betas(curve * (beta_end - beta_start) + beta_start)

    @classmethod
    @on_host
    def laplace(cls, T: int = 1000) -> Schedule:
        """`abar(u) = sqrt(snr / (1 + snr))`, beta <= 0.999, where
        `log snr(u) = -sign(1/2 - u)/2 log(1 - 2|1/2 - u| + 1e-6)` (Hang et al., 2024, with the root
        that diffusers takes of it).

        Raises ValueError unless T is an int >= 1.
        """
        T = _length(T)
        u = 0.5 - torch.arange(T + 1, dtype=torch.float64) / T
        sign = torch.where(u < 0, -1.0, 1.0).double()
        snr = (-0.5 * sign * (1 - 2 * u.abs() + 1e-6).log()).exp()
        return cls._of_abar((snr / (1 + snr)).sqrt())

    @classmethod
    @on_host
    def exponential(cls, T: int = 1000) -> Schedule:
        """`abar(u) = exp(-12 u)`, beta <= 0.999. Raises ValueError unless T is an int >= 1."""
        T = _length(T)
        return cls._of_abar((-12 * torch.arange(T + 1, dtype=torch.float64) / T).exp())

    @classmethod
    def _of_abar(cls, abar: Tensor) -> Schedule:
        """From abar at u = 0, 1/T, ..., 1, each beta at most 0.999."""
        return cls.from_betas((1 - abar[1:] / abar[:-1]).clamp(max=0.999))

    @on_host
    def zero_terminal_snr(self) -> Schedule:
        """`sqrt(abar)` moved and stretched so that the last one is 0 and the first one is kept.

        Lin et al. (2023), Algorithm 1. Epsilon prediction says nothing at SNR 0: sample such a
        model with v (or x0) prediction and trailing spacing.
        """
        root = self.alpha
        first, last = root[0], root[-1]
        if len(self) < 2 or first == last:
            raise ValueError(
                "zero_terminal_snr: schedule: expected abar_0 > abar_T, got them equal"
            )
        root = (root - last) * first / (first - last)
        root[-1] = 0.0  # exactly: what asks for SNR 0 compares with 0
        return replace(self, alphas_cumprod=root**2)

    def __len__(self) -> int:
        return self.alphas_cumprod.numel()

    @property
    def alpha(self) -> Tensor:
        """`sqrt(abar)` [T]."""
        return self.alphas_cumprod.sqrt()

    @property
    def sigma(self) -> Tensor:
        """`sqrt(1 - abar)` [T]."""
        return (1 - self.alphas_cumprod).sqrt()

    @property
    def log_snr(self) -> Tensor:
        """`log(abar / (1 - abar))` [T]; -inf where abar is 0, +inf where it is 1."""
        return self.alphas_cumprod.log() - (-self.alphas_cumprod).log1p()

    @on_host
    def noise_table(self, prediction: str = "epsilon") -> Tensor:
        """The float32 [T, 4] table of `fastlora.ops.add_noise`: columns alpha, sigma, p_0, p_e.

        The training target is `p_0 x0 + p_e eps`: eps (0, 1), x0 (1, 0), v (-sigma, alpha), flow
        (-1, 1), score (0, -1/sigma).
        """
        check_prediction(prediction, "noise_table")
        alpha, sigma = self.alpha, self.sigma
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        target = {
            "epsilon": (zero, one),
            "x0": (one, zero),
            "v": (-sigma, alpha),
            "flow": (-one, one),
            "score": (zero, -1 / sigma),
        }[prediction]
        return torch.stack((alpha, sigma, *target), dim=1).float()
