"""What callers pass for numbers, read without torch's or Python's own errors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Given = ParamSpec("Given")
Result = TypeVar("Result")


def on_host(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`function`, whose tensors are made on the CPU whatever `torch.set_default_device` says."""

    @wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


def number(value: Any) -> float:
    """`value` as a float; NaN, which no range holds, where it is not one number."""
    try:
        math.isfinite(value)  # unlike float() it takes no strings
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises the last
        return math.nan


def integer(value: Any) -> int | None:
    """`value` as an int, also numpy's and torch's; None where it is none. A bool is none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):
        return None


def describe(value: Any) -> str:
    """`value` for an error: what it is, not all that is in it."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(map(repr, value)) or 'nothing'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def moved(values: Tensor, device: torch.device) -> Tensor:
    """`values` on a device; to a GPU through pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (TypeError, ValueError, RuntimeError):
        return False
