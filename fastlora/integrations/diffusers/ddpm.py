"""DDPM: any listed timestep may be stepped from, so the table has a row for every timestep."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
from torch import Tensor

from fastlora.integrations.diffusers.base import (
    FastScheduler,
    Placed,
    Rows,
    abar_grid,
    draw,
    promoted,
    widened,
)
from fastlora.integrations.diffusers.ddim import check_snr, drop_negative
from fastlora.ops.sampler_step import COLUMNS
from fastlora.samplers.table import X0, Table, X

FIXED = ("fixed_small", "fixed_small_log", "fixed_large")
LEARNED = ("learned", "learned_range")


class FastDDPMScheduler(FastScheduler, DDPMScheduler):
    """diffusers' DDPMScheduler whose `step` is one `sampler_step`; the rows
    are those of `fastlora.samplers.ddpm`.

    A timestep tensor on a GPU is not read by the host. Where it is no element of `timesteps`
    either, noise is drawn also for timestep 0, which has no use for it: the samples are the same,
    the generator has advanced. Learned variances scale the noise before the kernel adds it. As in
    diffusers a variance_type that is no name, such as None, is fixed_small.
    """

    variance_type: str

    def check_config(self) -> None:
        super().check_config()
        if self._options.variance_type == "fixed_large_log":
            expected = f"one of {', '.join(FIXED + LEARNED)}, since the root of a logarithm is none"
            self._refuse("variance_type", expected, self._options.variance_type)

    def _levels(self) -> tuple[Any, ...]:
        levels = self.alphas_cumprod, self.variance_type
        listed = self.num_inference_steps, self.custom_timesteps
        return self._internal_dict, self.timesteps, *levels, *listed

    def _rows(self, variant: Any) -> Rows:
        given = self.alphas_cumprod.detach().cpu()
        abar = given.double()
        if self.custom_timesteps or self.num_inference_steps:
            t = self.timesteps.cpu().long()
            before = torch.cat((t[1:], torch.tensor([-1])))
        else:
            t = torch.arange(len(abar))
            before = t - 1
        abar_next = torch.where(before >= 0, abar[before.clamp(min=0)], 1.0)
        prediction, bounds, kind = self._prediction(), self._bounds(), self.variance_type
        grid, fine = abar_grid(t, abar[t], abar_next, prediction)
        # diffusers' beta, which is 1 - abar/abar' in float32: near 1 that has few digits left, and
        # over hundreds of steps it shows
        a = (given[t] / abar_next.to(given.dtype))[fine]
        beta = (1 - a).double()
        inverse = 1 / grid.sigma**2
        small = beta * grid.sigma_next**2 * inverse
        s = (beta if kind == "fixed_large" else small).clamp(min=0).sqrt()
        mean = X * (a.double().sqrt() * grid.sigma_next**2 * inverse)
        mean = mean + X0 * (grid.alpha_next * beta * inverse)
        s = torch.where(grid.timesteps > 0, s, 0.0)
        limits = bounds.clip, bounds.threshold
        table = Table.build("ddpm", grid, prediction, mean, (), s, *limits)
        at = t[fine]
        rows = Rows.of(table, at, len(abar), bounds).remember_x0()
        rows.why = "one of the listed timesteps, with SNR > 0 where noise is predicted"
        if kind in LEARNED:
            # the noise comes with its standard deviation: exp(half + span v), v what is predicted
            large, small = beta.log(), small.clamp(min=1e-20).log()
            spread = torch.full((len(abar), 2), torch.nan, dtype=torch.float64)
            spread[at, 0], spread[at, 1] = (large + small) / 4, (large - small) / 4
            rows.extra = spread
            rows.coefficients[at, COLUMNS.index("c_n")] = torch.where(at > 0, 1.0, 0.0).double()
        return rows

    def _check_timesteps(self) -> None:
        drop_negative(self)
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
        dtype = promoted(sample, model_output)
        sample = widened(sample, dtype)
        placed = self._placed(sample)
        told = self._told(timestep)
        row = self._row(placed, timestep, told)
        noise = None
        if told is None or told > 0:
            noise = draw(model_output, generator, model_output.dtype)
            if predicted is not None:
                noise = noise * self._deviation(placed, row, predicted)
        x, h = self._advance(placed, row, model_output, sample, dtype, noise, blank=True)
        x0 = h.squeeze(0).to(dtype)
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
