"""A model with every kind of layer that files adapt, and what changes make of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastlora.formats.changes import Change, LowRank, Target


class Net(nn.Module):
    """Tokens [4] to [4, 5]: an embedding, convolutions (one grouped) and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.point = nn.Conv2d(8, 8, 1)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.proj = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens).t().reshape(1, 6, 2, 2)
        x = self.point(self.grouped(self.conv(x).tanh())).flatten(2)[0].t()
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.proj(x)


TOKENS = torch.tensor([1, 7, 3, 10])
LAYERS = ["tokens", "conv", "point", "blocks.0", "blocks.1", "proj"]


def net() -> Net:
    return Net().double().eval()


def random_lora(module: nn.Module, rank: int = 4, dora: bool = False, **fields: object) -> Change:
    """A LoRA of a layer, float64, with magnitudes in [0.5, 1.5)."""
    assert isinstance(module.weight, Tensor)
    shape, embedding = module.weight.shape, isinstance(module, nn.Embedding)
    groups = getattr(module, "groups", 1)
    ends = (shape[0], shape[1:]) if not embedding else (shape[1], shape[:1])
    down, up = torch.randn(rank, *ends[1]), torch.randn(ends[0], rank // groups)
    up = up.reshape(*up.shape, *[1] * (down.dim() - 2))
    magnitude = torch.rand(ends[0]).double() + 0.5 if dora else None
    weight = LowRank(down.double(), up.double(), embedding=embedding, **fields)  # type: ignore[arg-type]
    return Change(weight, magnitude=magnitude, axis="in" if embedding else "out")


def randomize(module: nn.Module, words: Iterable[str]) -> None:
    """Random values for the parameters whose names have one of the words: adapters start at 0."""
    for name, parameter in module.named_parameters():
        if any(word in name for word in words):
            parameter.data = torch.rand_like(parameter) + 0.1


def changed_output(model: nn.Module, changes: Mapping[Target, Change], *inputs: object) -> object:
    """The model's output with every weight and bias as the changes say."""
    own = dict(model.named_parameters())
    for target, change in changes.items():
        own[f"{target.path}.weight"] = change.changed(own[f"{target.path}.weight"].detach())
        if change.bias is not None:
            own[f"{target.path}.bias"] = own[f"{target.path}.bias"] + change.bias
    return functional_call(model, own, inputs)
