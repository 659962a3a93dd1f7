"""`fastlora.save` in the formats whose names are not the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora.formats.files import FormatError


class Encoder(nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        *parents, last = path.split(".")
        module: nn.Module = self
        for parent in parents:
            module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.add_module(last, nn.Linear(4, 8))
        fastlora.inject(self, fastlora.LoRA(rank=2), name="style")


@pytest.mark.parametrize(
    ("family", "prefix"), [(None, "lora_te"), ("sd", "lora_te"), ("sdxl", "lora_te1")]
)
def test_a_text_encoder_has_its_familys_prefix(tmp_path: Path, family, prefix) -> None:
    models = {"text_encoder": Encoder("text_model.encoder.layers.0.mlp.fc1")}
    for format in ("kohya", "lycoris"):
        path = tmp_path / f"{format}.safetensors"
        fastlora.save(models, path, format=format, family=family)
        assert {key.partition("_text_model")[0] for key in load_file(path)} == {prefix}


def test_a_family_that_is_not_told_is_asked_for(tmp_path: Path) -> None:
    models, path = {"unet": Encoder("mid_block.attentions.0.proj_in")}, tmp_path / "a.safetensors"
    with pytest.raises(FormatError, match="say which: family sd, sdxl, flux"):
        fastlora.save(models, path, format="kohya")
    with pytest.raises(FormatError, match="family: expected one of sd, sdxl, flux, got 'sd3'"):
        fastlora.save(models, path, format="kohya", family="sd3")
    with pytest.raises(FormatError, match="only kohya and lycoris have names by family"):
        fastlora.save(models, path, format="diffusers", family="sd")
    assert not path.exists()
    fastlora.save(models, path, format="kohya", family="sdxl")
    assert all(key.startswith("lora_unet_middle_block_1") for key in load_file(path))


@pytest.mark.parametrize("format", ["peft", "diffusers", "diffusers-lora", "kohya", "lycoris"])
def test_a_layer_by_itself_has_a_name_in_fastloras_format_only(tmp_path: Path, format) -> None:
    layer, path = nn.Linear(4, 8), tmp_path / "a.safetensors"
    fastlora.inject(layer, fastlora.LoRA(rank=2), name="style")
    with pytest.raises(FormatError, match=f"save: 'style': the model is itself .*{format} has no"):
        fastlora.save(layer, path, format=format)
    assert not path.exists()
    fastlora.save(layer, path)
    assert fastlora.load(nn.Linear(4, 8), path).adapter is not None
