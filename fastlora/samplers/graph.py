"""A CUDA graph of a function that reads and writes tensors at fixed addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Graph(Generic[T]):
    """`run` captured on its device; `replay` computes `result` again from what its tensors hold.

    `run` is called once before, on a stream of its own, so that libraries make their workspaces
    and modules what they make lazily.
    """

    def __init__(self, run: Callable[[], T], device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError(f"capture: expected a CUDA device, got {device}")
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.result = run()

    def replay(self) -> None:
        self._graph.replay()
