"""One rank-16 adapter of SDXL's attention and feed-forward in the place of another, in a model that
runs: what a service does between two images.

Model (5 GB) and values are in float16 on the device. Beside it diffusers' and PEFT's hot swap of
adapters that are read already; the floor is a copy of the bytes.
"""

from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastlora
from bench.bench_load import LAYERS, RANK, adapter, unet
from bench.memory import Run, in_turns, nothing
from bench.timing import DEVICE, Turns, replay, synchronised

ROUNDS = 5
CONTENDERS = ["floor", "fastlora", "fastlora, remove and load", "diffusers", "peft"]


def by_fastlora(paths: list[Path]) -> tuple[Run, Run]:
    """From what is prepared, and from the files."""
    model = unet().to(DEVICE)
    fastlora.reserve(model, RANK, LAYERS)
    turns, files = cycle([fastlora.prepare(model, path) for path in paths]), cycle(paths)
    fastlora.swap(model, "a", next(turns))

    def load() -> None:
        fastlora.remove(model, "a")
        fastlora.load(model, next(files), "a")

    return lambda: fastlora.swap(model, "a", next(turns)), load


def by_peft(paths: list[Path]) -> tuple[Run, Run]:
    """As diffusers' `load_lora_adapter` does it, and PEFT's function alone."""
    hotswap = pytest.importorskip("peft.utils.hotswap")
    model: Any = unet().to(DEVICE)
    model.load_lora_adapter(str(paths[0]), adapter_name="a", prefix="unet")
    config = model.peft_config["a"]
    read = [{k: v.to(DEVICE) for k, v in load_file(path).items()} for path in paths]
    bare = [
        {k.removeprefix("unet.").removesuffix("weight") + "a.weight": v for k, v in state.items()}
        for state in read
    ]
    states, own = cycle(read), cycle(bare)

    def diffusers() -> None:
        model.load_lora_adapter(dict(next(states)), adapter_name="a", prefix="unet", hotswap=True)

    def peft() -> None:
        hotswap.hotswap_adapter_from_state_dict(model, next(own), "a", config)

    return diffusers, peft


@cache
def turns() -> dict[str, Turns]:
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.safetensors" for name in "ab"]
        plain = unet()
        size = [adapter(plain, path) for path in paths][0]
        values = torch.ones(size, dtype=torch.uint8, device=DEVICE)
        copied = torch.empty_like(values)
        jobs: list[Callable[[], object]] = [lambda: copied.copy_(values)]
        jobs += [*by_fastlora(paths), *by_peft(paths)]
        if DEVICE == "cuda":
            jobs = [synchronised(job) for job in jobs]
        named = {name: (job, nothing) for name, job in zip(CONTENDERS, jobs, strict=True)}
        found = in_turns(named, ROUNDS)
    for contender in found.values():
        contender.info |= {"file_bytes": size, "why": ""}
    return found


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_swap(benchmark: Any, contender: str) -> None:
    benchmark.group = f"swap SDXL rank {RANK}, attention and feed-forward"
    replay.show(benchmark, turns()[contender])
