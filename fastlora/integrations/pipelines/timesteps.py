"""Which of a scheduler's timesteps a call of the model is for, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Clock:
    """A scheduler's timesteps on the host, read once, and the step whose turn it is."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._read: Any = None  # the tensor that was read
        self.timesteps: list[float] = []

    def step(self, given: Any) -> int:
        """The index into `timesteps`, at a call of the model with the timestep `given`.

        The scheduler's own count, or else the place of `given` in the memory of its timesteps, as
        pipelines hand on elements of them. Only where neither tells, the value is read.
        """
        there = self._scheduler.timesteps
        if there is not self._read:
            self._read = there
            self.timesteps = [float(t) for t in torch.as_tensor(there).tolist()]
        step = getattr(self._scheduler, "step_index", None)
        if step is None:
            step = place_in(there, given)
        if step is None:
            step = getattr(self._scheduler, "begin_index", None)
        if step is None:
            step = self._nearest(given)
        return min(max(int(step), 0), len(self.timesteps) - 1)

    def _nearest(self, given: Any) -> int:
        """By value; flow models are given timesteps / 1000."""
        value = float(torch.as_tensor(given).reshape(-1)[0])
        distances = [min(abs(t - value), abs(t - 1000 * value)) for t in self.timesteps]
        return distances.index(min(distances))


def place_in(whole: Any, part: Any) -> int | None:
    """The index of the element that `part` is a view of; None where it is none of `whole`'s."""
    if not (isinstance(whole, Tensor) and isinstance(part, Tensor)) or not part.numel():
        return None
    if whole.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
        return None
    index = int(part.storage_offset()) - int(whole.storage_offset())
    return index if 0 <= index < len(whole) else None
