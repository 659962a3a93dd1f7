"""The family of a file's names: from the modules, the metadata, the prefixes, in this order."""

from __future__ import annotations

import pytest

from fastlora.formats.changes import Target
from fastlora.formats.families import family_of
from fastlora.formats.files import FormatError

TEXT = Target("text_encoder", "text_model.encoder.layers.0.mlp.fc1")
MIDDLE = Target("unet", "mid_block.attentions.0.proj_in")  # of SD and SDXL
ONLY_XL = Target("unet", "add_embedding.linear_1")
ONLY_SD = Target("unet", "up_blocks.3.attentions.0.proj_in")
FLUX = {"ss_base_model_version": "flux1"}


def key(prefix: str) -> str:
    return f"{prefix}_text_model_encoder_layers_0_mlp_fc1.alpha"


@pytest.mark.parametrize(
    ("targets", "prefixes", "metadata", "expected"),
    [
        ([ONLY_XL, TEXT], ["lora_te"], FLUX, ("sdxl", True)),  # modules before all else
        ([TEXT], ["lora_te"], FLUX, ("flux", True)),
        ([TEXT], [], {"ss_base_model_version": "sdxl_base_v1-0"}, ("sdxl", True)),
        ([TEXT], [], {"ss_base_model_version": "sd_v2"}, ("sd", True)),
        ([TEXT], ["lora_te"], {"ss_base_model_version": "sd3"}, ("sd", True)),
        ([TEXT, MIDDLE], ["lora_te"], {}, ("sd", True)),
        ([TEXT, MIDDLE], ["lora_te1"], {}, ("sdxl", True)),
        ([TEXT, MIDDLE], ["lora_te1", "lora_te2"], {}, ("sdxl", True)),
        ([TEXT], [], {}, ("sd", False)),
        ([TEXT], ["lora_te1", "lora_te2", "lora_te3"], {}, ("sd", False)),
    ],
)
def test_what_tells_the_family(targets, prefixes, metadata, expected):
    assert family_of(targets, map(key, prefixes), [metadata]) == expected


@pytest.mark.parametrize("targets", [[MIDDLE], [MIDDLE, TEXT], [ONLY_SD, ONLY_XL], []], ids=str)
def test_what_does_not_tell_is_asked_for(targets):
    with pytest.raises(FormatError, match="family sd, sdxl, flux"):
        family_of(targets)


def test_modules_of_two_families_are_not_overruled():
    with pytest.raises(FormatError, match="sd and sdxl"):
        family_of([ONLY_SD, ONLY_XL], [], [FLUX])
