"""What the schedulers share: tables kept by the levels they were made for, and the one call a step.

The noise levels are the scheduler's own (`alphas_cumprod`, `sigmas`, `timesteps`, as diffusers'
`set_timesteps` or the user left them), the rows are computed of them in float64.
"""

from __future__ import annotations

import functools
import inspect
import json
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastlora import ops
from fastlora.ops.sampler_step import COLUMNS
from fastlora.samplers.arguments import describe, number
from fastlora.samplers.grid import Grid
from fastlora.samplers.options import DEFAULTS, PREDICTIONS
from fastlora.samplers.table import Table

MANY = 64  # variants of arguments whose tables are kept


@dataclass
class Rows:
    """One row a step [S, 22] float64, NaN where there is none; `why` says for people what is
    missing there. `extra`: what else a class needs of each step."""

    coefficients: Tensor
    threshold: tuple[float, float] = (0.0, 1.0)
    why: str = "a step of the schedule"
    extra: Any = None

    @classmethod
    def of(cls, table: Table, at: Tensor, count: int, bounds: Bounds | None = None) -> Rows:
        """The table's rows at the places `at` of `count`; the history, if any, remembers x̂0."""
        rows = torch.full((count, len(COLUMNS)), torch.nan, dtype=torch.float64)
        coefficients = table.coefficients.clone()
        coefficients[:, COLUMNS.index("m")] = 1.0  # what comes out is x', not the model's input
        if bounds is not None and bounds.divide != 1.0:
            coefficients[:, :2] /= bounds.divide  # k_x, k_e
        rows[at] = coefficients
        return cls(rows, table.threshold or (0.0, 1.0))

    def remember_x0(self) -> Rows:
        self.coefficients[:, COLUMNS.index("g_0")] += 1  # NaN stays NaN
        return self

    def column(self, name: str) -> Tensor:
        return self.coefficients[:, COLUMNS.index(name)]


class Placed:
    """Rows where the samples are."""

    def __init__(self, rows: Rows, device: torch.device, dtype: torch.dtype) -> None:
        self.rows, self.extra = rows, rows.extra
        self.table = rows.coefficients.to(device, dtype)
        self.weights = torch.ones(1, 1, 1, device=device, dtype=dtype)
        self.threshold = rows.threshold
        self._steps = torch.arange(len(rows.coefficients), device=device)
        self._index: dict[int, Tensor] = {}

    def row(self, step: int, owner: object = None) -> Tensor:
        """The number of a row [] int64, where the table is. Raises ValueError where it has none."""
        found = self._index.get(step)
        if found is None:
            rows = self.rows.coefficients
            if not 0 <= step < len(rows) or bool(rows[step, 0].isnan()):
                name = type(owner).__name__
                raise ValueError(f"{name}: timestep: expected {self.rows.why}, got {step}")
            found = self._index[step] = self._steps[step]
        return found


@dataclass
class Bounds:
    """How x̂0 is bounded: arguments of solvers, and by what it is divided afterwards."""

    clip: float | None = None
    threshold: tuple[float, float] | None = None
    divide: float = 1.0


class Tables:
    """All that was computed of the same levels: as long as these objects are the same, and nobody
    has written to them."""

    def __init__(self, levels: tuple[Any, ...], timesteps: list[float]) -> None:
        self.timesteps = timesteps
        self.rows: dict[Any, Rows] = {}
        self.placed: dict[Any, Placed] = {}
        self._levels = levels  # alive, so that what has the same id is the same
        self._ids = [*map(id, levels)]
        # tensors of inference mode have no versions
        tensors = (level for level in levels if isinstance(level, Tensor))
        self._watched = [tensor for tensor in tensors if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._watched]

    def hold(self, levels: tuple[Any, ...]) -> bool:
        """Whether they are of these levels."""
        if [*map(id, levels)] != self._ids:
            return False
        return [tensor._version for tensor in self._watched] == self._versions


