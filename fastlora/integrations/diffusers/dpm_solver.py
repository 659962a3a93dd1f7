"""Multistep DPM-Solver: what it remembers of the model is the kernel's history."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastlora.integrations.diffusers.base import FastScheduler, Placed, Rows, draw, widened
from fastlora.samplers.levels import flow, preserving
from fastlora.samplers.solvers.dpm_solver import dpm_solver

DATA = ("dpmsolver++", "sde-dpmsolver++")  # in x0; the others are in eps


class FastDPMSolverMultistepScheduler(FastScheduler, DPMSolverMultistepScheduler):
    """diffusers' DPMSolverMultistepScheduler whose `step` is one `sampler_step`; see
    `fastlora.samplers.dpm_solver`. What it remembers is float32 whatever the samples are."""

    predictions = ("epsilon", "sample", "v_prediction", "flow_prediction")
    _began = 0  # the step that had nothing to look back on
    _kept: tuple[Tensor, ...] = ()  # the history, and its parts as they are in model_outputs

    def check_config(self) -> None:
        super().check_config()
        config, by_flow = self._options, bool(self._options.use_flow_sigmas)
        algorithm, prediction = config.algorithm_type, config.prediction_type
        on = "with" if by_flow else "without"
        if (prediction == "flow_prediction") != by_flow and prediction in (
            "flow_prediction",
            "v_prediction",
        ):
            expected = "flow_prediction, epsilon or sample" if by_flow else "another"
            self._refuse("prediction_type", f"{expected} {on} use_flow_sigmas", prediction)
        if prediction == "flow_prediction" and algorithm not in DATA:
            self._refuse("algorithm_type", f"{' or '.join(DATA)} for flow_prediction", algorithm)
        order = config.solver_order
        if order not in (1, 2, 3) or (order == 3 and algorithm == "sde-dpmsolver"):
            expected = "1 or 2" if algorithm == "sde-dpmsolver" else "1, 2 or 3"
            self._refuse("solver_order", f"{expected} for {algorithm}", order)

    def _levels(self) -> tuple[Any, ...]:
        return self._internal_dict, self.timesteps, self.sigmas

    def _check_timesteps(self) -> None:
        self._made(0)

    def _rows(self, variant: int) -> Rows:
        """Those from the step `variant` on, which has nothing to look back on."""
        config, bounds = self._options, self._bounds()
        sigmas = self.sigmas.detach().to("cpu", torch.float64, copy=True)
        count = len(sigmas) - 1
        # A level that comes twice is a step that stays where it is. What looks back over it divides
        # by nothing: those rows are left out, and the others do not depend on a billionth.
        stays = torch.zeros(count, dtype=torch.bool)
        stays[:-1] = sigmas[1:count] == sigmas[: count - 1]
        for i in stays.nonzero().flatten().tolist():
            sigmas[i + 1] = sigmas[i] * (1 - 1e-9)
        sigmas[-1] = torch.minimum(sigmas[-1], sigmas[-2] * (1 - 1e-9))
        looked = torch.zeros_like(stays)
        for back in range(1, min(config.solver_order, count)):
            looked[back:] |= stays[:-back] & (torch.arange(back, count) >= variant + back)
        grid = (flow if config.use_flow_sigmas else preserving)(torch.arange(count), sigmas)
        table = dpm_solver(
            grid,
            prediction=self._prediction(),
            order=config.solver_order,
            algorithm=config.algorithm_type,
            solver_type=config.solver_type,
            lower_order_final=bool(config.lower_order_final),
            euler_at_final=bool(config.euler_at_final),
            clip=bounds.clip,
            threshold=bounds.threshold,
            begin=variant,
        )
        rows = Rows.of(table, torch.arange(variant, count), count, bounds)
        rows.coefficients[looked] = torch.nan
        rows.why = f"a step index from {variant} to {count - 1} that looks back on other levels"
        return rows

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """x' as diffusers' `step` gives it, by one kernel; arguments and results are those. Raises
        ValueError where set_timesteps was not called, or levels repeat that it looks back on."""
        if self.num_inference_steps is None:
            raise ValueError(
                "FastDPMSolverMultistepScheduler: step: expected set_timesteps to be called before"
            )
        step = self._due(timestep)
        config = self._options
        data, prediction = config.algorithm_type in DATA, config.prediction_type
        if config.variance_type in ("learned", "learned_range") and prediction == "epsilon":
            model_output = model_output[:, :3]  # then come the variances, which it does not use
        dtype = model_output.dtype
        if prediction != ("sample" if data else "epsilon"):  # not what it remembers
            dtype = torch.promote_types(sample.dtype, dtype)
        sample = widened(sample, dtype)
        if self.lower_order_nums < config.solver_order:
            self._began = step - self.lower_order_nums
        placed = self._placed(sample, self._began)
        row = placed.row(step, self)
        noise = None
        if config.algorithm_type.startswith("sde"):
            noise = variance_noise
            if noise is None:
                noise = draw(model_output, generator, torch.float32)
        history = self._history(placed, sample)
        x, h = self._advance(placed, row, model_output, sample, dtype, noise, history)
        self._remember(h)
        if self.lower_order_nums < config.solver_order:
            self.lower_order_nums += 1
        self._step_index = step + 1
        if not return_dict:
            return (x,)
        return SchedulerOutput(prev_sample=x)

    def _history(self, placed: Placed, sample: Tensor) -> Tensor | None:
        """What the kernel looks back on: what it has written itself, unless somebody has put
        something else into model_outputs."""
        parts = self._options.solver_order - 1
        if not parts:
            return None
        if not self.lower_order_nums:
            shape = (parts, *sample.shape)
            return torch.zeros(shape, device=sample.device, dtype=placed.table.dtype)
        last = self.model_outputs[: -parts - 1 : -1]  # the newest first
        kept = self._kept
        if len(kept) == parts + 1 and all(a is b for a, b in zip(last, kept[1:], strict=True)):
            return kept[0]
        there = [m if isinstance(m, Tensor) else torch.zeros_like(sample) for m in last]
        return torch.stack([m.to(sample.device, placed.table.dtype) for m in there])

    def _remember(self, history: Tensor) -> None:
        if not history.numel():
            return
        parts = history.unbind()
        self._kept = (history, *parts)
        outputs: list[Any] = self.model_outputs
        outputs[:-1] = outputs[1:]
        outputs[-len(parts) :] = parts[::-1]
