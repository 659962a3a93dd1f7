"""PLACEHOLDER by the lead so that imports work; helper-3 replaces this file."""
from torch import Tensor


def spectral_weight(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor, shift: Tensor, strength: Tensor) -> Tensor:
    c = (s + strength * shift).clamp_min(0) - s
    return weight + (u * c).to(weight.dtype) @ vh.to(weight.dtype)
