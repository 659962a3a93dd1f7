"""What recipes are given, checked before a model is touched; errors begin with the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastlora.samplers.arguments import describe, integer, number

# [1, ...] for all pictures, [N, ...] one for each, or a function of the drawn indices int64
# [batch], which is how a text encoder inside the model is trained along.
Cond = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]


def whole(what: str, value: Any, least: int) -> int:
    """`value` as an int in [least, 2^63). Raises ValueError, beginning with `what`."""
    found = integer(value)
    if found is None or not least <= found < 2**63:
        raise ValueError(f"{what}: expected an int from {least} to 2^63 - 1, got {value!r}")
    return found


def not_negative(what: str, value: Any) -> float:
    """`value` as a finite float >= 0. Raises ValueError, beginning with `what`."""
    found = number(value)
    if not 0 <= found < math.inf:
        raise ValueError(f"{what}: expected a finite number >= 0, got {value!r}")
    return found


def check_pictures(what: str, images: Any, model: nn.Module) -> None:
    """Raises ValueError unless `images` are at least one picture, finite, in the dtype of the
    model's parameters or in float32, which models in 16 bits may take too."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    dtypes = (dtype,) if dtype == torch.float64 else dict.fromkeys((torch.float32, dtype))
    if not isinstance(images, torch.Tensor) or images.dim() < 2 or not len(images):
        raise ValueError(
            f"{what}: expected at least one, a tensor [N, ...], got {describe(images)}"
        )
    if images.dtype not in dtypes:
        raise ValueError(
            f"{what}: expected {' or '.join(map(str, dtypes))}, in the range that the model was"
            f" made for (most: -1 to 1), got {describe(images)}"
        )
    if not images.isfinite().all():
        raise ValueError(f"{what}: expected finite values, got NaN or infinity among them")


def check_cond(what: str, cond: Any, count: int) -> None:
    """Raises ValueError unless `cond` is a function or has a row for all pictures or for each."""
    if not callable(cond):
        check_rows(what, cond, count)


def check_rows(what: str, cond: Any, count: int) -> None:
    """Raises ValueError unless `cond` is a tensor with a row for all pictures or for each."""
    if not isinstance(cond, torch.Tensor) or cond.dim() < 1 or len(cond) not in (1, count):
        raise ValueError(
            f"{what}: expected conditions [1, ...] for all or [{count}, ...] one for each,"
            f" got {describe(cond)}"
        )
