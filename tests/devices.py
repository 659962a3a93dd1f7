"""Where an operator's test runs: on the CPU's kernels, on the emulated GPU, on a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import ops
from fastlora.ops._define import kernels

no_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and kernels.build_info()["cuda"]),
    reason="no GPU, or no CUDA kernels in this build",
)
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])
DEVICES = ["cpu", pytest.param("emulated", marks=pytest.mark.emulated), GPU]

# The test calls its module's `op`, or `ops.<name>`, with CPU tensors; the fixture `device` (in
# conftest.py) sees to it that the kernels of the device do the work.
on_devices = pytest.mark.parametrize("device", DEVICES, indirect=True)


def refused_there(parameters: dict[str, Any], module: str) -> bool:
    """Whether CUDA refuses what the test would ask for: folds in float64."""
    return (
        parameters.get("device", "cpu") != "cpu"
        and parameters.get("dtype") == torch.float64
        and module.rpartition(".")[2]
        in ("test_fold", "test_spectral_groups", "test_spectral_weight")
    )


class OnGpu:
    """An operator whose arguments travel to the GPU and whose results travel back."""

    def __init__(self, operator: Any) -> None:
        self.operator = operator

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operator, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        moved: dict[int, Tensor] = {}  # memory that tensors share stays shared
        versions: list[tuple[Tensor, Tensor, int]] = []

        def there(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [there(v) for v in value]
            if not isinstance(value, Tensor):
                return value
            if value.requires_grad or value.numel() == 0:
                copy = value.cuda()
                versions.append((value, copy, copy._version))
                return copy
            memory = value.untyped_storage()
            if memory.data_ptr() not in moved:
                flat = torch.empty(0, dtype=torch.uint8).set_(memory)
                moved[memory.data_ptr()] = flat.cuda()
            storage = moved[memory.data_ptr()].untyped_storage()
            empty = torch.empty(0, dtype=value.dtype, device="cuda")
            copy = empty.set_(storage, value.storage_offset(), value.shape, value.stride())
            versions.append((value, copy, copy._version))
            return copy

        def back(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(back(v) for v in value)
            return value.cpu() if isinstance(value, Tensor) else value

        result = back(self.operator(*there(args), **{k: there(v) for k, v in kwargs.items()}))
        for value, copy, version in versions:
            if copy._version > version:
                torch.autograd.graph.increment_version(value)
        with torch.no_grad():
            for value in flattened(args):
                memory = value.untyped_storage()
                if memory.data_ptr() in moved:  # what was changed in place
                    flat = torch.empty(0, dtype=torch.uint8).set_(memory)
                    flat.copy_(moved[memory.data_ptr()])
        return result


def flattened(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += flattened(value)
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def ops_on_gpu() -> SimpleNamespace:
    """The module `ops` with every operator on the GPU."""
    wrapped = {name: OnGpu(operator) for name, operator in ops.operators.items()}
    return SimpleNamespace(**{**vars(ops), **wrapped})
