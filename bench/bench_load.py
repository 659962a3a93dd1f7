"""Loading a rank-16 adapter for all attention and feed-forward layers of SDXL's UNet.

The model (5 GB) and the file are in float16 and on the CPU, the file in the page cache. Beside it
diffusers with PEFT, which is what `load_lora_weights` calls for a UNet. Peak memory is the process'
largest resident set while loading over what it had before, which Linux alone can say.
"""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastlora
from bench.timing import Turns, replay

LAYERS = r".*\.(to_[qkv]|to_out\.0|net\.0\.proj|net\.2)"
RANK, ROUNDS = 16, 3
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
Run = Callable[[], None]


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        made = diffusers.UNet2DConditionModel(**SDXL)
    return made.to(torch.float16).to_empty(device="cpu").eval()


def adapter(model: nn.Module, path: Path) -> int:
    """Writes the file in diffusers' format, of random numbers; its bytes."""
    tensors = {}
    for name, module in model.named_modules():
        if re.fullmatch(LAYERS, name) and isinstance(module, nn.Linear):
            at: Any = {"dtype": torch.float16}
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(RANK, module.in_features, **at)
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, RANK, **at)
    save_file(tensors, path)
    return path.stat().st_size


@cache
def turns() -> dict[str, Turns]:
    """Each contender loads and takes the adapter out again, in turns; loading is timed."""
    model: Any = unet()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        size = adapter(model, path)
        ways: dict[str, tuple[Run, Run]] = {
            "floor": (lambda: [path.read_bytes()] and None, lambda: None),
            "fastlora": (
                lambda: fastlora.load(model, path, name="a") and None,
                lambda: fastlora.remove(model, "a"),
            ),
            "diffusers": (
                lambda: model.load_lora_adapter(str(path), adapter_name="a", prefix="unet"),
                model.unload_lora,
            ),
        }
        found = {name: Turns([], {"file_bytes": size, "peak_bytes": 0}) for name in ways}
        for turn in range(ROUNDS + 1):
            for name, (load, unload) in ways.items():
                gc.collect()
                before = reset_peak()
                start = time.perf_counter()
                load()
                seconds = time.perf_counter() - start
                if turn:  # the first is to warm up
                    found[name].times.append(seconds)
                    info = found[name].info
                    info["peak_bytes"] = max(info["peak_bytes"], peak() - before)
                    info["why"] = f"peak {info['peak_bytes'] / size:.2f} x the file"
                unload()
        return found


def reset_peak() -> int:
    """Begins a new measurement of the largest resident set; what is resident now, in bytes. Memory
    that was given back is no longer resident: loading into it would look free of cost."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # not Linux
        pass
    return peak()


def peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), 0)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("contender", ["floor", "fastlora", "diffusers"])
def test_load(benchmark: Any, contender: str) -> None:
    benchmark.group = f"load SDXL rank {RANK}, attention and feed-forward"
    replay.show(benchmark, turns()[contender])
