"""Small files: of every format, and of any header and data whatever they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.formats import native
from tests.formats.mutate import packed

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(path: Path, content: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file of this header (bytes, text or an object) and data, whatever they are."""
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    text = text if isinstance(text, bytes) else text.encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def sample(dtype: torch.dtype, *shape: int) -> Tensor:
    """Finite values of any dtype: small whole numbers."""
    return torch.arange(torch.Size(shape).numel()).remainder(2).reshape(shape).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """The same dtype, shape and bits."""
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def fields(**changes: Any) -> dict[str, Any]:
    return {"a": {k: v for k, v in {**F32, **changes}.items() if v is not ...}}


def assorted() -> bytes:
    tensors = {
        "blocks.0.down": torch.randn(2, 3),
        "blocks.0.up": torch.randn(3, 2).half(),
        "blocks.1.bias": torch.randn(3).bfloat16(),
        "alpha": torch.tensor(4.0),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "steps": torch.arange(3),
    }
    return packed(tensors, {"format": "pt", "config": json.dumps({"rank": 2, "layers": [1, {}]})})


def fastlora_lora() -> bytes:
    modules = {
        f"blocks.{i}.to_q": {
            "down": torch.randn(2, 3),
            "up": torch.randn(4, 2),
            "magnitude": torch.rand(4),
        }
        for i in range(2)
    }
    layer = {"rank": 2, "alpha": None, "dora": True}
    config = {
        "kind": "lora",
        "modules": {path: {**layer, "alpha": i + 1.0} for i, path in enumerate(modules)},
    }
    return packed(*native.pack(modules, config))


def fastlora_svdiff() -> bytes:
    modules = {f"blocks.{i}.to_q": {"shift": torch.randn(3)} for i in range(2)}
    config = {
        "kind": "spectral",
        "modules": {path: {"norms": "elementwise"} for path in modules},
        "base_hash": {path: [1.0, 2.0, 3.0, 4.0, 5.0] for path in modules},
    }
    return packed(*native.pack(modules, config))


def peft_dora() -> bytes:
    """PEFT's adapter_config.json is in the header, so that it is mutated as well."""
    tensors = {}
    for path in ("blocks.0.to_q", "blocks.1.to_q"):
        start = f"base_model.model.{path}"
        tensors[f"{start}.lora_A.weight"] = torch.randn(2, 3)
        tensors[f"{start}.lora_B.weight"] = torch.randn(4, 2)
        tensors[f"{start}.lora_magnitude_vector"] = torch.rand(4)
    start = "base_model.model.tokens"
    tensors[f"{start}.lora_embedding_A"] = torch.randn(2, 5)
    tensors[f"{start}.lora_embedding_B"] = torch.randn(3, 2)
    tensors[f"{start}.lora_magnitude_vector"] = torch.rand(3)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "use_dora": True,
        "use_rslora": False,
        "rank_pattern": {"blocks.1.to_q": 2},
        "alpha_pattern": {"tokens": 1.5},
        "target_modules": ["to_q", "tokens"],
    }
    return packed(tensors, {"format": "pt", "adapter_config": json.dumps(config)})


def diffusers_styles() -> bytes:
    tensors = {}
    for path, down, up in (
        ("unet.mid_block.attentions.0.proj_in", ".lora_A.weight", ".lora_B.weight"),
        ("unet.mid_block.attn1.to_k", ".lora.down.weight", ".lora.up.weight"),
        ("unet.mid_block.attn1.processor.to_q", "_lora.down.weight", "_lora.up.weight"),
        (
            "text_encoder.encoder.layers.0.self_attn.q_proj",
            ".lora_linear_layer.down.weight",
            ".lora_linear_layer.up.weight",
        ),
    ):
        tensors[path + down] = torch.randn(2, 3)
        tensors[path + up] = torch.randn(4, 2)
    settings = {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_q": 2}}
    return packed(tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})


def kohya_lora() -> bytes:
    tensors = {}
    for name, up, down in (
        ("lora_unet_down_blocks_0_attentions_0_proj_in", (4, 2, 1, 1), (2, 3, 1, 1)),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", (4, 2), (2, 3)),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", (4, 2), (2, 3)),
    ):
        tensors[f"{name}.lora_down.weight"] = torch.randn(down)
        tensors[f"{name}.lora_up.weight"] = torch.randn(up)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return packed(tensors, {"ss_network_dim": "2", "ss_network_module": "networks.lora"})


def kohya_flux() -> bytes:
    start = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{start}.lora_down.weight": torch.randn(2, 3),
        f"{start}.lora_up.weight": torch.randn(12, 2),
        f"{start}.alpha": torch.tensor(1.0),
        "lora_unet_single_blocks_0_linear2.lora_down.weight": torch.randn(2, 20),
        "lora_unet_single_blocks_0_linear2.lora_up.weight": torch.randn(4, 2),
    }
    return packed(tensors, {"ss_base_model_version": "flux1"})


def lycoris() -> bytes:
    start = "lycoris_unet_mid_block_attentions_0_transformer_blocks_0_attn1"
    tensors = {
        f"{start}_to_q.hada_w1_a": torch.randn(4, 2),
        f"{start}_to_q.hada_w1_b": torch.randn(2, 3),
        f"{start}_to_q.hada_w2_a": torch.randn(4, 2),
        f"{start}_to_q.hada_w2_b": torch.randn(2, 3),
        f"{start}_to_q.alpha": torch.tensor(1.0),
        f"{start}_to_k.lokr_w1": torch.randn(2, 2),
        f"{start}_to_k.lokr_w2_a": torch.randn(2, 2),
        f"{start}_to_k.lokr_w2_b": torch.randn(2, 3),
        f"{start}_to_k.alpha": torch.tensor(1.0),
        f"{start}_to_v.lora_down.weight": torch.randn(2, 3),
        f"{start}_to_v.lora_up.weight": torch.randn(4, 2),
        f"{start}_to_v.dora_scale": torch.rand(1, 3),
        f"{start}_to_out_0.diff": torch.randn(4, 3),
        f"{start}_to_out_0.diff_b": torch.randn(4),
    }
    return packed(tensors, {"ss_network_module": "lycoris.kohya"})
