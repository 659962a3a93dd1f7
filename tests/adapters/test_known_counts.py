"""Known answers about Stable Diffusion 1.5, from its architecture alone: no weights are needed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlora
from fastlora.adapters.base_hash import base_hash
from fastlora.formats import files, native


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    """The UNet with its published configuration."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


@pytest.fixture(scope="module")
def text_encoder() -> nn.Module:
    """CLIP ViT-L/14's, with the dimensions of openai/clip-vit-large-patch14."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    with torch.device("meta"):
        return transformers.CLIPTextModel(config)


def by_dimension(model: nn.Module, counts: dict[str, int]) -> Counter[int]:
    found: Counter[int] = Counter()
    for path, count in counts.items():
        found[model.get_submodule(path).weight.dim()] += count
    return found


def test_the_unet_has_322_856_shifts(unet: nn.Module) -> None:
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    counts = fastlora.parameter_counts(unet, fastlora.Spectral())
    assert by_dimension(unet, counts) == {1: 100_160, 2: 140_416, 4: 82_280}
    assert sum(counts.values()) == 322_856
    # every weight of more than one dimension, and no module twice
    weights = [p for key, p in unet.named_parameters() if key.endswith("weight")]
    assert len(counts) == len(weights)


def test_with_the_text_encoder_it_is_398_197(unet: nn.Module, text_encoder: nn.Module) -> None:
    both = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    counts = fastlora.parameter_counts(both, fastlora.Spectral())
    assert sum(counts.values()) == 398_197
    bytes_of_all = 4 * sum(p.numel() for p in both.parameters())
    assert bytes_of_all / 2**30 == pytest.approx(3.66, abs=0.01)  # of the published 2200 times


def test_the_unet_with_lora_on_its_attention(unet: nn.Module) -> None:
    """Rank 4 on q, k, v and out of all attention layers: the 797,184 numbers of diffusers' example
    (3.2 MB)."""
    counts = fastlora.parameter_counts(
        unet, fastlora.LoRA(rank=4), where=["to_q", "to_k", "to_v", "to_out.0"]
    )
    assert sum(counts.values()) == 797_184


def test_files_of_the_unets_shifts_are_smaller_than_1_7_mb(unet: nn.Module, tmp_path: Path) -> None:
    """What `save` writes for such a model: its own hashes and settings, shifts in float32."""
    counts = fastlora.parameter_counts(unet, fastlora.Spectral())
    modules = {path: {"shift": torch.randn(count)} for path, count in counts.items()}
    config = {
        "kind": "spectral",
        "modules": {path: {"norms": "elementwise"} for path in counts},
        "base_hash": {path: base_hash(torch.randn(999)) for path in counts},
    }
    files.write(tmp_path / "shifts", *native.pack(modules, config))
    size = (tmp_path / "shifts").stat().st_size
    assert 4 * 322_856 < size < 1.7e6
    # `save` of a model writes just that
    small = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    fastlora.inject(small, fastlora.Spectral())
    fastlora.save(small, tmp_path / "small")
    metadata = files.read(tmp_path / "small")[1]
    assert json.loads(metadata["config"]).keys() == {
        "kind", "method", "settings", "modules", "base_hash"
    }  # fmt: skip


def test_counts_are_those_that_inject_gives() -> None:
    model = nn.Sequential(
        nn.Linear(14, 9),
        nn.Conv2d(4, 30, 3, groups=2),
        nn.ConvTranspose2d(4, 40, 3),
        nn.Embedding(13, 6),
        nn.LayerNorm(8),
        nn.GroupNorm(2, 6),
    )
    for spec in (
        fastlora.Spectral(),
        fastlora.Spectral(norms="scalar"),
        fastlora.Spectral(norms="skip"),
        fastlora.LoRA(rank=2, dora=True),
        fastlora.LoRA(rank=4, ranks={"0": 3}),
    ):
        counts = fastlora.parameter_counts(model, spec)
        info = fastlora.inject(model, spec)
        assert sum(counts.values()) == info.parameters and tuple(counts) == info.modules
        for path, count in counts.items():
            slot = model.get_submodule(path).fastlora["default"]
            assert sum(p.numel() for p in slot.parameters()) == count
        fastlora.remove(model, "default")


def test_what_inject_would_refuse() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2), nn.LayerNorm(6))
    count = fastlora.parameter_counts
    with pytest.raises(fastlora.AdapterError, match="parameter_counts: 0: rank 3 is not divisible"):
        count(model, fastlora.LoRA(rank=3))
    with pytest.raises(fastlora.AdapterError, match="parameter_counts: where: .* matches no layer"):
        count(model, fastlora.LoRA(rank=2), where="x")
    with pytest.raises(fastlora.AdapterError, match="ranks, alphas: expected paths"):
        count(model, fastlora.LoRA(rank=2, ranks={"1": 2}))
    with pytest.raises(TypeError, match="parameter_counts: spec"):
        count(model, "lora")  # type: ignore[arg-type]
