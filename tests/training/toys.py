"""A model small enough to know everything about."""

from __future__ import annotations

import torch
from torch import nn

from fastlora.samplers import Schedule

SCHEDULE = Schedule.cosine(100)


class Toy(nn.Module):
    """`x [B, 6], t, cond [B, 4] -> [B, 6]`: a linear layer on x, one on cond, dropout between."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.cond, self.last = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 6)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        h = self.first(x) + self.cond(cond) + t.to(x.dtype)[:, None] / 100
        return self.last(self.dropout(torch.tanh(h)))


def toy_batches(generator: torch.Generator) -> dict[str, torch.Tensor]:
    x0 = torch.randn(8, 6, generator=generator)
    return {"x0": x0, "cond": x0[:, :4]}
