"""Which base a file is for, told from the layers of the real architectures."""

import pytest
import torch
from torch import nn

from fastlora.formats.base import base_of
from fastlora.formats.changes import AdapterFile, Change, LowRank, Target
from tests.formats.architectures import diffusers, model


def loras(network: nn.Module, component: str) -> dict[Target, Change]:
    """A LoRA of every Linear, without values."""
    made = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear):
            down = torch.empty(2, module.in_features, device="meta")
            up = torch.empty(module.out_features, 2, device="meta")
            made[Target(component, path)] = Change(LowRank(down, up))
    return made


@pytest.mark.parametrize(
    ("name", "component", "expected"),
    [
        ("sd", "unet", "SD 1"),
        ("sd", "", "SD 1"),
        ("sdxl", "unet", "SDXL"),
        ("flux", "transformer", "FLUX"),
        ("pixart", "transformer", None),
        ("clip", "text_encoder", None),
    ],
)
def test_layers_tell(name, component, expected):
    """Whatever metadata says, which is copied along."""
    metadata = {} if expected is None else {"ss_base_model_version": "sd_v2"}
    file = AdapterFile("diffusers", loras(model(name), component), metadata=metadata)
    assert base_of(file).name == expected


@pytest.mark.parametrize("heads", [24, 38], ids=["medium", "large"])
def test_sd3_by_its_widths(heads):
    with torch.device("meta"):
        network = diffusers.SD3Transformer2DModel(num_layers=2, num_attention_heads=heads)
    assert base_of(AdapterFile("peft", loras(network, ""))).name == "SD3"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("ss_base_model_version", "sdxl_base_v1-0", "SDXL"),
        ("ss_base_model_version", "sd_v2", "SD 2"),
        ("modelspec.architecture", "Flux-1-dev/lora", "FLUX"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", "SDXL"),
        ("modelspec.architecture", "stable-diffusion-3-medium/lora", "SD3"),
        ("modelspec.architecture", "something else", None),
    ],
)
def test_metadata_tells_where_layers_do_not(key, value, expected):
    changes = {Target("unet", "x"): Change(None, torch.zeros(3))}
    assert base_of(AdapterFile("kohya", changes, metadata={key: value})).name == expected


def test_widths_of_cross_attention_and_of_text_encoders():
    down, up = torch.empty(2, 1024, device="meta"), torch.empty(320, 2, device="meta")
    keys = Target("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    encoders = {"text_encoder": 768, "text_encoder_2": 1280, "text_encoder_3": 4096}
    changes = {keys: Change(LowRank(down, up))}
    for component, width in encoders.items():
        path = "text_model.encoder.layers.0.self_attn.q_proj"
        if width == 4096:
            path = "encoder.block.0.layer.0.SelfAttention.q"
        down = torch.empty(2, width, device="meta")
        changes[Target(component, path)] = Change(LowRank(down, up))
    base = base_of(AdapterFile("kohya", changes))
    assert base.name == "SD 2"
    assert base.encoders == {
        "text_encoder": "CLIP-L",
        "text_encoder_2": "OpenCLIP-bigG",
        "text_encoder_3": "T5-XXL",
    }
