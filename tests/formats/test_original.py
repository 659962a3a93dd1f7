"""ComfyUI's and ai-toolkit's files: the original model's names, with their dots."""

from __future__ import annotations

import pytest
import torch

from fastlora.formats import detect
from fastlora.formats.changes import Target
from fastlora.formats.files import FormatError

QKV = "diffusion_model.double_blocks.3.img_attn.qkv"
OUT = "diffusion_model.single_blocks.0.linear2"
NAMES = [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")]


@pytest.mark.parametrize(("down", "up"), NAMES)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_fused_projections_and_plain_modules_of_flux(down, up, alpha):
    a, b = torch.randn(2, 4), torch.randn(12, 2)
    tensors = {f"{QKV}.{down}": a, f"{QKV}.{up}": b}
    tensors |= {f"{OUT}.{down}": torch.randn(2, 8), f"{OUT}.{up}": torch.randn(4, 2)}
    if alpha is not None:
        tensors[f"{QKV}.alpha"] = torch.tensor(alpha)
    file = detect.unpack(tensors, {})
    assert not file.unused
    wanted = (b.double() @ a.double()) * (1.0 if alpha is None else alpha / 2)
    for i, x in enumerate("qkv"):
        change = file.changes[Target("transformer", f"transformer_blocks.3.attn.to_{x}")]
        found = change.delta((4, 4), torch.float64)
        torch.testing.assert_close(found, wanted[4 * i : 4 * i + 4], rtol=1e-12, atol=1e-12)
        assert set(change.keys) == {key for key in tensors if key.startswith(QKV)}
    assert Target("transformer", "single_transformer_blocks.0.proj_out") in file.changes
    assert len(file.changes) == 4


def test_a_unet_and_keys_that_mean_nothing():
    module = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{module}.lora_A.weight": torch.ones(2, 4),
        f"{module}.lora_B.weight": torch.ones(4, 2),
        "diffusion_model.logit_scale": torch.ones(1),
    }
    file = detect.unpack(tensors, {})
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert list(file.changes) == [Target("unet", path)]
    assert list(file.unused) == ["diffusion_model.logit_scale"]


def test_two_names_of_one_factor_are_refused():
    tensors = {f"{QKV}.{name}": torch.ones(2, 4) for name in ("lora_A.weight", "lora_down.weight")}
    with pytest.raises(FormatError, match="are the same tensor"):
        detect.unpack(tensors, {})
