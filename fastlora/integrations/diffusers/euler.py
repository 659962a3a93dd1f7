"""Euler's method and its ancestral form, which count their own steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete as their_ancestral
from diffusers.schedulers import scheduling_euler_discrete as their_euler
from torch import Tensor

from fastlora.integrations.diffusers.base import FastScheduler, Rows, draw, widened
from fastlora.samplers.grid import Grid
from fastlora.samplers.solvers.euler import euler, euler_ancestral
from fastlora.samplers.table import Table


class _Euler(FastScheduler):
    """What the two share: x = x0 + sigma eps, and a step index."""

    sigmas: Tensor
    is_scale_input_called: bool

    def _levels(self) -> tuple[Any, ...]:
        return self._internal_dict, self.timesteps, self.sigmas

    def _grid(self) -> tuple[Grid, Tensor]:
        """The grid, and which of the steps are in it: those between numbers."""
        sigmas = self.sigmas.detach().to("cpu", torch.float64)
        sigma, sigma_next = sigmas[:-1], sigmas[1:]
        fine = sigma.isfinite() & sigma_next.isfinite() & (sigma > 0) & (sigma_next >= 0)
        sigma, sigma_next = sigma[fine], sigma_next[fine]
        ones, scale = torch.ones_like(sigma), (sigma**2 + 1).rsqrt()
        t = torch.arange(len(fine))[fine]
        return Grid(t, ones, sigma, ones, sigma_next, scale), fine

    def _warn_unless_scaled(self, logger: Any) -> None:
        if not self.is_scale_input_called:
            logger.warning(
                f"{type(self).__name__}: the model should see scale_model_input(sample, timestep),"
                " which was not called before step"
            )


class FastEulerDiscreteScheduler(_Euler, their_euler.EulerDiscreteScheduler):
    """diffusers' EulerDiscreteScheduler whose `step` is one `sampler_step`; see
    `fastlora.samplers.euler`. With s_churn > 0 noise is added to x before it."""

    predictions = ("epsilon", "sample", "original_sample", "v_prediction")

    def _rows(self, variant: Any) -> Rows:
        grid, fine = self._grid()
        if variant is None:
            rows = Rows.of(euler(grid, prediction=self._prediction()), fine, len(fine))
        else:
            rows = self._churned(grid, fine, *variant)
        rows.why = f"a step index below {len(fine)}, from sigma > 0"
        return rows.remember_x0()

    def _churned(self, grid: Grid, fine: Tensor, churn: float, low: float, high: float) -> Rows:
        """Karras et al. (2022), Algorithm 2: from `sigma_hat = (1 + gamma) sigma` on, to which
        noise of deviation sqrt(sigma_hat^2 - sigma^2) leads. As in diffusers v is read at sigma."""
        gamma = min(churn / len(fine), math.sqrt(2) - 1)
        gamma = torch.where((grid.sigma >= low) & (grid.sigma <= high), gamma, 0.0).double()
        hat = grid.sigma * (1 + gamma)
        prediction = self._prediction()
        k_x, k_e, _, _ = grid.readings(prediction)
        if prediction == "epsilon":
            k_e = -hat
        r = (grid.sigma_next - hat) / hat  # x' = x + r (x - x0)
        columns = {"k_x": k_x, "k_e": k_e, "c_x": 1 + r * (1 - k_x), "c_e": -r * k_e}
        rows = Rows.of(Table.of("euler", prediction, grid.timesteps, **columns), fine, len(fine))
        added = torch.zeros(len(fine), dtype=torch.float64)
        added[fine] = (hat**2 - grid.sigma**2).sqrt()
        rows.extra = added.tolist()
        return rows

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> their_euler.EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """x' and x̂0 as diffusers' `step` gives them, by one kernel; arguments and results are
        those. Raises ValueError for a timestep that is an index."""
        self._warn_unless_scaled(their_euler.logger)
        self._check_no_index(timestep)
        step = self._due(timestep)
        dtype = model_output.dtype
        sample = widened(sample, dtype)
        variant = (float(s_churn), float(s_tmin), float(s_tmax)) if s_churn > 0 else None
        placed = self._placed(sample, variant)
        row = placed.row(step, self)
        if variant is not None and placed.extra[step] > 0:
            noise = draw(model_output, generator, dtype).to(placed.table.dtype)
            sample = self._remembered(sample, noise.dtype)
            sample = sample + noise * (placed.extra[step] * s_noise)
        x, h = self._advance(placed, row, model_output, sample, dtype, blank=True)
        self._step_index = step + 1
        x0 = h.squeeze(0)
        if not return_dict:
            return x, x0
        return their_euler.EulerDiscreteSchedulerOutput(prev_sample=x, pred_original_sample=x0)


class FastEulerAncestralDiscreteScheduler(_Euler, their_ancestral.EulerAncestralDiscreteScheduler):
    """diffusers' EulerAncestralDiscreteScheduler whose `step` is one `sampler_step`; see
    `fastlora.samplers.euler_ancestral`."""

    predictions = ("epsilon", "v_prediction")

    def _rows(self, variant: Any) -> Rows:
        grid, fine = self._grid()
        rows = Rows.of(euler_ancestral(grid, prediction=self._prediction()), fine, len(fine))
        rows.why = f"a step index below {len(fine)}, from sigma > 0"
        return rows.remember_x0()

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> their_ancestral.EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """x' and x̂0 as diffusers' `step` gives them, by one kernel; arguments and results are
        those. Raises ValueError for a timestep that is an index."""
        self._warn_unless_scaled(their_ancestral.logger)
        self._check_no_index(timestep)
        step = self._due(timestep)
        dtype = model_output.dtype
        sample = widened(sample, dtype)
        placed = self._placed(sample)
        row = placed.row(step, self)
        noise = draw(model_output, generator, dtype)
        x, h = self._advance(placed, row, model_output, sample, dtype, noise, blank=True)
        self._step_index = step + 1
        x0 = h.squeeze(0)
        if not return_dict:
            return x, x0
        return their_ancestral.EulerAncestralDiscreteSchedulerOutput(
            prev_sample=x, pred_original_sample=x0
        )
