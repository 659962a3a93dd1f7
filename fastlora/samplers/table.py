"""A solver is a table: one row of coefficients for each step, computed in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastlora.ops.sampler_step import COLUMNS
from fastlora.samplers.arguments import integer, number, on_host
from fastlora.samplers.grid import Grid

Number = Tensor | float  # [S], or the same for all steps


@dataclass(frozen=True, eq=False)
class Combination:
    """`x x + x0 x̂0 + eps ε̂ + h h + r r`: what a solver computes, by its coefficients."""

    x: Number = 0.0
    x0: Number = 0.0
    eps: Number = 0.0
    h: Number = 0.0
    r: Number = 0.0

    def __add__(self, other: Combination) -> Combination:
        return Combination(*(a + b for a, b in zip(self._parts, other._parts, strict=True)))

    def __sub__(self, other: Combination) -> Combination:
        return self + other * -1.0

    def __mul__(self, factor: Number) -> Combination:
        return Combination(*(part * factor for part in self._parts))

    @property
    def _parts(self) -> tuple[Number, ...]:
        return self.x, self.x0, self.eps, self.h, self.r


# What solvers combine: the sample, the model's estimates of data and noise, what was remembered.
X, X0, EPS = Combination(x=1.0), Combination(x0=1.0), Combination(eps=1.0)
H, R = Combination(h=1.0), Combination(r=1.0)


def rederived(grid: Grid) -> Combination:
    """eps as `(x - alpha x̂0) / sigma`, which follows x̂0 where that is clipped."""
    over_sigma = torch.where(grid.sigma == 0, 0.0, 1 / grid.sigma)
    return (X - X0 * grid.alpha) * over_sigma


@dataclass(frozen=True, eq=False)
class Table:
    """The rows that `fastlora.ops.sampler_step` applies, one a step; see there for their meaning.

    `coefficients` [S, 22] float64, columns in the order of `COLUMNS`; `timesteps` [S] int64 or
    float64, what the model is told at each step; `prediction`, what the
    model predicts; `name`, the solver for people to read. Samples start as noise times
    `init_noise_sigma`, and the first model call sees that times `input_scale`. `threshold`:
    (quantile, largest) of dynamic thresholding. `levels` [S, 2] float64: alpha and sigma where the
    model is called, where that is known.
    """

    coefficients: Tensor  # [S, 22]
    timesteps: Tensor  # [S]
    prediction: str
    name: str
    init_noise_sigma: float = 1.0
    input_scale: float = 1.0
    threshold: tuple[float, float] | None = None
    levels: Tensor | None = None  # [S, 2]

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
    @on_host
    def build(
        cls,
        name: str,
        grid: Grid,
        prediction: str,
        x_next: Combination,
        history: Sequence[Combination] = (),
        noise: Number = 0.0,
        clip: float | None = None,
        threshold: tuple[float, float] | None = None,
    ) -> Table:
        """The table of `x' = x_next + noise z` and of what the history remembers, h' and r'.

        Without clipping x̂0 is a combination of x and the model's output, which is put in for it:
        so says float64 what float32 would lose. Raises ValueError for a clip that is no number
        above 0, a threshold that is none, both, or an unknown prediction.
        """
        operator = name.partition("(")[0]
        if clip is not None and not 0 < number(clip) < math.inf:
            raise ValueError(f"{operator}: clip: expected a positive number or None, got {clip!r}")
        if threshold is not None:
            pair = isinstance(threshold, (tuple, list)) and len(threshold) == 2
            quantile, largest = map(number, threshold) if pair else (0.0, 0.0)
            if not (0 < quantile <= 1 <= largest) or clip is not None:
                beside = "" if clip is None else f" beside {clip}"
                raise ValueError(
                    f"{operator}: threshold: expected None or (quantile in (0, 1], largest >= 1)"
                    f" without clip, got {threshold!r}{beside}"
                )
            threshold = quantile, largest
        k_x, k_e, a_x, a_e = grid.readings(prediction, operator)
        plain = clip is None and threshold is None
        columns: dict[str, Number] = {}
        for letter, part in zip("cgr", (x_next, *history), strict=False):
            x0_x, x0_e = (part.x0 * k_x, part.x0 * k_e) if plain else (0.0, 0.0)
            columns |= {
                f"{letter}_x": part.x + part.eps * a_x + x0_x,
                f"{letter}_0": 0.0 if plain else part.x0,
                f"{letter}_e": part.eps * a_e + x0_e,
                f"{letter}_h": part.h,
                f"{letter}_r": part.r,
            }
        scale = grid.input_scale
        # What is known is as it was given in the end, also where x' keeps a trace of noise there
        cleaner = grid.sigma_next[-1] * grid.alpha[0] < grid.sigma[0] * grid.alpha_next[-1]
        ends = (torch.arange(len(grid)) == len(grid) - 1) & cleaner
        columns |= {
            "k_x": k_x,
            "k_e": k_e,
            "c_n": noise,
            "p_0": torch.where(ends, 1.0, grid.alpha_next),
            "p_e": torch.where(ends, 0.0, grid.sigma_next),
            "m": torch.cat((scale[1:], torch.ones_like(scale[:1]))),
            "clip": math.inf if clip is None else number(clip),
        }
        starts = grid.init_noise_sigma, scale[0].item(), threshold
        levels = torch.stack((grid.alpha, grid.sigma), 1)
        rows = _rows(grid.timesteps, columns)
        return cls(rows, grid.timesteps, prediction, name, *starts, levels)

    @classmethod
    @on_host
    def of(cls, name: str, prediction: str, timesteps: Tensor, **columns: Number) -> Table:
        """A table by column names, each [S] or a number; unnamed: m = 1, clip = inf, else 0."""
        values = {"m": 1.0, "clip": math.inf} | columns
        return cls(_rows(timesteps, values), timesteps, prediction, name)

    def __len__(self) -> int:
        return self.timesteps.numel()

    def __repr__(self) -> str:
        """The name, and the columns that are not the same in all rows or do something."""
        plain = {"m": 1.0, "clip": math.inf}
        used = [c for c in COLUMNS if bool((self.column(c) != plain.get(c, 0.0)).any())]
        shown = [*range(len(self))]
        if len(shown) > 8:
            shown = [*shown[:5], -1, *shown[-2:]]  # -1: those between
        lines = ["".join(f"{head:>11}" for head in ("timestep", *used))]
        for row in shown:
            values = [self.timesteps[row].item(), *(self.column(c)[row].item() for c in used)]
            lines.append("        ..." if row < 0 else "".join(f"{v:11.5g}" for v in values))
        return f"Table {self.name}, prediction {self.prediction}\n" + "\n".join(lines)

    def since(self, begin: int) -> Table:
        """Without the first `begin` rows: x starts at the level of row `begin`, as it is.

        Raises ValueError for what is no row of the table, or one that needs what earlier rows
        remember (`dpm_solver` and `unipc` take `begin` themselves; Heun's steps have two rows).
        """
        first = integer(begin)
        if first is None or not 0 <= first < len(self):
            raise ValueError(
                f"Table: begin: expected an int from 0 to {len(self) - 1}, got {begin!r}"
            )
        if first == 0:
            return self
        if any(self.column(name)[first].item() != 0 for name in ("c_h", "c_r")):
            raise ValueError(
                f"Table: begin: expected a row that needs nothing of those before it, got row"
                f" {first} of {self.name}"
            )
        return replace(
            self,
            coefficients=self.coefficients[first:],
            timesteps=self.timesteps[first:],
            levels=None if self.levels is None else self.levels[first:],
            init_noise_sigma=1.0,
            input_scale=self.column("m")[first - 1].item(),
        )

    def noised(self, x0: Tensor, noise: Tensor) -> Tensor:
        """`alpha x0 + sigma eps` at the first level, as `sample` takes it: an image to start from
        (divided by `init_noise_sigma`, which `sample` multiplies with).

        Raises ValueError for a table whose levels are not known."""
        if self.levels is None:
            raise ValueError("Table: noised: expected a table of a solver, got one without levels")
        alpha, sigma = (self.levels[0] / self.init_noise_sigma).tolist()
        return alpha * x0 + sigma * noise

    def negated(self) -> Table:
        """The same for a model whose output has the other sign."""
        rows = self.coefficients.clone()
        for column in ("k_e", "c_e", "g_e", "r_e"):
            rows[:, COLUMNS.index(column)] *= -1
        return replace(self, coefficients=rows)

    def column(self, name: str) -> Tensor:
        """One column [S], by its name in `COLUMNS`."""
        return self.coefficients[:, COLUMNS.index(name)]

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise, so that samples need seeds."""
        return bool((self.column("c_n") != 0).any())

    @property
    def histories(self) -> int:
        """How many tensors the solver remembers: 0, 1 or 2."""

        def used(*letters: str) -> bool:
            names = [c for c in COLUMNS if c.endswith(letters) or c.startswith(letters)]
            return any(bool((self.column(name) != 0).any()) for name in names)

        return 2 if used("r_", "_r") else 1 if used("g_", "_h") else 0


def _rows(timesteps: Tensor, columns: Mapping[str, Number]) -> Tensor:
    rows = torch.zeros(len(timesteps), len(COLUMNS), dtype=torch.float64)
    for column, value in columns.items():
        rows[:, COLUMNS.index(column)] = torch.as_tensor(value, dtype=torch.float64)
    return rows
