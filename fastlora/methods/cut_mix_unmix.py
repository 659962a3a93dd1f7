"""Several subjects in one model that stay apart: Cut-Mix-Unmix of SVDiff (arXiv 2303.11305, 3.4).

Cut-mix: pictures of two subjects side by side, with a caption that says which is where. Unmix: the
words of one subject may not look at the other's half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastlora.adapters.selecting import Where
from fastlora.methods.arguments import not_negative, whole
from fastlora.methods.attention_maps import (
    CROSS_ATTENTION,
    capture_attention,
    grid_shape,
)
from fastlora.methods.collages import (
    PROBABILITY,
    SINGLE,
    TEMPLATE,
    Concept,
    Draws,
    check_concepts,
)
from fastlora.methods.svdiff import train_shifts
from fastlora.samplers.arguments import number
from fastlora.samplers.schedule import Schedule
from fastlora.training import TrainResult, prior_preservation
from fastlora.training.losses import Batch, Loss, Metrics

UNMIX_WEIGHT = 0.1  # the paper does not give it; this one is ours


def unmix_loss(
    maps: dict[str, torch.Tensor],  # [B, heads, N, L] by layer, as `capture_attention` gives them
    left: torch.Tensor,  # bool [B, L]: tokens of the subject in the left half
    right: torch.Tensor,  # bool [B, L]
    size: tuple[int, int],  # (H, W) of what the model saw
) -> torch.Tensor:
    """`mean over layers and collages of ½ (MSE(A_left, 0 | right half) + MSE(A_right, 0 | left))`.

    A is the mean over heads; the halves are resized (nearest) to each layer's feature map; an MSE
    is the mean of the squared map over the positions of the other's half and the subject's tokens.
    Rows without marked tokens are no collages and do not count; 0 where none is left. On a GPU keep
    `left` and `right` on the CPU: which rows count is asked of them.

    Raises ValueError for no maps, and for maps that are of no picture of that size.
    """
    if not maps:
        raise ValueError("unmix_loss: maps: expected those of at least one layer, got none")
    device = next(iter(maps.values())).device
    rows = (left.any(1) & right.any(1)).nonzero()[:, 0]
    if not len(rows):
        return torch.zeros((), device=device)
    left, right = left[rows].to(device), right[rows].to(device)
    rows = rows.to(device)
    columns = (torch.arange(size[1], device=device) < size[1] - size[1] // 2).float()
    parts = []
    for attention in maps.values():
        a = attention[rows].mean(1)  # [R, N, L]
        h, w = grid_shape(a.shape[1], *size)
        in_left = F.interpolate(columns[None, None], w, mode="nearest")[0, 0].expand(h, w).flatten()
        pairs = ((left, 1 - in_left), (right, in_left))
        for tokens, elsewhere in pairs:
            weight = elsewhere[None, :, None] * tokens[:, None, :]  # [R, N, L]
            parts.append((a.square() * weight).sum((1, 2)) / weight.sum((1, 2)))
    return torch.stack(parts).mean()


def unmixed(loss: Loss, weight: float = UNMIX_WEIGHT, where: Where = CROSS_ATTENTION) -> Loss:
    """`loss + weight unmix_loss` over the same forward pass.

    Batch: what `loss` needs, left and right bool [B, L], the marked tokens of the first B samples
    that the model sees (a prior comes after them, and is left alone).
    """

    def both(
        model: Any, batch: Batch, schedule: Schedule, generator: torch.Generator
    ) -> tuple[torch.Tensor, Metrics]:
        left, right = batch["left"], batch["right"]
        if not weight or not bool(left.any()):
            value, metrics = loss(model, batch, schedule, generator)
            return value, {**metrics, "unmix": torch.zeros_like(value)}
        with capture_attention(model, where) as maps:
            value, metrics = loss(model, batch, schedule, generator)
        mine = {path: attention[: len(left)] for path, attention in maps.items()}
        apart = unmix_loss(mine, left, right, tuple(batch["x0"].shape[-2:]))
        value = value + weight * apart
        return value, {**metrics, "loss": value.detach(), "unmix": apart.detach()}

    return both


def cut_mix_unmix(
    model: nn.Module,
    concepts: Sequence[Concept],
    encode: Callable[[list[str]], torch.Tensor],  # captions -> cond [B, L, D]
    tokenize: Callable[[str], torch.Tensor],  # a caption -> ids int64 [L]
    schedule: Schedule,
    *,
    prediction: str = "epsilon",
    prior_weight: float = 1.0,
    probability: float = PROBABILITY,
    unmix_weight: float = UNMIX_WEIGHT,
    template: str = TEMPLATE,
    single: str = SINGLE,
    fit: str = "crop",
    batch: int = 1,
    attention: Where = CROSS_ATTENTION,
    **options: Any,
) -> TrainResult:
    """Trains one adapter on two or more subjects so that they appear together and do not mix.

    Each of the `batch` samples is a collage with `probability`: two of the subjects, of three or
    more any two, in random order, and the caption that `template` makes of their names; otherwise a
    picture of one, captioned by `single`. Its prior sample is built alike: a collage of the class
    pictures under the classes' names. `L = L(subject) + prior_weight L(prior) + unmix_weight
    L(unmix)`; probability 0 is joint training without cut-mix, unmix_weight 0 leaves out unmix.
    `options` are those of `train_shifts`.

    To sample, use another caption than the template ("a [V1] dog sitting beside a [V2] sculpture"),
    and a negative one against stitched halves, as the paper does. A text encoder inside of `model`
    is trained along if `where` reaches it.

    Raises, with the model unchanged, ValueError for fewer than two subjects, pictures that are none
    or of several sizes, priors of some but not all, a number out of its range, another `fit` or
    `prediction`, templates with other places than those of names, names that captions or the
    tokenizer do not tell apart, and where `attention` names no layer; then what `train_shifts`
    raises.
    """
    batch = whole("cut_mix_unmix: batch", batch, 1)
    prior_weight = not_negative("cut_mix_unmix: prior_weight", prior_weight)
    unmix_weight = not_negative("cut_mix_unmix: unmix_weight", unmix_weight)
    if not 0 <= number(probability) <= 1:
        raise ValueError(f"cut_mix_unmix: probability: expected 0 to 1, got {probability!r}")
    check_concepts(concepts, model)
    schedule.noise_table(prediction)  # which refuses another word
    if not prior_weight:
        concepts = [replace(concept, prior_images=None) for concept in concepts]
    with_prior = concepts[0].prior_images is not None
    draws = Draws(concepts, tokenize, probability, template, single, fit)
    draws.check()
    if unmix_weight:
        with capture_attention(model, attention):
            pass  # which refuses a selection of none

    def batches(generator: torch.Generator) -> Batch:
        drawn = [draws.draw(generator) for _ in range(batch)]
        found: dict[str, Any] = {
            "x0": torch.stack([d.image for d in drawn]),
            "cond": encode([d.caption for d in drawn]),
            "left": torch.stack([d.left for d in drawn]),
            "right": torch.stack([d.right for d in drawn]),
        }
        if with_prior:
            images = [d.prior_image for d in drawn if d.prior_image is not None]
            found["prior_x0"] = torch.stack(images)
            found["prior_cond"] = encode([d.prior_caption for d in drawn])
        return found

    loss = prior_preservation(prediction, prior_weight if with_prior else 0.0)
    return train_shifts(model, unmixed(loss, unmix_weight, attention), batches, schedule, **options)
