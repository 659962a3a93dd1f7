"""Latent consistency models: multistep consistency sampling, with a step index."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_lcm import LCMScheduler, LCMSchedulerOutput
from torch import Tensor

from fastlora.integrations.diffusers.base import (
    FastScheduler,
    Rows,
    abar_grid,
    draw,
    promoted,
    widened,
)
from fastlora.integrations.diffusers.ddim import check_snr
from fastlora.samplers.solvers.lcm import denoised
from fastlora.samplers.table import Table


class FastLCMScheduler(FastScheduler, LCMScheduler):
    """diffusers' LCMScheduler whose `step` is one `sampler_step`; see `fastlora.samplers.lcm`.

    A timestep tensor on a GPU that is no element of `timesteps` is taken to be the one whose turn
    it is.
    """

    def _levels(self) -> tuple[Any, ...]:
        levels = self.alphas_cumprod, self.final_alpha_cumprod
        return self._internal_dict, self.timesteps, self.num_inference_steps, *levels

    def _rows(self, variant: Any) -> Rows:
        """`variant`: the timestep to step from where it is not the listed one."""
        abar = self.alphas_cumprod.detach().to("cpu", torch.float64)
        listed = self.timesteps.cpu().long()
        count = len(listed)
        t = listed if variant is None else torch.full_like(listed, variant)
        arrival = torch.cat((listed[1:], t[-1:]))
        final = self.final_alpha_cumprod.detach().to("cpu", torch.float64)
        abar_next = torch.where(arrival >= 0, abar[arrival.clamp(min=0)], final)
        # the last of num_inference_steps, which are more than are listed where timesteps were
        # given together with a strength, returns the denoised sample
        if self.num_inference_steps is not None and self.num_inference_steps <= count:
            abar_next[self.num_inference_steps - 1] = 1.0
        prediction, bounds = self._prediction(), self._bounds()
        grid, fine = abar_grid(t, abar[t], abar_next, prediction)
        clean = denoised(grid, self._options.timestep_scaling)
        table = Table.build(
            "lcm",
            grid,
            prediction,
            clean * grid.alpha_next,
            (clean,),
            grid.sigma_next,
            bounds.clip,
            bounds.threshold,
        )
        rows = Rows.of(table, fine, count, bounds)
        rows.why = f"a step index below {count}, with SNR > 0 where noise is predicted"
        return rows

    def _check_timesteps(self) -> None:
        check_snr(self, self.timesteps, self.alphas_cumprod)
        super()._check_timesteps()

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """x' and the denoised sample as diffusers' `step` gives them, by one kernel; arguments and
        results are those."""
        if self.num_inference_steps is None:
            raise ValueError(
                "FastLCMScheduler: step: expected set_timesteps to be called before it"
            )
        step = self._due(timestep)
        dtype = promoted(sample, model_output)
        sample = widened(sample, dtype)
        placed = self._placed(sample)
        told, listed = self._told(timestep), self._current().timesteps
        if told is not None and step < len(listed) and told != listed[step]:
            placed = self._placed(sample, int(told))
        row = placed.row(step, self)
        last = step == self.num_inference_steps - 1
        noise = None if last else draw(model_output, generator, dtype)
        x, h = self._advance(placed, row, model_output, sample, dtype, noise, blank=True)
        self._step_index = step + 1
        x0 = h.squeeze(0).to(dtype)
        if not return_dict:
            return x, x0
        return LCMSchedulerOutput(prev_sample=x, denoised=x0)
