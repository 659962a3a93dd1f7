"""Tiny models on disk, in the forms that checkpoints have."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]

SHAPES = {
    "unet": {
        "conv_in.weight": (6, 4, 3, 3),
        "conv_in.bias": (6,),
        "down_blocks.0.attentions.0.norm.weight": (6,),
        "down_blocks.0.attentions.0.norm.bias": (6,),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (6, 6),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (6, 10),
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (16, 6),
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.bias": (16,),
    },
    "text_encoder": {
        "text_model.embeddings.token_embedding.weight": (20, 8),
        "text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
        "text_model.encoder.layers.0.self_attn.q_proj.bias": (8,),
        "text_model.encoder.layers.0.layer_norm1.weight": (8,),
    },
}
NAMES = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}


def state(component: str, dtype: torch.dtype = torch.float32) -> State:
    return {k: torch.randn(*s).to(dtype) for k, s in SHAPES[component].items()}


def save_folder(folder: Path, tensors: State, name: str, shards: int = 1) -> None:
    """As `save_pretrained` does."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
        return
    keys, places = sorted(tensors), {}
    for i in range(shards):
        file = f"{name}-{i + 1:05}-of-{shards:05}.safetensors"
        own = {k: tensors[k] for k in keys[i::shards]}
        save_file(own, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(own, file))
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def save_pipeline(folder: Path, states: dict[str, State], shards: int = 1) -> None:
    folder.mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    for component, tensors in states.items():
        index[component] = ["diffusers", "Model"]
        save_folder(folder / component, tensors, NAMES[component], shards)
    save_folder(folder / "vae", {"conv.weight": torch.ones(2, 2)}, "diffusion_pytorch_model")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"beta": 1}')
    (folder / "model_index.json").write_text(json.dumps(index))


def load_folder(folder: Path) -> State:
    found: State = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found
