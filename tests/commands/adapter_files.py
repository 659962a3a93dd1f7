"""Small adapter files of every format, and what they mean, for tests of the commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastlora.formats import detect
from fastlora.formats.changes import Target

UNET = {  # shapes of weights, as in Stable Diffusion 1 but for their sizes
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (32, 32),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (32, 768),
    "down_blocks.0.resnets.0.conv1": (32, 32, 3, 3),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": (48, 48),
    "up_blocks.3.attentions.1.transformer_blocks.0.attn2.to_v": (32, 768),
}
TEXT_ENCODER = {
    "text_model.encoder.layers.0.self_attn.q_proj": (768, 768),
    "text_model.encoder.layers.10.mlp.fc1": (96, 768),
}
ATTENTION = {path: shape for path, shape in UNET.items() if "attn" in path}


def kohya(
    path: Path,
    unet: Mapping[str, tuple[int, ...]] = UNET,
    text_encoder: Mapping[str, tuple[int, ...]] = TEXT_ENCODER,
    rank: int = 4,
    alpha: float | Callable[[int], float] = 2.0,
    dtype: torch.dtype = torch.float16,
    metadata: dict[str, str] | None = None,
    extra: tuple[str, ...] = (),
) -> Path:
    """LoRAs; `alpha` may differ from module to module."""
    tensors: dict[str, Tensor] = {key: torch.zeros(3) for key in extra}
    for i, (name, shape) in enumerate(_names(unet, text_encoder)):
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *shape[1:]).to(dtype)
        up = torch.randn(shape[0], rank, *[1] * len(shape[2:])) / 8
        tensors[f"{name}.lora_up.weight"] = up.to(dtype)
        value = alpha(i) if callable(alpha) else alpha
        tensors[f"{name}.alpha"] = torch.tensor(value)
    save_file(tensors, path, metadata)
    return path


def lycoris(path: Path, rank: int = 2, dtype: torch.dtype = torch.float16) -> Path:
    """LoHa of matrices, a full update of the convolution."""
    tensors: dict[str, Tensor] = {}
    for name, shape in _names(UNET, {}):
        if len(shape) > 2:
            tensors[f"{name}.diff"] = torch.randn(shape).to(dtype) / 8
            continue
        for factor in ("hada_w1", "hada_w2"):
            tensors[f"{name}.{factor}_a"] = torch.randn(shape[0], rank).to(dtype)
            tensors[f"{name}.{factor}_b"] = torch.randn(rank, shape[1]).to(dtype) / 4
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


def deltas(path: Path) -> dict[Target, Tensor]:
    """Every update of a file, dense, in float64."""
    shapes = {**UNET, **TEXT_ENCODER}
    return {
        target: change.delta(shapes[target.path], torch.float64)
        for target, change in detect.read(path).changes.items()
    }


def _names(unet: Mapping, text_encoder: Mapping) -> list[tuple[str, tuple[int, ...]]]:
    named = {"lora_unet": unet, "lora_te": text_encoder}
    return [
        (f"{prefix}_{path.replace('.', '_')}", shape)
        for prefix, modules in named.items()
        for path, shape in modules.items()
    ]
