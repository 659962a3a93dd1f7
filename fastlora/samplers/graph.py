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
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run()
            current.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph):
                    self.result = run()
            except BaseException:
                torch.cuda.set_stream(current)
                forget_capture(device)
                raise

    def replay(self) -> None:
        self._graph.replay()


def forget_capture(device: torch.device) -> None:
    """After a capture that broke: torch's generator of random numbers still believes in it ("Offset
    increment outside graph capture") until another one ends well."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        number = torch.zeros(1, device=device)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            number.zero_()
