"""Exponential moving averages of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fastlora.samplers.arguments import number


class EMA:
    """`shadow <- d shadow + (1 - d) parameter` with `d = min(decay, (1 + n) / (10 + n))` at update
    n, in float32.

    The ramp forgets the initial weights: without it a short run would end with an average of mostly
    noise. Raises ValueError for a decay that is no number in [0, 1).
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float = 0.999) -> None:
        if not 0.0 <= number(decay) < 1.0:
            raise ValueError(f"EMA: decay: expected 0 <= decay < 1, got {decay!r}")
        self.decay = decay
        self.updates = 0
        self._parameters = dict(parameters)
        self.shadow = {name: _wide(p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in self._parameters.items():
            self.shadow[name].lerp_(p.detach().to(self.shadow[name].dtype), 1.0 - d)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrite the parameters with their averages, in their own dtypes."""
        for name, p in self._parameters.items():
            p.copy_(self.shadow[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters are the averages within the block, and bit for bit what they were after
        it.
        """
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in self._parameters.items():
                    p.copy_(kept[name])


def _wide(p: torch.Tensor) -> torch.Tensor:
    return p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
