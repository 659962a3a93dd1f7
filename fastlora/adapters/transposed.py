"""Transposed convolutions, which spectral shifts and differences can adapt and LoRA cannot."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted, adapts
from fastlora.adapters.changed_weight import changed_bias, recipe_of, weight_under
from fastlora.adapters.layers import Gated
from fastlora.adapters.specs import AdapterError


@adapts(nn.ConvTranspose2d)
class AdaptedConvTranspose2d(Adapted, nn.ConvTranspose2d):
    """As a matrix `[out, in/groups · kh · kw]` its weight `[in, out/groups, kh, kw]` has dim 1 in
    front, within each group."""

    def matrix(self) -> Tensor:
        grouped = self.weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return grouped.flatten(0, 1).flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        inputs, *rest = self.weight.shape
        grouped = matrix.view(self.groups, rest[0], inputs // self.groups, *rest[1:])
        return grouped.transpose(1, 2).reshape(self.weight.shape)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is None:
            return super().forward(input)
        if self._state.merged:
            return self.with_weight(input, self.folded(), self.folded_bias(), output_size)
        recipe = recipe_of(self, self.active())
        if recipe is None:
            return self.base(input, output_size)
        with weight_under(self, recipe) as weight:
            return self.with_weight(input, weight, changed_bias(self, recipe), output_size)

    def with_weight(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
    ) -> Tensor:
        stride, padding, kernel, dilation = self.geometry()
        extra = self._output_padding(x, output_size, stride, padding, kernel, 2, dilation)
        return F.conv_transpose2d(x, weight, bias, stride, padding, extra, self.groups, dilation)

    def geometry(self) -> Any:  # declared as `str | tuple`
        return self.stride, self.padding, self.kernel_size, self.dilation

    def low_rank(self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Gated) -> Tensor:
        raise AdapterError(f"{self._state.path}: LoRA has no form for transposed convolutions here")
