"""Commands about files: what `fastlora inspect` and `fastlora extract` take within this process.

`inspect` reads the structure and the norms of an adapter of a gigabyte, in bfloat16 and in the page
cache; its floor is reading the bytes of the file once. `extract` takes the LoRA of rank 32 between
two files of float16 weights; its floor is `torch.linalg.svd` of the differences, which are in
memory then. It gets eight layers of Stable Diffusion 1.5 of up to 640 x 2880: the singular value
decompositions of a whole UNet take minutes.
"""

import io
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.memory import Run, in_turns, nothing
from bench.timing import DEVICE, Turns, replay
from fastlora.cli import main
from fastlora.formats import files

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="needs a run without a GPU")

ROOM = 3 * 10**9  # bytes that have to be free for a file of 1 GB
PIECE = 2**24  # bytes: a floor that reads into new memory would be the time of its page faults
INSPECTIONS, EXTRACTIONS = 5, 3  # rounds

# [in, out] of the Linear layers in FLUX' blocks. It has 19 and 38 of them, which at rank 64 comes
# to 0.7 GB: here it is half as deep again.
RANK, DOUBLE, SINGLE = 64, 28, 56
WIDTH = 3072
DOUBLE_LAYERS = {
    **{f"attn.{name}": (WIDTH, WIDTH) for name in (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    )},
    **{f"{name}.net.0.proj": (WIDTH, 4 * WIDTH) for name in ("ff", "ff_context")},
    **{f"{name}.net.2": (4 * WIDTH, WIDTH) for name in ("ff", "ff_context")},
    **{f"{name}.linear": (WIDTH, 6 * WIDTH) for name in ("norm1", "norm1_context")},
}  # fmt: skip
SINGLE_LAYERS = {
    **{f"attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v")},
    "proj_mlp": (WIDTH, 4 * WIDTH),
    "proj_out": (5 * WIDTH, WIDTH),
    "norm.linear": (WIDTH, 3 * WIDTH),
}

# Weights of SD 1.5's UNet.
EXTRACTED = 32
BLOCK = "attentions.0.transformer_blocks.0"
WEIGHTS: dict[str, tuple[int, ...]] = {
    f"down_blocks.0.{BLOCK}.attn1.to_q": (320, 320),
    f"down_blocks.0.{BLOCK}.attn2.to_k": (320, 768),
    f"down_blocks.0.{BLOCK}.ff.net.0.proj": (2560, 320),
    "down_blocks.0.resnets.0.conv1": (320, 320, 3, 3),
    f"down_blocks.1.{BLOCK}.attn2.to_v": (640, 768),
    f"down_blocks.1.{BLOCK}.ff.net.2": (640, 2560),
    "down_blocks.1.resnets.0.conv1": (640, 320, 3, 3),
    f"down_blocks.2.{BLOCK}.attn1.to_q": (1280, 1280),
}


def command(*arguments: object) -> Run:
    """`fastlora` without its output. Raises RuntimeError where the exit code is not 0."""

    def run() -> None:
        with redirect_stdout(io.StringIO()):
            code = main([str(a) for a in arguments])
        if code:
            raise RuntimeError(f"fastlora {arguments[0]}: expected exit code 0, got {code}")

    return run


@contextmanager
def folder(room: int = 0) -> Iterator[Path]:
    """A temporary folder. Skips where fewer than `room` bytes are free."""
    with tempfile.TemporaryDirectory() as name:
        if (free := shutil.disk_usage(name).free) < room:
            pytest.skip(f"needs {room / 1e9:.0f} GB in {Path(name).parent}, got {free / 1e9:.1f}")
        yield Path(name)


def show(benchmark: Any, turns: Turns) -> None:
    most = turns.info["peak_bytes"]
    benchmark.extra_info["why"] = "" if most is None else f"peak {most / 2**20:.0f} MiB"
    replay.show(benchmark, turns)


