"""A pipeline of small models: parts by name, not all of them modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters import inject
from tests.adapters.oracles import randomise, same_bits


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.attn = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:  # [batch, 3, h, w] -> [batch, h w, 8]
        x = self.conv(x).flatten(2).mT
        return self.attn["to_k"](self.attn["to_q"](x))


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(6, 8), "to_k": nn.Linear(8, 5)})

    def forward(self, x: Tensor) -> Tensor:  # [batch, tokens, 6] -> [batch, tokens, 5]
        return self.self_attn["to_k"](self.self_attn["q_proj"](x))


class Pipeline:
    """As diffusers'."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet, self.text_encoder = UNet(), TextEncoder()
        self.vae: Any = nn.Linear(4, 4)

    @property
    def components(self) -> dict[str, Any]:
        own = {"unet": self.unet, "text_encoder": self.text_encoder, "vae": self.vae}
        return own | {"scheduler": object(), "safety_checker": None}

    def __call__(self, x: Tensor, prompt: Tensor) -> Tensor:
        return self.unet(x).sum() + self.text_encoder(prompt).sum()


def adapted() -> Pipeline:
    """With "style" in the UNet and the text encoder, "extra" in the UNet alone."""
    pipe = Pipeline()
    style = fastlora.LoRA(rank=4, alpha=2.0)
    inject(pipe.unet, style, name="style")
    inject(pipe.text_encoder, fastlora.LoRA(rank=2), name="style")
    inject(pipe.unet, fastlora.LoRA(rank=3), where=["to_q"], name="extra")
    for part in (pipe.unet, pipe.text_encoder):
        randomise(part)
    return pipe


FORMS: dict[str, Callable[[Pipeline], Any]] = {
    "pipeline": lambda pipe: pipe,
    "dict": lambda pipe: {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)},
}
X, PROMPT = torch.linspace(-1, 1, 5 * 12).view(5, 3, 2, 2), torch.linspace(-1, 1, 90).view(5, 3, 6)


def outputs(pipe: Pipeline) -> list[Tensor]:
    with torch.no_grad():
        return [pipe.unet(X), pipe.text_encoder(PROMPT)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))


def strengths(pipe: Pipeline) -> list[Any]:
    parts = (pipe.unet, pipe.text_encoder)
    return [(n, i.scale, i.enabled) for p in parts for n, i in fastlora.adapters(p).items()]
