"""Conv1D of transformers, the linear layer of GPT-2, whose weight is `[in, out]`.

Imported when a model has one: fastlora does not import transformers.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fastlora.adapters.adapted import adapts
from fastlora.adapters.layers import Gated, LinearForward
from fastlora.ops import lora_linear

_lora_linear: Any = lora_linear.eager  # type: ignore[attr-defined]


def fused(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """`lora_linear` beside a weight `[in, out]`."""
    return _lora_linear(x, weight.t(), *rest)


@adapts(Conv1D)
class AdaptedConv1D(LinearForward, Conv1D):
    """`y = x W + b` of W `[in, out]`. Updates are `[out, in]`, as in PEFT's files; DoRA's norms are
    of the columns of W, one for each output."""

    transposed = True
    fused = staticmethod(fused)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # its name for it
        return super().forward(x)

    @staticmethod
    def upright(weight: Tensor) -> Tensor:
        return weight.t()

    def matrix(self) -> Tensor:
        return self.weight.t()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t(), bias)

    def low_rank(self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Gated) -> Tensor:
        return super().low_rank(x, weight.t(), bias, slots)
