"""What a base layer was before adapters were merged into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Pristine:
    """Copies of a base layer's weight and bias, for an unmerge that is exact: subtracting what was
    added rounds again. They cost the memory of the weight while something is merged.

    Somebody may write the weight while adapters are in it (load_state_dict). Then the copies are of
    another model; `holds` tells by a sum over all bits.
    """

    @torch.inference_mode(False)  # what is put back has to serve training later
    def __init__(self, base: Any) -> None:
        self.tensors = {name: t.detach().clone() for name, t in plain(base).items()}
        self.sums: dict[str, Tensor] = {}

    def seal(self, base: Any) -> None:
        """Notes what merging has made of the layer."""
        self.sums = {name: bits(t) for name, t in plain(base).items()}

    def holds(self, base: Any) -> bool:
        now = plain(base)
        return now.keys() == self.sums.keys() and all(
            now[name].shape == self.tensors[name].shape and torch.equal(bits(now[name]), kept)
            for name, kept in self.sums.items()
        )

    def put_back(self, base: Any) -> None:
        """Writes the copies to where the layer's tensors are: others may look at that memory."""
        for name, tensor in self.tensors.items():
            own = getattr(base, name)
            if own.is_inference():  # PEFT's variants make a new tensor, here in inference mode
                own.data = tensor
            else:
                own.data.copy_(tensor)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """What `module.to` does to the layer's own tensors."""
        self.tensors = {name: function(t) for name, t in self.tensors.items()}


def plain(base: nn.Module) -> dict[str, Tensor]:
    """The weight and bias of a layer, where they are plain tensors."""
    found = {name: getattr(base, name, None) for name in ("weight", "bias")}
    return {k: t for k, t in found.items() if t is not None and type(t) in (Tensor, nn.Parameter)}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(BITS[tensor.itemsize]).sum(dtype=torch.int64)
