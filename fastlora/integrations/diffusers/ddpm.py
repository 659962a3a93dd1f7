"""DDPM: any listed timestep may be stepped from, so the table has a row for every timestep."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from fastlora.integrations.diffusers.base import (
    FastScheduler,
    Placed,
    Rows,
    abar_grid,
    draw,
    widened,
)
from fastlora.integrations.diffusers.ddim import check_snr
from fastlora.samplers.solvers.ddpm import ddpm

FIXED = ("fixed_small", "fixed_small_log", "fixed_large")
LEARNED = ("learned", "learned_range")


class FastDDPMScheduler(FastScheduler, DDPMScheduler):
    """diffusers' DDPMScheduler whose `step` is one `sampler_step`; see `fastlora.samplers.ddpm`.

    A timestep tensor on a GPU is not read by the host. Where it is no element of `timesteps`
    either, noise is drawn also for timestep 0, which has no use for it: the samples are the same,
    the generator has advanced. Learned variances scale the noise before the kernel adds it.
    """

    variance_type: str

    def check_config(self) -> None:
        super().check_config()
        kind = self.config.variance_type
        if kind not in FIXED + LEARNED:
            expected = f"one of {', '.join(FIXED + LEARNED)}"
            if kind == "fixed_large_log":
                expected += ", since it would be the root of a negative logarithm"
            self._refuse("variance_type", expected, kind)

    def _levels(self) -> tuple[Any, ...]:
        levels = self.alphas_cumprod, self.variance_type
        listed = self.num_inference_steps, self.custom_timesteps
        return self._internal_dict, self.timesteps, *levels, *listed

    def _rows(self, variant: Any) -> Rows:
        abar = self.alphas_cumprod.detach().to("cpu", torch.float64)
        if self.custom_timesteps or self.num_inference_steps:
            t = self.timesteps.cpu().long()
            before = torch.cat((t[1:], torch.tensor([-1])))
        else:
            t = torch.arange(len(abar))
            before = t - 1
        abar_next = torch.where(before >= 0, abar[before.clamp(min=0)], 1.0)
        prediction, bounds = self._prediction(), self._bounds()
        grid, fine = abar_grid(t, abar[t], abar_next, prediction)
        kind = self.variance_type
        table = ddpm(
            grid,
            prediction=prediction,
            variance="large" if kind == "fixed_large" else "small",
            clip=bounds.clip,
            threshold=bounds.threshold,
        )
        at = t[fine]
        rows = Rows.of(table, at, len(abar), bounds).remember_x0()
        rows.why = "one of the listed timesteps, with SNR > 0 where noise is predicted"
        if kind in LEARNED:
            # the noise comes with its standard deviation: exp(half + span v), v what is predicted
            large = (1 - (grid.alpha / grid.alpha_next) ** 2).log()
            small = (rows.column("c_n")[at] ** 2).clamp(min=1e-20).log()
            spread = torch.full((len(abar), 2), torch.nan, dtype=torch.float64)
            spread[at, 0], spread[at, 1] = (large + small) / 4, (large - small) / 4
            rows.extra = spread
            rows.column("c_n")[at] = torch.where(at > 0, 1.0, 0.0).double()
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
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x' and x̂0 as diffusers' `step` gives them, by one kernel; arguments and results are
        those. Raises ValueError for a timestep that is not among those that were set."""
        predicted = None
        if self.variance_type in LEARNED:
            if model_output.shape[1] != 2 * sample.shape[1]:
                raise ValueError(
                    f"FastDDPMScheduler: model_output: expected {2 * sample.shape[1]} channels for"
                    f" variance_type {self.variance_type}, got {model_output.shape[1]}"
                )
            model_output, predicted = model_output.split(sample.shape[1], dim=1)
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        sample = widened(sample, dtype)
        placed = self._placed(sample)
        told = self._told(timestep)
        row = self._row(placed, timestep, told)
        noise = None
        if told is None or told > 0:
            noise = draw(model_output, generator, model_output.dtype)
            if predicted is not None:
                noise = noise * self._deviation(placed, row, predicted)
        history = placed.blank(sample)
        x, h = self._advance(placed, row, model_output, sample, dtype, noise, history)
        x0 = h[0].to(dtype)
        if not return_dict:
            return x, x0
        return DDPMSchedulerOutput(prev_sample=x, pred_original_sample=x0)

    def _deviation(self, placed: Placed, row: Tensor, predicted: Tensor) -> Tensor:
        """Standard deviations from what the model says of them, in the arithmetic's dtype."""
        predicted = predicted.to(placed.table.dtype)
        if self.variance_type == "learned":
            return predicted.sqrt()
        if not isinstance(placed.extra, Tensor) or placed.extra.device != predicted.device:
            placed.extra = placed.rows.extra.to(placed.table)
        half, span = placed.extra[row].unbind()
        return (half + span * predicted).exp()
