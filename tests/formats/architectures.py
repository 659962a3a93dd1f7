"""Models of many architectures on the meta device, for their modules' names and shapes."""

from functools import cache

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

UNETS = {
    "sd": dict(
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768,
    ),
    "sdxl": dict(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
CLIP = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
T5 = dict(d_model=8, d_kv=8, d_ff=8, num_layers=2, num_heads=1)
MODELS = {
    "flux": lambda: diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, guidance_embeds=True
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        num_layers=2, dual_attention_layers=(0,), qk_norm="rms_norm"
    ),
    "pixart": lambda: diffusers.PixArtTransformer2DModel(
        num_layers=1, caption_channels=16, use_additional_conditions=True
    ),
    "dit": lambda: diffusers.DiTTransformer2DModel(num_layers=1),
    "sd": lambda: diffusers.UNet2DConditionModel(**UNETS["sd"]),
    "sdxl": lambda: diffusers.UNet2DConditionModel(**UNETS["sdxl"]),
    "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
    "clip with projection": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**CLIP)
    ),
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
    "t5 v1.1": lambda: transformers.T5EncoderModel(
        transformers.T5Config(**T5, feed_forward_proj="gated-gelu")
    ),
}


@cache
def model(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


def adaptable(name: str) -> dict[str, nn.Module]:
    """The modules that have weights of their own."""
    return {p: m for p, m in model(name).named_modules() if getattr(m, "weight", None) is not None}


def flattened(path: str) -> str:
    return path.replace(".", "_")
