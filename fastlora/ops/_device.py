"""Which kernels compute a tensor: the CPU's loops, CUDA's kernels, or those on the emulator."""

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastlora.ops._define import kernels, share_exchange_api

_emulator: Any = None
_emulating = False


def device_type(t: Tensor) -> str:
    """`t.device.type`, but "cuda" where a CPU tensor's operators run on the emulator."""
    return "cuda" if _emulating and t.device.type == "cpu" else t.device.type


def kernels_of(t: Tensor) -> Any:
    """The extension whose entries compute on t."""
    return _emulator if _emulating and t.device.type == "cpu" else kernels


@contextmanager
def emulated(runs: int = 4, seed: int = 0) -> Iterator[None]:
    """Within it, operators on CPU tensors run the CUDA kernels, on an emulated GPU.

    Slow and strict: a kernel runs on copies of its tensors that lie between red zones, `runs`
    times, with threads ascending, descending and in orders drawn from `seed`, over four patterns of
    uninitialised memory, with asynchronous copies landing early, late and at any time. A kernel
    that reads or writes beside its memory, waits at a barrier that others never reach, or gives
    different bits in different executions raises KernelFault (a RuntimeError) with kernel, block,
    thread and source line, and no tensor has changed.

    It counts for the whole process. What CUDA leaves to the reference or to a library goes there
    here as well. The environment variable `FASTLORA_DEVICE=emulated` switches it on from the start.
    """
    block = (runs, seed, object())
    switch(add=block)
    try:
        yield
    finally:
        switch(remove=block)


_blocks: list[
    Any
] = []  # that are open, in several threads perhaps: the latest one's settings count
_lock = threading.Lock()


def switch(add: Any = None, remove: Any = None) -> None:
    global _emulator, _emulating
    with _lock:
        if add is not None:
            if _emulator is None:
                extension = importlib.import_module("fastlora._emulator")
                share_exchange_api(extension)
                _emulator = extension
            _emulator.configure(*add[:2])  # raises for bad ones, before anything has changed
            _blocks.append(add)
        if remove is not None:
            _blocks.remove(remove)
            if _blocks:
                _emulator.configure(*_blocks[-1][:2])
        _emulating = bool(_blocks)
        kernels.set_plans(int(_emulating))


def _from_environment() -> None:
    wanted = os.environ.get("FASTLORA_DEVICE", "")
    if wanted not in ("", "emulated"):
        raise ValueError(f"FASTLORA_DEVICE: expected 'emulated' or nothing, got {wanted!r}")
    if wanted == "emulated":
        switch(add=(4, 0))


_from_environment()
