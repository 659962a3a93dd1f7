"""A small model with every kind of layer that can be adapted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastlora
from tests.adapters.oracles import randomise


class Net(nn.Module):
    """Every kind of layer on one path: tokens -> embedding -> image -> convolutions -> linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="reflect")
        self.norm = nn.GroupNorm(2, 8)
        self.inner = nn.Sequential(nn.Linear(8, 10), nn.SiLU(), nn.Linear(10, 6))

    def forward(self, tokens: Tensor) -> Tensor:  # [batch, 4] -> [batch, 16, 6]
        x = self.embedding(tokens).view(len(tokens), 4, 4, 4)
        x = self.norm(self.grouped(self.conv(x)))
        return self.inner(x.flatten(2).mT)


def net(*names: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net()
    for name in names:
        fastlora.inject(model, fastlora.LoRA(rank=4), name=name, seed=0)
    randomise(model, size=0.5)
    return model, torch.randint(0, 12, (5, 4))


def mixed() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net()
    fastlora.inject(model, fastlora.LoRA(rank=4, alpha=2, dora=True), name="a", seed=0)
    fastlora.inject(model, fastlora.LoRA(rank=2), where=["conv", "inner.2"], name="b")
    fastlora.inject(model, fastlora.Spectral(), where=["norm", "inner.0"], name="s")
    randomise(model, size=0.5)
    fastlora.set_scale(model, {"a": 0.5, "b": -2.0})
    return model, torch.randint(0, 12, (5, 4))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}
