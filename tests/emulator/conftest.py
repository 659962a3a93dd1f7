"""The kernels of kernels.cu, on the emulator and, where there is one, on a GPU."""

from pathlib import Path

import pytest
import torch

from tests.devices import no_gpu
from tests.emulator.harness import Kernels, compile_emulated, compile_for_gpu
from tools.cuda_check import find_nvcc


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return compile_emulated(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc to compile the kernels with")
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if major == 9 else ""
    folder: Path = tmp_path_factory.mktemp("gpu")
    return compile_for_gpu(folder, nvcc, f"sm_{major}{minor}{suffix}")


BOTH = [
    pytest.param("emulated", marks=pytest.mark.emulated),
    pytest.param("on_gpu", marks=[pytest.mark.gpu, no_gpu]),
]


@pytest.fixture(params=BOTH)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return request.getfixturevalue(request.param)
