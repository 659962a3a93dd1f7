"""DoRA's row scale `m / ‖W + U diag(g) D‖` without forming U D."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastlora.adapters.slots import LoRASlot
from fastlora.adapters.specs import AdapterError
from fastlora.adapters.state import is_capturing
from fastlora.adapters.tensors import full_precision, memory


def row_scale(layer: Any, weight: Tensor, slot: LoRASlot, gate: Tensor) -> Tensor:
    """`m / ‖W + U diag(g) D‖` per output row `[out]`, float32 (float64 beside float64).

    `‖W + UgD‖² = ‖W‖² + 2⟨W Dᵀ, Ug⟩ + ⟨Ug D Dᵀ, Ug⟩` row by row; W Dᵀ and D Dᵀ change only with W
    and D and are kept (`cached`, and in `steady` blocks). The norm carries no gradient (the paper's
    section 4.3). A strength of exactly zero means no adapter: the scale is one, not `m / ‖W‖`.
    """
    if gate.dim() == 2:
        raise AdapterError(
            f"{layer._state.path}: DoRA's norm depends on the strength, so its strength cannot "
            "differ per sample; use a number for its scale"
        )
    assert slot.magnitude is not None
    groups = getattr(layer, "groups", 1)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32

    def products() -> tuple[Tensor, Tensor, Tensor]:
        w = weight.detach().reshape(groups, weight.shape[0] // groups, -1).to(wide)
        d = slot.down.detach().reshape(groups, slot.width // groups, -1).to(wide)
        return w.square().sum(-1), w @ d.mT, d @ d.mT

    with torch.no_grad(), full_precision(weight.device):
        if is_compiling() or not (at := memory(weight)) or at != memory(layer.weight):
            w2, wd, dd = products()  # of a weight that spectral shifts have changed, or in a graph
        elif layer._state.arena.steady[is_capturing()]:
            w2, wd, dd = layer.kept(f"dora{id(slot)}", products)
        else:
            w2, wd, dd = layer.cached(f"dora{id(slot)}", [slot.down], products)
        ug = slot.up.detach().reshape(groups, -1, slot.width // groups).to(wide)
        ug = ug * gate.detach().reshape(groups, 1, -1).to(wide)
        norm = (w2 + 2 * (wd * ug).sum(-1) + ((ug @ dd) * ug).sum(-1)).clamp_min(0).sqrt().flatten()
        norm = norm.clamp_min(torch.finfo(wide).tiny)
        off = (gate == 0).all()
    return torch.where(off, 1.0, slot.magnitude.to(wide) / norm)


def magnitude(weight: Tensor) -> Tensor:
    """The start value ‖W‖ per output row, computed as `row_scale` does so that both cancel."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.detach().reshape(weight.shape[0], -1).to(wide).square().sum(-1).sqrt()
