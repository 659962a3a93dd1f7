"""fastlora's functions about adapters on a real Stable Diffusion pipeline of tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora.adapters import tiled
from tests.adapters.oracles import assert_unchanged, randomise, same_bits, snapshot
from tests.integrations.tiny_pipelines import stable_diffusion

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers' own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROMPTS = ["a cat", "a dog", "a moon"]


def adapted() -> Any:
    pipe = stable_diffusion()
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    where = ["to_q", "to_k", "to_v", "q_proj", "v_proj"]
    fastlora.inject(parts, fastlora.LoRA(rank=4), where=where, name="style", freeze=False)
    for part in parts.values():
        randomise(part)
    return pipe


def images(pipe: Any, prompts: list[str] = PROMPTS, seeds: tuple[int, ...] = (1, 2, 3)) -> Tensor:
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return pipe(
        prompts, latents=torch.stack(noise), num_inference_steps=2, guidance_scale=3.0,
        output_type="pt",
    ).images  # fmt: skip


def test_strengths_folding_and_removal() -> None:
    pipe, plain = adapted(), stable_diffusion()
    base, before = images(plain), images(pipe)
    assert (before - base).abs().max() > 1e-2
    fastlora.set_scale(pipe, 0.0)
    assert same_bits(images(pipe), base)
    with fastlora.scaled(pipe, {"style": 1.0}):
        assert same_bits(images(pipe), before)
        fastlora.fold(pipe)
        torch.testing.assert_close(images(pipe), before, atol=1e-5, rtol=1e-5)
    assert same_bits(images(pipe), base)  # folded again, with nothing
    fastlora.unfold(pipe)
    fastlora.remove(pipe, "style")
    for name, part in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        was = snapshot(getattr(plain, name))
        assert_unchanged(part, {**was, "ids": snapshot(part)["ids"]})
    assert same_bits(images(pipe), base)


def test_strengths_per_image_with_guidance() -> None:
    """Three prompts make three rows for the text encoder, and twice three for the UNet."""
    pipe = adapted()
    rows = torch.tensor([-1.0, 0.5, 2.0])
    fastlora.set_scale(pipe, {"style": rows})
    with tiled(pipe, 2):
        together = images(pipe)
        with pytest.raises(fastlora.ContractError, match=r"_proj: .*with leading size 3"):
            images(pipe, PROMPTS[:1], seeds=(1,))
    for i, row in enumerate(rows.tolist()):
        fastlora.set_scale(pipe, {"style": row})
        alone = images(pipe, PROMPTS[i : i + 1], seeds=(i + 1,))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_a_reserve_before_load(tmp_path: Path) -> None:
    pipe, source = stable_diffusion(), adapted()
    fastlora.save(source, tmp_path / "style.safetensors", format="diffusers")
    before = snapshot(pipe.vae)
    info = fastlora.reserve(pipe, 4, where=["to_q", "to_k", "to_v", "q_proj", "v_proj"])
    assert {path.partition(".")[0] for path in info.modules} == {"unet", "text_encoder"}
    assert_unchanged(pipe.vae, before)
    fastlora.load(pipe, tmp_path / "style.safetensors", name="style")
    assert fastlora.adapters(pipe)["style"].modules == fastlora.adapters(source)["style"].modules
    torch.testing.assert_close(images(pipe), images(source), atol=1e-5, rtol=1e-5)
    fastlora.remove(pipe, "style")
    fastlora.reserve(pipe, 0)
    assert same_bits(images(pipe), images(stable_diffusion()))


def test_tune_takes_the_pipelines_own_arguments(monkeypatch: Any) -> None:
    from fastlora import tuning

    monkeypatch.setenv("FASTLORA_TUNE_FILE", "")
    monkeypatch.setattr(tuning, "_measured", lambda plans, args: dict.fromkeys(plans, 1e-6))
    report = fastlora.tune(adapted(), "a cat", num_inference_steps=1, output_type="latent")
    assert [row.call for row in report.rows] == [
        "8x12x12, rank 4, float32, bias",  # the text encoder's tokens
        "32x16x16, rank 4, float32",  # 4 x 4 positions of the UNet, twice for guidance
        "16x12x16, rank 4, float32",  # cross-attention to both prompts
    ]