class FastScheduler:
    """Goes before a scheduler class of diffusers. A subclass says which `_levels` its tables depend
    on, and makes the `_rows` of a variant of `step`'s arguments from them."""

    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction")
    replaces: ClassVar[type]  # diffusers' own class
    original: Any = None  # the object in the place of which `accelerate` has put this one

    keep_float32 = True  # between steps, where samples have 16 bits

    _tables: Tables | None = None
    _precise: tuple[Any, int, Tensor] | None = None  # the last x' in 16 bits, and in float32
    timesteps: Tensor
    _internal_dict: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base: Any = next((c for c in cls.__bases__ if c.__module__.startswith("diffusers.")), None)
        if base is None:  # no scheduler yet, or somebody's own, with methods of its own
            return
        cls.replaces = base

        # diffusers reads the options' names from the signatures, which `wraps` hands on
        @functools.wraps(base.__init__)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            base.__init__(self, *args, **kwargs)
            self.check_config()

        @functools.wraps(base.set_timesteps)
        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
            base.set_timesteps(self, *args, **kwargs)
            self._check_timesteps()

        cls.__init__ = init  # type: ignore[method-assign]
        cls.set_timesteps = set_timesteps  # type: ignore[attr-defined]

    # --- what a class defines ---

    def _levels(self) -> tuple[Any, ...]:
        """Objects that the tables were made of: whoever changes one of them changes the tables."""
        raise NotImplementedError

    def _rows(self, variant: Any) -> Rows:
        raise NotImplementedError

    def _check_timesteps(self) -> None:
        """Says before the loop what the loop would say."""
        self._made(None)

    def check_config(self) -> None:
        """Raises ValueError for an option that the table cannot honour, by its name."""
        known = DEFAULTS[self.replaces.__name__]
        parameters = inspect.signature(self.replaces.__init__).parameters
        for option, parameter in list(parameters.items())[1:]:
            value = getattr(self._options, option, parameter.default)
            if option not in known and value != parameter.default:
                self._refuse(option, f"{parameter.default!r}, unknown here otherwise", value)
        prediction = getattr(self._options, "prediction_type", None)
        if prediction is not None and prediction not in self.predictions:
            self._refuse("prediction_type", f"one of {', '.join(self.predictions)}", prediction)
        self._bounds()

    # --- what they use ---

    @property
    def _options(self: Any) -> Any:
        return self.config

    def _due(self: Any, timestep: Any) -> int:
        """The index of the step, of those who count: from the begin index or the timestep on."""
        if self._step_index is None:
            self._init_step_index(timestep)
        index: Any = self._step_index
        return index

    def _init_step_index(self: Any, timestep: Any) -> None:
        """As diffusers does, but without asking a GPU for a timestep that is known."""
        told = None
        if isinstance(timestep, Tensor) and not timestep.is_cpu and self._begin_index is None:
            told = self._told(timestep)
        if told is None:
            super()._init_step_index(timestep)  # type: ignore[misc]
        else:
            self._step_index = nth(told, self._current().timesteps)

    def _check_no_index(self, timestep: Any) -> None:
        """Raises ValueError for an int where timesteps are not whole, as diffusers does."""
        index = isinstance(timestep, int)
        if isinstance(timestep, Tensor) and timestep.is_cpu:
            index = timestep.dtype in (torch.int32, torch.int64)
        if index:
            raise ValueError(
                f"{type(self).__name__}: timestep: expected one of scheduler.timesteps, not an"
                f" index, got {timestep!r}"
            )

    def _refuse(self, option: str, expected: str, got: object) -> None:
        raise ValueError(
            f"{type(self).__name__}: {option}: expected {expected}, got {got!r}"
            f" (diffusers.{self.replaces.__name__} may take it)"
        )

    def _prediction(self) -> str:
        return PREDICTIONS[self._options.prediction_type]

    def _bounds(self) -> Bounds:
        """Of clip_sample and thresholding, which comes first."""
        config = self._options
        if getattr(config, "thresholding", False):
            quantile, largest = config.dynamic_thresholding_ratio, config.sample_max_value
            if not 0 <= number(quantile) <= 1:
                self._refuse("dynamic_thresholding_ratio", "a number from 0 to 1", quantile)
            if not 0 < number(largest) < torch.inf:
                self._refuse("sample_max_value", "a number > 0", largest)
            if largest <= 1:  # then it is the threshold whatever the sample: clip(x̂0)/largest
                return Bounds(clip=1.0, divide=float(largest))
            return Bounds(threshold=(max(float(quantile), 1e-30), float(largest)))
        if getattr(config, "clip_sample", False):
            limit = config.clip_sample_range
            if not 0 < number(limit) < torch.inf:
                self._refuse("clip_sample_range", "a number > 0", limit)
            return Bounds(clip=float(limit))
        return Bounds()

    def _current(self) -> Tables:
        tables, levels = self._tables, self._levels()
        if tables is None or not tables.hold(levels):
            tables = self._tables = Tables(levels, self.timesteps.tolist())
        return tables

    def _made(self, variant: Any) -> Rows:
        tables = self._current()
        rows = tables.rows.get(variant)
        if rows is None:
            if len(tables.rows) >= MANY:
                tables.rows.clear()
                tables.placed.clear()
            with torch.inference_mode(False):  # so that gradients may be taken of them elsewhere
                rows = tables.rows[variant] = self._rows(variant)
        return rows

    def _placed(self, sample: Tensor, variant: Any = None) -> Placed:
        """The table of a variant where the sample is, in the dtype of its arithmetic."""
        wide = torch.float64 if sample.dtype == torch.float64 else torch.float32
        key = variant, sample.device, wide
        tables = self._current()
        placed = tables.placed.get(key)
        if placed is None:
            rows = self._made(variant)
            with torch.inference_mode(False):
                placed = tables.placed[key] = Placed(rows, sample.device, wide)
        return placed

    def _told(self, timestep: Any) -> float | None:
        """The timestep as a number; None where only the device knows it. A loop over a scheduler's
        timesteps never waits for the device: its elements are known by their places."""
        if not isinstance(timestep, Tensor):
            return timestep
        if timestep.numel() != 1:
            name, got = type(self).__name__, describe(timestep)
            raise ValueError(f"{name}: timestep: expected one number, got {got}")
        if timestep.is_cpu:
            return timestep.item()
        place = place_of(timestep, self.timesteps)
        return None if place is None else self._current().timesteps[place]

    def _row(self, placed: Placed, timestep: Any, told: float | None) -> Tensor:
        """The row of a table over all timesteps."""
        if told is None:
            return timestep.reshape(()).long()
        step = int(told)
        if step != told:
            name = type(self).__name__
            raise ValueError(f"{name}: timestep: expected a whole number, got {told!r}")
        return placed.row(step, self)

    def _advance(
        self,
        placed: Placed,
        row: Tensor,
        output: Tensor,
        sample: Tensor,
        dtype: torch.dtype,
        noise: Tensor | None = None,
        history: Tensor | None = None,
        blank: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """x' in `dtype` and the history, by one `sampler_step`; `blank`: a history of one part that
        is only written.

        Where `dtype` has 16 bits, x' is computed and remembered in float32, and rounded for the
        caller: the next step, if it is given that very tensor and nobody has written to it, goes on
        from what was remembered.
        """
        wide = placed.table.dtype
        narrow = dtype != wide
        if sample.dtype != wide:
            sample = self._remembered(sample, wide)
        if noise is not None:
            noise = noise.to(sample.device, wide)
            if noise.shape != sample.shape:
                noise = noise.expand(sample.shape)
        quantile, largest = placed.threshold
        x_next, history_next, rounded = ops.sampler_step(
            sample,
            [output],
            placed.weights,
            placed.table,
            row,
            sample.unsqueeze(0) if blank else history,
            None,
            noise,
            None,
            None,
            None,
            quantile,
            largest,
            1 if narrow else 0,
            dtype if narrow else wide,
        )
        if not narrow:
            return x_next, history_next
        if self.keep_float32 and not (x_next.requires_grad or rounded.is_inference()):
            given = weakref.ref(rounded, self._forget)
            self._precise = given, rounded._version, x_next
        return rounded, history_next

    def _forget(self, given: Any) -> None:
        if self._precise is not None and self._precise[0] is given:
            self._precise = None

    def _remembered(self, sample: Tensor, wide: torch.dtype) -> Tensor:
        """The sample in the arithmetic's dtype: what it was rounded from, if that is known."""
        given, version, precise = self._precise or (None, 0, None)
        self._precise = None
        if given is not None and given() is sample and sample._version == version:
            assert precise is not None
            if precise.dtype == wide:
                return precise
        return sample.to(wide)

    # --- what diffusers' own methods say ---

    def to_json_string(self) -> str:
        """As diffusers writes it, for the class that everybody has."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = self.replaces.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        return [cls.replaces, *(c for c in super()._get_compatibles() if c is not cls.replaces)]  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own tables."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_tables", "_precise")}


def place_of(element: Tensor, listed: Tensor) -> int | None:
    """Which element of `listed` this tensor is, by its address: as long as it lives nothing else is
    there. None for a copy."""
    if element.device != listed.device or element.dtype != listed.dtype:
        return None
    size, at = listed.element_size(), element.data_ptr() - listed.data_ptr()
    inside = listed.is_contiguous() and 0 <= at < size * listed.numel()
    return at // size if inside else None


def nth(told: float, timesteps: list[float]) -> int:
    """Where it is listed; the second place where there are more, which is diffusers' rule."""
    found = [i for i, listed in enumerate(timesteps) if listed == told]
    return found[1] if len(found) > 1 else found[0]


def promoted(a: Tensor, b: Tensor) -> torch.dtype:
    return a.dtype if a.dtype == b.dtype else torch.promote_types(a.dtype, b.dtype)


def widened(sample: Tensor, dtype: torch.dtype) -> Tensor:
    """The sample in the dtype of the result where that has more bits: x' is rounded to it once."""
    fits = sample.dtype == dtype or sample.dtype.itemsize >= dtype.itemsize
    return sample if fits else sample.to(dtype)


def draw(like: Tensor, generator: Any, dtype: torch.dtype) -> Tensor:
    """The numbers that diffusers would draw."""
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)  # type: ignore[arg-type]


def abar_grid(
    timesteps: Tensor, abar: Tensor, abar_next: Tensor, prediction: str
) -> tuple[Grid, Tensor]:
    """The grid of the steps between these levels, and which of them are steps at all: not from
    outside of [0, 1], and not from SNR 0 where the model predicts noise."""
    lowest = 0.0 if prediction != "epsilon" else torch.finfo(torch.float64).tiny
    fine = (abar >= lowest) & (abar <= 1) & (abar_next > 0) & (abar_next <= 1)
    alpha, sigma = abar[fine].sqrt(), (1 - abar[fine]).sqrt()
    alpha_next, sigma_next = abar_next[fine].sqrt(), (1 - abar_next[fine]).sqrt()
    ones = torch.ones_like(alpha)
    return Grid(timesteps[fine], alpha, sigma, alpha_next, sigma_next, ones), fine