# --- inspect --------------------------------------------------------------------------------------


def modules(double: int, single: int) -> dict[str, tuple[int, int]]:
    """[in, out] of every adapted layer by name."""
    kinds = (("transformer_blocks", double, DOUBLE_LAYERS),
             ("single_transformer_blocks", single, SINGLE_LAYERS))  # fmt: skip
    return {
        f"{kind}.{i}.{name}": size
        for kind, depth, layers in kinds
        for i in range(depth)
        for name, size in layers.items()
    }


def adapter(path: Path, layers: Mapping[str, tuple[int, int]]) -> int:
    """Writes a LoRA in diffusers' format; the file's bytes. All tensors begin with the same random
    numbers: a gigabyte of others takes longer than what is measured."""
    numbers = torch.randn(RANK * max(map(max, layers.values()))).bfloat16()
    tensors: dict[str, Tensor] = {}
    for name, (inputs, outputs) in layers.items():
        for part, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
            values = numbers[: math.prod(shape)].view(shape)
            tensors[f"transformer.{name}.{part}.weight"] = values
    files.write(path, tensors, {})
    return path.stat().st_size


def read_once(path: Path) -> int:
    """Bytes that were read."""
    piece, total = bytearray(PIECE), 0
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(piece):
            total += length
    return total


@cache
def inspections() -> dict[str, Turns]:
    with folder(ROOM) as where:
        path = where / "adapter.safetensors"
        size = adapter(path, modules(DOUBLE, SINGLE))
        jobs: dict[str, tuple[Run, Run]] = {
            "floor": (lambda: read_once(path), nothing),
            "fastlora": (command("inspect", path), nothing),
        }
        found = in_turns(jobs, INSPECTIONS)
    for turns in found.values():
        turns.info["file_bytes"] = size
    return found


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("contender", ["floor", "fastlora"])
def test_inspect(benchmark: Any, contender: str) -> None:
    benchmark.group = f"inspect 1 GB, FLUX-like rank {RANK} bfloat16"
    show(benchmark, inspections()[contender])


# --- extract --------------------------------------------------------------------------------------


def pair(where: Path) -> tuple[Path, Path, list[Tensor]]:
    """Writes a model and its fine-tuned copy, float16; the two files and their differences in
    float32, `[out, in · kh · kw]`."""
    torch.manual_seed(0)
    base: dict[str, Tensor] = {}
    tuned: dict[str, Tensor] = {}
    for name, shape in WEIGHTS.items():
        weight, change = (torch.randn(shape) * size for size in (2e-2, 2e-3))
        base[f"{name}.weight"], tuned[f"{name}.weight"] = weight.half(), (weight + change).half()
    paths = where / "base.safetensors", where / "tuned.safetensors"
    for path, tensors in zip(paths, (base, tuned), strict=True):
        files.write(path, tensors, {})
    return *paths, [(tuned[key].float() - base[key].float()).flatten(1) for key in base]


def extraction(where: Path, rank: int) -> dict[str, Run]:
    """The contenders; fastlora writes `lora.safetensors` into the folder."""
    base, tuned, differences = pair(where)
    options = ("--component", "unet", "--out", where / "lora.safetensors", "--force")
    return {
        "floor": lambda: [torch.linalg.svd(d, full_matrices=False) for d in differences],
        "fastlora": command("extract", base, tuned, "--rank", rank, *options),
    }


@cache
def extractions() -> dict[str, Turns]:
    with folder() as where:
        jobs = {name: (run, nothing) for name, run in extraction(where, EXTRACTED).items()}
        return in_turns(jobs, EXTRACTIONS)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("contender", ["floor", "fastlora"])
def test_extract(benchmark: Any, contender: str) -> None:
    benchmark.group = f"extract rank {EXTRACTED}, {len(WEIGHTS)} layers of SD 1.5 float16"
    show(benchmark, extractions()[contender])
