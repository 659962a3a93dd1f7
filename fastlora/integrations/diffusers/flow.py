"""Euler's method on the straight paths of flow matching."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from fastlora.integrations.diffusers.base import FastScheduler, Rows, draw, widened
from fastlora.samplers.table import Table


class FastFlowMatchEulerDiscreteScheduler(FastScheduler, FlowMatchEulerDiscreteScheduler):
    """diffusers' FlowMatchEulerDiscreteScheduler whose `step` is one `sampler_step`; see
    `fastlora.samplers.flow_euler`. With per_token_timesteps, where every token has a level of its
    own, the step is diffusers' own."""

    def _levels(self) -> tuple[Any, ...]:
        return self._internal_dict, self.timesteps, self.sigmas

    def _rows(self, variant: Any) -> Rows:
        """`x' = x + (sigma' - sigma) v`, or `(1 - sigma') (x - sigma v) + sigma' z`. Levels as they
        are, also those that count from 0 to 1 (invert_sigmas)."""
        sigmas = torch.as_tensor(self.sigmas).detach().to("cpu", torch.float64)
        sigma, sigma_next = sigmas[:-1], sigmas[1:]
        if self._options.stochastic_sampling:
            keep = 1 - sigma_next
            columns = {"c_x": keep, "c_e": -keep * sigma, "c_n": sigma_next}
        else:
            columns = {"c_x": 1.0, "c_e": sigma_next - sigma}
        at = torch.arange(len(sigma))
        rows = Rows.of(Table.of("flow_euler", "flow", at, **columns), at, len(at))
        rows.why = f"a step index below {len(at)}"
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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """x' as diffusers' `step` gives it, by one kernel; arguments and results are those, and as
        there s_churn and its like say nothing. Raises ValueError for a timestep that is an index.
        """
        if per_token_timesteps is not None:
            return super().step(
                model_output,  # type: ignore[arg-type]
                timestep,  # type: ignore[arg-type]
                sample,  # type: ignore[arg-type]
                generator=generator,
                per_token_timesteps=per_token_timesteps,
                return_dict=return_dict,
            )
        self._check_no_index(timestep)
        step = self._due(timestep)
        dtype = model_output.dtype
        sample = widened(sample, dtype)
        placed = self._placed(sample)
        row = placed.row(step, self)
        noise = None
        if self._options.stochastic_sampling:
            noise = draw(sample, generator, torch.float32)
        x, _ = self._advance(placed, row, model_output, sample, dtype, noise)
        self._step_index = step + 1
        if not return_dict:
            return (x,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x)  # type: ignore[arg-type]
