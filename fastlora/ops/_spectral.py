"""What the operators on shifted singular values share: coefficients and the shifts' gradients."""

import torch
from torch import Tensor


def coefficients(s: Tensor, shift: Tensor, strength: Tensor) -> Tensor:
    """relu(s + strength δ) - s = max(strength δ, -s) `[rank]` in the strength's dtype, without the
    cancellation: exactly 0 at δ = 0."""
    return torch.maximum(strength * shift.to(strength.dtype), -s.to(strength.dtype))


def shift_gradients(
    dots: Tensor, s: Tensor, shift: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """(dδ, dstrength) from the gradients `p` of the singular values, which are 0 where the relu
    cuts: `dδ = strength p`, `dstrength = Σ δ_i p_i`."""
    wide = shift.to(strength.dtype)
    dots = torch.where(strength * wide > -s.to(strength.dtype), dots, 0)
    return (strength * dots).to(shift.dtype), (dots * wide).sum()
