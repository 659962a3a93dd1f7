"""A tiny UNet and a text encoder, adapter files of other tools for them, and what they compute with
weights merged in float64. Nothing here calls fastlora."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

diffusers: Any = pytest.importorskip("diffusers")
transformers: Any = pytest.importorskip("transformers")

Deltas = dict[tuple[str, str], Tensor]  # ΔW at strength 1, float64, by component and path
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te_text_model"}
ATTENTION = ("to_q", "to_v", "q_proj", "v_proj")


def models() -> dict[str, nn.Module]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        mid_block_type=None,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=12,
        attention_head_dim=4,
        transformer_layers_per_block=1,
    )
    config = transformers.CLIPTextConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=10,
        bos_token_id=0,
        eos_token_id=1,
    )
    made = {"unet": unet, "text_encoder": transformers.CLIPTextModel(config)}
    for model in made.values():
        model.eval()
        for parameter in model.parameters():  # biases too, which begin at zero
            nn.init.normal_(parameter, std=0.2)
    return made


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and the ids of the prompt's tokens."""
    return torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randint(2, 40, (2, 10))


def called(models: Mapping[str, Any], x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
    hidden = models["text_encoder"](ids).last_hidden_state
    return models["unet"](x, t, hidden).sample


class Merged:
    """Models in float64, and what they compute with updates of their weights."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.models = {part: copy.deepcopy(model).double() for part, model in models.items()}

    def changed(self, *parts: tuple[Deltas, float]) -> dict[str, Any]:
        """The models with updates in their weights."""
        changed: dict[str, Any] = copy.deepcopy(self.models)
        for deltas, strength in parts:
            for (part, path), delta in deltas.items():
                weight = changed[part].get_submodule(path).weight
                weight.data += strength * delta.reshape(weight.shape)
        return changed

    def __call__(self, *parts: tuple[Deltas, float], args: tuple[Tensor, ...]) -> Tensor:
        x, t, ids = args
        with torch.no_grad():
            return called(self.changed(*parts), x.double(), t, ids)


def product(up: Tensor, down: Tensor) -> Tensor:
    """`up [out, r, ...] down [r, ...]` as a matrix, float64."""
    return up.double().flatten(1) @ down.double().flatten(1)


def kohya_file(
    models: Mapping[str, nn.Module], path: Path, ends: tuple[str, ...], rank: int, alpha: float
) -> Deltas:
    """Writes a LoRA of the layers whose paths end so."""
    tensors: dict[str, Tensor] = {}
    deltas: Deltas = {}
    for part, model in models.items():
        for name, layer in model.named_modules():
            if name.endswith(ends) and isinstance(layer, nn.Linear):
                key = f"{KOHYA[part]}_{name.replace('.', '_')}"
                down = torch.randn(rank, layer.in_features)
                up = torch.randn(layer.out_features, rank) * 0.2
                tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
                deltas[part, name] = alpha / rank * product(up, down)
    save_file(tensors, path)
    return deltas


def peft_folders(
    models: Mapping[str, nn.Module],
    folder: Path,
    targets: Mapping[str, list[str]],
    rank: int,
    alpha: float,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> Deltas:
    """PEFT's own adapter for each model, saved by PEFT; ranks and alphas of some layers by the end
    of their paths."""
    peft = pytest.importorskip("peft")
    deltas: Deltas = {}
    for part, model in models.items():
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets[part],
            rank_pattern=dict(ranks),
            alpha_pattern=dict(alphas),
            init_lora_weights=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a base model without a name
            peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder / part)
        tensors = load_file(folder / part / "adapter_model.safetensors")
        for key, down in tensors.items():
            name, found, end = key.removeprefix("base_model.model.").partition(".lora_")
            if found and "A" in end:
                own = next((a for end, a in alphas.items() if name.endswith(end)), alpha)
                delta = own / len(down) * product(tensors[key.replace("_A", "_B")], down)
                deltas[part, name] = delta.t() if "embedding" in end else delta
    return deltas


FC = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def dora_file(layer: nn.Linear, path: Path) -> Callable[[Tensor, float], Tensor]:
    """Writes a DoRA of the text encoder's first fc1; its W' - W for a weight and a strength:
    `m (W + s ΔW) / ‖W + s ΔW‖` by rows."""
    down, up = torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4)
    size = torch.rand(layer.out_features, 1) + 0.5
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    parts["dora_scale"] = size
    save_file({f"{FC}.{key}": value for key, value in parts.items()}, path)

    def change(weight: Tensor, strength: float) -> Tensor:
        whole = weight + strength * 0.5 * product(up, down)
        return size.double() * whole / whole.norm(dim=1, keepdim=True) - weight

    return change


def loha_file(layer: nn.Linear, path: Path) -> Callable[[Tensor, float], Tensor]:
    """The same with a LoHa, `(w1_a w1_b) ∘ (w2_a w2_b) α/r`."""
    sizes = {"a": (layer.out_features, 4), "b": (4, layer.in_features)}
    parts = {f"hada_w{i}_{end}": torch.randn(size) for i in (1, 2) for end, size in sizes.items()}
    tensors = {**parts, "alpha": torch.tensor(2.0)}
    save_file({f"{FC}.{key}": value for key, value in tensors.items()}, path)
    first, second = (product(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2))

    def change(weight: Tensor, strength: float) -> Tensor:
        return strength * 0.5 * first * second

    return change
