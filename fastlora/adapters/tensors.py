"""Questions about tensors that caches and weight arithmetic ask."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

COMPUTED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # what products are of


def is_plain(weight: Any) -> bool:
    """Whether a weight is memory of its values: not None, and not quantised. What kinds of tensors
    that are not torch's hold, and in which layout, nobody knows."""
    if weight is None or weight.dtype not in COMPUTED:
        return False
    kind = type(weight)
    return kind in (Tensor, nn.Parameter) or kind.__module__.partition(".")[0] == "torch"


def memory(t: Tensor) -> tuple[int, int] | None:
    """Address and version of a tensor; None where there are none (inference mode, functorch)."""
    try:
        return t.data_ptr(), t._version
    except RuntimeError:
        return None


def same_start(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.data_ptr() == b.data_ptr()


def same_values(a: Tensor, b: Tensor) -> bool:
    """Also of tensors that `torch.equal` refuses to compare."""
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def too_large(t: Tensor, dtype: torch.dtype) -> float | None:
    """The largest magnitude of a tensor where `dtype` would make it infinite."""
    if not t.numel() or torch.finfo(t.dtype).max <= torch.finfo(dtype).max:
        return None
    largest = torch.stack(torch.aminmax(t.detach())).abs().max()
    return None if largest.to(dtype).isfinite() else largest.item()


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast: what is computed about weights is not for one forward pass alone."""
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
