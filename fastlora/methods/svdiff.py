"""Personalisation by spectral shifts: SVDiff, Han et al., 2023, arXiv 2303.11305."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.adapters import Spectral, adapted_layers, inject, parameters
from fastlora.samplers.schedule import Schedule
from fastlora.training import TrainResult, prior_preservation, train


def personalise(
    model: nn.Module,
    images: torch.Tensor,  # [N, ...] of the subject: five are enough
    cond: torch.Tensor,  # [1, ...] its name: a rare word and its class
    schedule: Schedule,
    *,
    prior_images: torch.Tensor | None = None,  # [P, ...] of the class, sampled from the plain model
    prior_cond: torch.Tensor | None = None,  # [1, ...] one name for all of them, or [P, ...]
    name: str = "subject",
    adapter: Spectral | None = None,
    where: Any = None,
    prediction: str = "epsilon",
    prior_weight: float = 1.0,
    steps: int = 500,
    batch: int = 1,
    lr: float = 1e-3,
    norm_lr: float = 1e-6,
    seed: int = 0,
    progress: bool = True,
    description: str = "subject",
) -> TrainResult:
    """Adds the adapter `name` to every weight that can take it and trains nothing but the singular
    values' shifts: `W' = U diag(relu(sigma + delta)) V^T`.

    `L(subject) + prior_weight L(class)` with `batch` pictures of each in one pass (DreamBooth's
    prior preservation): `prior_images` come from the model itself, sampled once before, and hold on
    to what it knew. Without them only the first part is left. AdamW, weight decay 1e-2, constant
    rates, `lr` for matrices and `norm_lr` for norms, gradients clipped to 1: the paper's settings.

    The method keeps the classes and underfits the subject; a LoRA of the same budget does the
    reverse.
    """
    with_prior = prior_images is not None and prior_cond is not None and prior_weight > 0
    if not with_prior and (prior_images is not None or prior_cond is not None):
        if prior_weight > 0:
            raise ValueError(
                "personalise: prior_images, prior_cond: expected both or neither, got one"
            )
    if not len(images):
        raise ValueError("personalise: images: expected at least one, got none")
    inject(model, adapter or Spectral(), where, name=name, seed=seed)
    norms = {
        id(p)
        for layer in adapted_layers(model).values()
        if layer.is_norm() and name in layer.fastlora
        for p in layer.fastlora[name].parameters()
    }

    def optimizer(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in trained if id(p) not in norms], "lr": lr},
            {"params": [p for p in trained if id(p) in norms], "lr": norm_lr},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=1e-2)

    def batches(generator: torch.Generator) -> dict[str, torch.Tensor]:
        drawn = torch.randint(len(images), (batch,), generator=generator)
        found = {"x0": images[drawn], "cond": rows(cond, drawn)}
        if with_prior:
            assert prior_images is not None and prior_cond is not None
            drawn = torch.randint(len(prior_images), (batch,), generator=generator)
            found |= {"prior_x0": prior_images[drawn], "prior_cond": rows(prior_cond, drawn)}
        return found

    return train(
        model,
        prior_preservation(prediction, prior_weight if with_prior else 0.0),
        batches,
        schedule,
        parameters=parameters(model, name),
        optimizer=optimizer,
        steps=steps,
        seed=seed,
        progress=progress,
        description=description,
    )


def rows(cond: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The drawn samples' conditions; one condition stands for all."""
    return cond.expand(len(drawn), *cond.shape[1:]) if len(cond) == 1 else cond[drawn]
