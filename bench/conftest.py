"""Options of the benchmarks, and what their reports say of the machine."""

import os
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anybody imports huggingface_hub

import torch

from bench.shapes import NAMES
from bench.timing import DEVICE, ceilings

LOAD = os.getloadavg()[0]  # before anything is measured


def pytest_addoption(parser: pytest.Parser) -> None:
    gpu = DEVICE == "cuda"
    options = parser.getgroup("fastlora")
    options.addoption(
        "--models",
        default=",".join(NAMES) if gpu else "SD 1.5",
        help="whose layers: some of 'SD 1.5,SDXL,FLUX' (default: all on a GPU, else SD 1.5; a pass "
        "over one layer of the others takes seconds on a CPU)",
    )
    options.addoption(
        "--ranks",
        default="16,64,128" if gpu else "16",
        help="some of 16,64,128; 128 is eight stacked adapters (default: all on a GPU, else 16)",
    )


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info |= {"load": LOAD, "cores": os.cpu_count()}
    if DEVICE == "cuda":
        major, minor = torch.cuda.get_device_capability()
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["capability"] = 10 * major + minor
        machine_info["ceilings"] = ceilings()
