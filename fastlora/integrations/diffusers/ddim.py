"""DDIM: any timestep may be stepped from, so the table has a row for every one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from torch import Tensor

from fastlora.integrations.diffusers.base import (
    FastScheduler,
    Rows,
    abar_grid,
    draw,
    promoted,
    widened,
)
from fastlora.samplers.solvers.ddim import ddim


class FastDDIMScheduler(FastScheduler, DDIMScheduler):
    """diffusers' DDIMScheduler whose `step` is one `sampler_step`; see `fastlora.samplers.ddim`.

    A timestep tensor on a GPU is not read by the host: it is the row of the table.
    """

    def _levels(self) -> tuple[Any, ...]:
        levels = self.alphas_cumprod, self.final_alpha_cumprod
        return self._internal_dict, self.timesteps, self.num_inference_steps, *levels

    def _rows(self, variant: Any) -> Rows:
        eta, rederive = variant or (0.0, False)
        abar = self.alphas_cumprod.detach().to("cpu", torch.float64)
        t = torch.arange(len(abar))
        before = t - self._options.num_train_timesteps // (self.num_inference_steps or 1)
        final = self.final_alpha_cumprod.detach().to("cpu", torch.float64)
        abar_next = torch.where(before >= 0, abar[before.clamp(min=0)], final)
        prediction, bounds = self._prediction(), self._bounds()
        grid, fine = abar_grid(t, abar, abar_next, prediction)
        table = ddim(
            grid,
            eta=eta,
            prediction=prediction,
            clip=bounds.clip,
            threshold=bounds.threshold,
            rederive=rederive,
        )
        rows = Rows.of(table, fine, len(abar), bounds).remember_x0()
        rows.why = f"a timestep below {len(abar)} with SNR > 0 where noise is predicted"
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
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x' and x̂0 as diffusers' `step` gives them, by one kernel; arguments and results are
        those. Raises ValueError for a timestep that is none, and eta outside [0, 1]."""
        if self.num_inference_steps is None:
            raise ValueError(
                "FastDDIMScheduler: step: expected set_timesteps to be called before it"
            )
        dtype = promoted(sample, model_output)
        sample = widened(sample, dtype)
        rederive = bool(use_clipped_model_output)
        placed = self._placed(sample, (float(eta), rederive) if eta or rederive else None)
        row = self._row(placed, timestep, self._told(timestep))
        if not eta:
            variance_noise = None
        elif variance_noise is None:
            variance_noise = draw(model_output, generator, model_output.dtype)
        elif generator is not None:
            raise ValueError(
                "FastDDIMScheduler: variance_noise: expected none beside a generator, got both"
            )
        x, h = self._advance(placed, row, model_output, sample, dtype, variance_noise, blank=True)
        x0 = h.squeeze(0).to(dtype)
        if not return_dict:
            return x, x0
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0)


def check_snr(scheduler: Any, timesteps: Tensor, abar: Tensor) -> None:
    """Raises ValueError for a listed timestep at which predicted noise says nothing about x0."""
    config = scheduler.config
    if config.prediction_type != "epsilon" or not config.rescale_betas_zero_snr:
        return
    timesteps, abar = timesteps.cpu(), abar.cpu()
    for t in timesteps[(abar[timesteps.clamp(0, len(abar) - 1)] == 0)].tolist():
        raise ValueError(
            f"{type(scheduler).__name__}: prediction_type: expected v_prediction or sample where"
            f" the SNR is 0, at timestep {t}, got epsilon: predicted noise says nothing about x0"
            " there (rescale_betas_zero_snr is for models that predict v)"
        )


def drop_negative(scheduler: Any) -> None:
    """Trailing spacing of some numbers of steps (61 of 1000) ends at -1, by the rounding of numpy's
    arange; diffusers steps from there as from the noisiest timestep. The step before it is last."""
    if scheduler.timesteps[-1] < 0:
        scheduler.timesteps = scheduler.timesteps[:-1]
