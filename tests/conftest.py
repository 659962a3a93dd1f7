"""Shared by all tests: fixed seeds, no network, and a header that says what is being tested."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anybody imports huggingface_hub
os.environ["FASTLORA_TUNE_FILE"] = ""  # what was measured on this machine is not under test
os.environ["FASTLORA_FACTORS"] = ""  # nor what has been decomposed on it

import torch

from fastlora.ops._define import kernels


def pytest_report_header(config: pytest.Config) -> str:
    build = kernels.build_info()
    cuda = f"CUDA {build['cuda']} for {build['cuda_archs']}" if build["cuda"] else build["cpu_only"]
    gpu = "no GPU, tests of it are left out"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return (
        f"fastlora: torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{build['compiler']}, {build['cpu_isa']}, {cuda}, {gpu}"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU hundreds of lines would say the same: the header says it once."""
    if torch.cuda.is_available() and kernels.build_info()["cuda"]:
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    if left_out:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves none of its own behind."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
