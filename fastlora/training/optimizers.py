"""The optimiser that training uses unless told otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_FUSED = ("cpu", "cuda")  # devices on which one call for all parameters is there in every release


def adamw(
    parameters: list[nn.Parameter] | list[dict[str, Any]], **options: Any
) -> torch.optim.AdamW:
    """torch's AdamW of parameters or groups of them, weight decay 1e-2, in one call a step: an
    adapter has hundreds of small parameters, and going through them one by one takes longer than
    the arithmetic."""
    groups: list[Any] = [g["params"] if isinstance(g, dict) else [g] for g in parameters]
    fused = all(fits_fused(p) for group in groups for p in group)
    return torch.optim.AdamW(parameters, fused=fused, **{"weight_decay": 1e-2, **options})


def fits_fused(p: torch.Tensor) -> bool:
    """Parameters in a reserve are strided views, which the one call refuses."""
    return p.device.type in _FUSED and p.is_floating_point() and p.is_contiguous()
