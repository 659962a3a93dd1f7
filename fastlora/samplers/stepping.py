"""One step of a sampling: a call of the model and a row of the table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora import ops
from fastlora.ops.sampler_step import COLUMNS
from fastlora.samplers.arguments import describe
from fastlora.samplers.inputs import Inputs, Model
from fastlora.samplers.table import Table


@dataclass
class State:
    """What goes from step to step."""

    x: Tensor  # [B, ...]
    history: Tensor | None  # [1 or 2, B, ...]
    model_input: Tensor  # [n * B, ...]


class Stepper:
    """A table where the samples are: coefficients [S, 22], row numbers, timesteps [S, n * B]."""

    def __init__(self, table: Table, inputs: Inputs) -> None:
        device, dtype = inputs.x.device, inputs.x.dtype
        self.table = table
        self.coefficients = table.coefficients.to(device, dtype)
        self.numbers = torch.arange(len(table), device=device)
        times = table.timesteps
        times = times.to(dtype) if times.is_floating_point() else times
        self.times = times.to(device)[:, None].repeat(1, inputs.copies * len(inputs.x))
        self.histories = table.histories
        self.quantile, self.threshold_max = table.threshold or (0.0, 1.0)

    def begin(self, inputs: Inputs) -> State:
        x = inputs.x * self.table.init_noise_sigma
        history = None
        if self.histories:
            history = x.new_zeros(self.histories, *x.shape)
        first = (x * self.table.input_scale).to(inputs.input_dtype)
        return State(x, history, first.repeat(inputs.copies, *[1] * (x.dim() - 1)))

    def advance(
        self, model: Model, inputs: Inputs, state: State, row: Tensor, time: Tensor
    ) -> tuple[State, Tensor]:
        """The state after the step in `row` [], at which the model is told `time` [n * B], and what
        the model predicted. Raises ValueError for a prediction of another shape."""
        prediction = model(state.model_input, time, inputs.cond)
        expected = state.model_input.shape
        if not isinstance(prediction, Tensor) or prediction.shape != expected:
            raise ValueError(
                f"sample: model: expected a prediction {list(expected)}, got {describe(prediction)}"
            )
        if not prediction.is_floating_point():
            raise ValueError(
                f"sample: model: expected a floating-point prediction, got {describe(prediction)}"
            )
        if prediction.dtype == torch.float64:  # a closed form, say
            prediction = prediction.to(state.x.dtype)
        x, history, model_input = self._step(
            self.coefficients, inputs, state, prediction, row, inputs.copies
        )
        return State(x, None if state.history is None else history, model_input), prediction

    def clean(self, inputs: Inputs, state: State, prediction: Tensor, index: int) -> Tensor:
        """x̂0 [B, ...] of step `index`, guided and clipped, from the state before it."""
        keep = {"k_x", "k_e", "clip"}
        kept = [1.0 if name in keep else 0.0 for name in COLUMNS]
        row = self.table.coefficients[index] * torch.tensor(kept, device="cpu")
        row[COLUMNS.index("c_0")] = row[COLUMNS.index("p_0")] = 1.0
        rows = row.to(self.coefficients)[None]
        weights = inputs.weights[index : index + 1] if len(inputs.weights) > 1 else inputs.weights
        one = Inputs(**{**vars(inputs), "weights": weights})
        return self._step(rows, one, state, prediction, self.numbers[0], 0)[0]

    def _step(
        self,
        coefficients: Tensor,
        inputs: Inputs,
        state: State,
        prediction: Tensor,
        row: Tensor,
        copies: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.sampler_step(
            state.x,
            [prediction],  # all of the first output, then all of the next
            inputs.weights,
            coefficients,
            row,
            state.history,
            inputs.seeds,
            None,
            inputs.rescale,
            inputs.mask,
            inputs.known,
            self.quantile,
            self.threshold_max,
            copies,
            inputs.input_dtype,
        )
