"""A stand-in for a CUDA graph on any device: operators are recorded with their tensors, and run
again on the same memory. What Python does meanwhile does not reach it, as in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READING = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
_capturing = False


def is_capturing() -> bool:
    return _capturing


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name() in READING:
            raise RuntimeError(f"{func.name()} waits for the device: not permitted in a capture")
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


class RecordedGraph:
    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        global _capturing
        run()
        _capturing = True
        try:
            with Recorder() as recorder:
                self.result = run()
        finally:
            _capturing = False
        self.calls = recorder.calls

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from tensors(v)
