"""The small text-conditioned diffusion model of handwritten digits, with its weights.

`fastlora.models.digits.load()` gives the trained model; `fastlora.methods.pretrain_digits` made its
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ._files import load_weights
from .text import Tokenizer, text_encoder
from .unet import UNet, UNetConfig

WEIGHTS = Path(__file__).with_name("weights") / "digits.safetensors"
CONFIG = UNetConfig(in_channels=1, block_out_channels=(32, 64, 96), attention=(False, True, True))


class DigitsModel(nn.Module):
    """`model(x [B, 1, 32, 32], t int64 [B], cond [B, 16, 64]) -> v [B, 1, 32, 32]`.

    Pictures are in [-1, 1]. `encode` turns captions into `cond`; "" is the empty caption that
    guidance takes for unconditional. The model was trained to predict `v = a eps - s x0` on the
    schedule that `schedule_config` describes.
    """

    shape: ClassVar[tuple[int, ...]] = (1, 32, 32)
    schedule_config: ClassVar[dict[str, Any]] = {"kind": "cosine", "T": 1000, "prediction": "v"}

    def __init__(self, config: UNetConfig = CONFIG) -> None:
        super().__init__()
        self.tokenizer = Tokenizer()
        self.text_encoder = text_encoder(self.tokenizer, dim=config.cross_attention_dim)
        self.unet = UNet(config)

    def encode(self, captions: str | Sequence[str]) -> torch.Tensor:
        """Hidden states [B, 16, 64] of captions, differentiable in the text encoder's weights."""
        device = next(self.text_encoder.parameters()).device
        return self.text_encoder(input_ids=self.tokenizer(captions).to(device)).last_hidden_state

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, cond)


def load(
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    weights: str | Path = WEIGHTS,
) -> DigitsModel:
    """The trained model in eval mode, all parameters frozen; float32 on the CPU by default.

    Raises ImportError without transformers, ValueError for foreign weights.
    """
    model = DigitsModel()
    load_weights(model, weights)
    return model.requires_grad_(False).eval().to(device=device, dtype=dtype)
