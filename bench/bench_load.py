"""Loading a rank-16 adapter for all attention and feed-forward layers of SDXL's UNet.

The model (5 GB) and the file are in float16 and on the CPU, the file in the page cache. Beside it
diffusers with PEFT, which is what `load_lora_weights` calls for a UNet.
"""

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastlora
from bench.memory import Run, in_turns, nothing
from bench.timing import DEVICE, Turns, replay

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="needs a run without a GPU")

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
    """Each contender loads, and takes the adapter out again, which is not timed."""
    model: Any = unet()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        size = adapter(model, path)
        jobs: dict[str, tuple[Run, Run]] = {
            "floor": (path.read_bytes, nothing),
            "fastlora": (
                lambda: fastlora.load(model, path, name="a"),
                lambda: fastlora.remove(model, "a"),
            ),
            "diffusers": (
                lambda: model.load_lora_adapter(str(path), adapter_name="a", prefix="unet"),
                model.unload_lora,
            ),
        }
        found = in_turns(jobs, ROUNDS)
    for contender in found.values():
        most = contender.info["peak_bytes"]
        contender.info["file_bytes"] = size
        contender.info["why"] = "" if most is None else f"peak {most / size:.2f} x the file"
    return found


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("contender", ["floor", "fastlora", "diffusers"])
def test_load(benchmark: Any, contender: str) -> None:
    benchmark.group = f"load SDXL rank {RANK}, attention and feed-forward"
    replay.show(benchmark, turns()[contender])
