"""Visual sliders: one direction of strength from a few pairs of pictures.

Concept Sliders, Gandikota et al., 2023, arXiv 2311.12092, section 4.2. For settings that do well
look at `fastlora.demo`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.adapters import LoRA, inject, parameters
from fastlora.samplers.schedule import Schedule
from fastlora.training import TrainResult, train
from fastlora.training import visual_slider as visual_slider_loss


def noxattn(path: str, module: nn.Module) -> bool:
    """The paper's default choice of layers: not the cross-attention on the text and not what embeds
    the time, so that a slider changes how things look and leaves what the prompt says.
    """
    aside = ("attn2", "time_emb", "text_")
    return isinstance(module, nn.Linear | nn.Conv2d) and not any(word in path for word in aside)


def train_visual_slider(
    model: nn.Module,
    low: torch.Tensor,  # [N, ...] pictures with little of it
    high: torch.Tensor,  # [N, ...] the same pictures with much of it
    cond: torch.Tensor,  # [N, ...] conditions that do not name it
    schedule: Schedule,
    *,
    name: str = "slider",
    adapter: LoRA | None = None,
    where: Any = noxattn,
    prediction: str = "epsilon",
    steps: int = 500,
    batch: int = 4,
    lr: float = 2e-4,
    strength: float = 1.0,
    seed: int = 0,
    progress: bool = True,
    description: str = "slider",
) -> TrainResult:
    """Adds the adapter `name` (default: LoRA of rank 4, alpha 1) and trains it; at strength
    `+strength` the model makes pictures like `high`, at `-strength` like `low`, in between and
    beyond what lies there.

    `MSE(f_{+s}(B_t), target_B) + MSE(f_{-s}(A_t), target_A)` for a pair A low, B high under the
    same noise and t. The paper runs two passes, one for each sign; here it is one pass over both,
    because an adapter may have another strength for every sample. `model(x, t, cond)` predicts
    `prediction`; of the N pairs, `batch` are drawn for each step. The adapter is left at scale 1.

    Pass `where` to adapt other layers: a rate of 2e-4 is known to be too much for large models.
    """
    if len(low) != len(high) or len(low) != len(cond) or not len(low):
        raise ValueError(
            "train_visual_slider: expected as many low as high pictures as conditions, at least 1,"
            f" got {len(low)}, {len(high)}, {len(cond)}"
        )
    inject(model, adapter or LoRA(rank=4, alpha=1.0), where, name=name, seed=seed)

    def batches(generator: torch.Generator) -> dict[str, torch.Tensor]:
        drawn = torch.randint(len(low), (batch,), generator=generator)
        return {"low": low[drawn], "high": high[drawn], "cond": cond[drawn]}

    return train(
        model,
        visual_slider_loss(name, prediction, float(strength)),
        batches,
        schedule,
        parameters=parameters(model, name),
        steps=steps,
        lr=lr,
        seed=seed,
        progress=progress,
        description=description,
    )
