"""A solver is a table: one row of coefficients for each step, computed in float64 on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.ops.sampler_step import COLUMNS

_HISTORY = ("c_h", "g_x", "g_0", "g_e")


@dataclass(frozen=True, eq=False)
class Table:
    """The rows that `fastlora.ops.sampler_step` applies, one a step; see there for their meaning.

    `coefficients` [S, 12] float64, columns in the order of `COLUMNS`; `timesteps` [S] int64, what
    the model is told at each step; `prediction`, what the model predicts; `name`, the solver for
    people to read.
    """

    coefficients: Tensor  # [S, 12]
    timesteps: Tensor  # [S]
    prediction: str
    name: str

    def __post_init__(self) -> None:
        if not self.timesteps.numel():
            raise ValueError("Table: timesteps: expected at least one, got none")
        expected = (self.timesteps.numel(), len(COLUMNS))
        if tuple(self.coefficients.shape) != expected or self.coefficients.dtype != torch.float64:
            raise ValueError(
                f"Table: coefficients: expected float64 {list(expected)}, got"
                f" {self.coefficients.dtype} {list(self.coefficients.shape)}"
            )
        finite = self.coefficients.isfinite()
        finite[:, COLUMNS.index("clip")] = self.column("clip") > 0  # +inf is no clipping
        if not bool(finite.all()):
            row, column = finite.logical_not().nonzero()[0].tolist()
            raise ValueError(
                f"Table: coefficients: expected finite numbers and clip > 0, got {COLUMNS[column]}"
                f" = {self.coefficients[row, column].item()} at step {row}"
                f" (t = {self.timesteps[row].item()})"
            )

    @classmethod
    def of(cls, name: str, prediction: str, timesteps: Tensor, **columns: Tensor | float) -> Table:
        """A table by column names, each [S] or a number; unnamed: m = 1, clip = inf, else 0."""
        values = {"m": 1.0, "clip": math.inf} | columns
        rows = torch.zeros(len(timesteps), len(COLUMNS), dtype=torch.float64)
        for column, value in values.items():
            rows[:, COLUMNS.index(column)] = torch.as_tensor(value, dtype=torch.float64)
        return cls(rows, timesteps, prediction, name)

    def __len__(self) -> int:
        return self.timesteps.numel()

    def column(self, name: str) -> Tensor:
        """One column [S], by its name in `COLUMNS`."""
        return self.coefficients[:, COLUMNS.index(name)]

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise, so that samples need seeds."""
        return bool((self.column("c_n") != 0).any())

    @property
    def remembers(self) -> bool:
        """Whether any step reads or writes the history h."""
        return any(bool((self.column(name) != 0).any()) for name in _HISTORY)
