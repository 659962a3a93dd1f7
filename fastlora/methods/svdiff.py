"""Personalisation by spectral shifts: SVDiff, Han et al., 2023, arXiv 2303.11305."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastlora.adapters import LoRA, Spectral, adapted_layers, inject, parameters
from fastlora.methods.arguments import Cond, check_cond, check_pictures, not_negative, whole
from fastlora.samplers.schedule import Schedule
from fastlora.training import (
    TrainResult,
    adamw,
    ensure_writable,
    prior_preservation,
    train,
)
from fastlora.training.losses import Batch, Loss

Materialize = Literal["forward", "step"]


def personalise(
    model: nn.Module,
    images: torch.Tensor,  # [N, ...] of the subject: five are enough
    cond: Cond,  # its name: a rare word and its class
    schedule: Schedule,
    *,
    prior_images: torch.Tensor | None = None,  # [P, ...] of its class: `sample_prior`
    prior_cond: Cond | None = None,
    prediction: str = "epsilon",
    prior_weight: float = 1.0,
    batch: int = 1,
    **options: Any,
) -> TrainResult:
    """Adds the adapter `name` to every weight that can take it and trains nothing but the shifts of
    the singular values: `W' = U diag(relu(sigma + delta)) V^T`.

    `L(subject) + prior_weight L(class)` with `batch` pictures of each in one pass (DreamBooth's
    prior preservation): `prior_images` come from the model itself, sampled once before, and hold on
    to what it knows. Without them, or with weight 0 (single-image editing), only the first part is
    left. `options` are those of `train_shifts`; the defaults are the paper's, for Stable Diffusion.
    With a LoRA as `adapter` it is DreamBooth with LoRA.

    Raises, with the model unchanged, ValueError for a number out of its range, for pictures that
    are none, not finite or of another dtype than the model's and float32, for conditions that are
    neither 1 nor one for each picture, for half a prior and another `prediction`; then what
    `train_shifts` raises.
    """
    batch = whole("personalise: batch", batch, 1)
    weight = not_negative("personalise: prior_weight", prior_weight)
    if (prior_images is None) != (prior_cond is None):
        raise ValueError("personalise: prior_images, prior_cond: expected both or neither, got one")
    check_pictures("personalise: images", images, model)
    check_cond("personalise: cond", cond, len(images))
    prior = None
    if prior_images is not None and prior_cond is not None:
        check_pictures("personalise: prior_images", prior_images, model)
        check_cond("personalise: prior_cond", prior_cond, len(prior_images))
        if prior_images.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"personalise: prior_images: expected the size of images {list(images.shape[1:])},"
                f" got {list(prior_images.shape[1:])}"
            )
        prior = (prior_images, prior_cond) if weight else None
    schedule.noise_table(prediction)  # which refuses another word

    def batches(generator: torch.Generator) -> Batch:
        x0, its_cond = draw(images, cond, batch, generator)
        found = {"x0": x0, "cond": its_cond}
        if prior is not None:
            x0, its_cond = draw(*prior, batch, generator)
            found |= {"prior_x0": x0, "prior_cond": its_cond}
        return found

    loss = prior_preservation(prediction, 0.0 if prior is None else weight)
    return train_shifts(model, loss, batches, schedule, **options)


def train_shifts(
    model: nn.Module,
    loss: Loss,
    batches: Callable[[torch.Generator], Batch],
    schedule: Schedule,
    *,
    name: str = "subject",
    adapter: Spectral | LoRA | None = None,
    where: Any = None,
    steps: int = 500,
    lr: float = 1e-3,
    norm_lr: float = 1e-6,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    materialize: Materialize | None = None,
    progress: bool = True,
    description: str = "subject",
) -> TrainResult:
    """Adds the adapter `name` (default: `Spectral()`) where `where` says and minimises `loss` over
    its numbers alone.

    AdamW with weight decay 1e-2 and constant rates, `lr` for matrices and `norm_lr` for norms,
    gradients clipped to 1: SVDiff's settings. `checkpoint` and `materialize` as in `train`: "step"
    is quicker and takes one more copy of the adapted weights.

    Raises ValueError for a number out of its range, OSError for a checkpoint's directory that
    cannot be written and what `inject` raises, with the model unchanged; then what `train` raises:
    the adapter is still there after that.
    """
    steps = whole("train_shifts: steps", steps, 0)
    checkpoint_every = whole("train_shifts: checkpoint_every", checkpoint_every, 1)
    seed = whole("train_shifts: seed", seed, 0)
    lr = not_negative("train_shifts: lr", lr)
    norm_lr = not_negative("train_shifts: norm_lr", norm_lr)
    if materialize not in (None, *get_args(Materialize)):
        raise ValueError(
            f"train_shifts: materialize: expected 'forward', 'step' or None, got {materialize!r}"
        )
    if checkpoint is not None:
        ensure_writable(Path(checkpoint).parent)
    inject(model, adapter or Spectral(), where, name=name, seed=seed)
    layers = [m for m in adapted_layers(model).values() if m.is_norm() and name in m.fastlora]
    norms = {id(p) for layer in layers for p in layer.fastlora[name].parameters()}

    def optimizer(trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in trained if id(p) not in norms], "lr": lr},
            {"params": [p for p in trained if id(p) in norms], "lr": norm_lr},
        ]
        return adamw([g for g in groups if g["params"]])

    return train(
        model,
        loss,
        batches,
        schedule,
        parameters=parameters(model, name),
        optimizer=optimizer,
        steps=steps,
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        materialize=materialize,
        progress=progress,
        description=description,
    )


def draw(
    images: torch.Tensor, cond: Cond, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` of the pictures, with their conditions."""
    drawn = torch.randint(len(images), (count,), generator=generator)
    if isinstance(cond, torch.Tensor):
        found = cond.expand(count, *cond.shape[1:]) if len(cond) == 1 else cond[drawn]
    else:
        found = cond(drawn)
    return images[drawn], found
