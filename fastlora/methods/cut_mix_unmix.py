"""Several subjects in one model that stay apart: Cut-Mix-Unmix of SVDiff (arXiv 2303.11305, 3.4).

Cut-mix: pictures of two subjects side by side, with a caption that says which is where. Unmix: the
words of one subject may not look at the other's half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastlora.adapters.inject import Where
from fastlora.methods.arguments import check_pictures, not_negative, whole
from fastlora.methods.attention_maps import (
    CROSS_ATTENTION,
    capture_attention,
    grid_shape,
    token_positions,
)
from fastlora.methods.svdiff import train_shifts
from fastlora.samplers.arguments import describe, number
from fastlora.samplers.schedule import Schedule
from fastlora.training import TrainResult, prior_preservation
from fastlora.training.losses import Batch, Loss, Metrics

PROBABILITY = 0.6  # of a collage, the paper's
UNMIX_WEIGHT = 0.1  # the paper does not give it; this one is ours
TEMPLATE = "photo of a {left} on the left and a {right} on the right"
SINGLE = "photo of a {name}"


@dataclass(frozen=True)
class Concept:
    """One of several subjects: pictures [N, C, H, W] (or latents) of it and of its class, which the
    model made before (`sample_prior`; None: no prior), and both names as they stand in captions,
    without an article: "[V1] dog", "dog"."""

    images: torch.Tensor
    name: str
    class_name: str
    prior_images: torch.Tensor | None = None


def collage(left: torch.Tensor, right: torch.Tensor, fit: str = "crop") -> torch.Tensor:
    """[C, H, W] with `left` in its left half and `right` in its right one, from two of that size.

    Odd widths give the left one a column more. `fit` "crop" takes the middle of each, as cut-mix
    does; "squeeze" makes each narrower, where nothing may be lost. Raises ValueError for other
    words and for two shapes.
    """
    if left.shape != right.shape or left.dim() != 3:
        raise ValueError(
            "collage: left, right: expected [C, H, W] of one size,"
            f" got {list(left.shape)} and {list(right.shape)}"
        )
    check_fit(fit)
    height, width = left.shape[1:]
    parts = []
    for picture, columns in ((left, width - width // 2), (right, width // 2)):
        if fit == "crop":
            start = (width - columns) // 2
            parts.append(picture[:, :, start : start + columns])
        else:
            size = (height, columns)
            parts.append(F.interpolate(picture[None], size, mode="area")[0])
    return torch.cat(parts, 2)


def check_fit(fit: str) -> None:
    if fit not in ("crop", "squeeze"):
        raise ValueError(f"collage: fit: expected crop or squeeze, got {fit!r}")


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


def check_concepts(concepts: Sequence[Concept], model: nn.Module) -> None:
    """Raises ValueError for what `cut_mix_unmix` cannot put side by side."""
    if len(concepts) < 2:
        raise ValueError(f"cut_mix_unmix: concepts: expected two or more, got {len(concepts)}")
    priors = [c.prior_images is not None for c in concepts]
    if any(priors) and not all(priors):
        raise ValueError("cut_mix_unmix: prior_images: expected for all subjects or none, got some")
    size = concepts[0].images.shape[1:]
    for concept in concepts:
        for name in ("images", "prior_images"):
            images = getattr(concept, name)
            if images is None:
                continue
            what = f"cut_mix_unmix: {name} of {concept.name!r}"
            check_pictures(what, images, model)
            if images.dim() != 4 or images.shape[1:] != size:
                raise ValueError(
                    f"{what}: expected [N, C, H, W], of one size for all subjects, here"
                    f" {list(size)}, got {describe(images)}"
                )


def collage_captions(one: Concept, other: Concept, template: str = TEMPLATE) -> tuple[str, str]:
    """What a collage of `one` on the left and `other` on the right is called, and one of their
    classes. Raises ValueError for a template with other places than {left} and {right}."""
    try:
        return (
            template.format(left=one.name, right=other.name),
            template.format(left=one.class_name, right=other.class_name),
        )
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise _bad_template("template", "{left} and {right}", template, error) from None


def single_captions(concept: Concept, single: str = SINGLE) -> tuple[str, str]:
    """What a picture of one subject is called, and one of its class. Raises ValueError for a
    template with other places than {name}."""
    try:
        return single.format(name=concept.name), single.format(name=concept.class_name)
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        raise _bad_template("single", "{name}", single, error) from None


def _bad_template(name: str, places: str, got: str, error: Exception) -> ValueError:
    return ValueError(
        f"cut_mix_unmix: {name}: expected a caption with {places}, got {got!r}: {error}"
    )


@dataclass(frozen=True)
class Drawn:
    """One training sample, its caption and its prior; left and right mark tokens [L] of a collage
    and are all False otherwise."""

    image: torch.Tensor
    caption: str
    left: torch.Tensor
    right: torch.Tensor
    prior_image: torch.Tensor | None
    prior_caption: str


@dataclass(frozen=True)
class Draws:
    """What `cut_mix_unmix` draws its samples from."""

    concepts: Sequence[Concept]
    tokenize: Callable[[str], torch.Tensor]
    probability: float = PROBABILITY
    template: str = TEMPLATE
    single: str = SINGLE
    fit: str = "crop"

    def check(self) -> None:
        """Meets now what a run would fall over after an hour: every caption is tokenized, the names
        are found in those of collages. Raises ValueError."""
        check_fit(self.fit)
        for i, concept in enumerate(self.concepts):
            pairs = [single_captions(concept, self.single)]
            for j in range(len(self.concepts)):
                if i != j:
                    pairs.append(self.captions(i, j))
                    self.marks(i, j)
            for own, of_classes in pairs:
                self.tokenize(own)
                if concept.prior_images is not None:
                    self.tokenize(of_classes)

    def captions(self, i: int, j: int) -> tuple[str, str]:
        """Of subject i on the left and j on the right, and of their classes."""
        return collage_captions(self.concepts[i], self.concepts[j], self.template)

    def marks(self, i: int, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [L] each: the tokens of both names in the collage's caption."""
        ids, empty = self.tokenize(self.captions(i, j)[0]), self.tokenize("")
        names = (self.concepts[i].name, self.concepts[j].name)
        left, right = (token_positions(ids, self.tokenize(n), empty) for n in names)
        return left, right

    def draw(self, generator: torch.Generator) -> Drawn:
        def pick(images: torch.Tensor) -> torch.Tensor:
            return images[int(torch.randint(len(images), (), generator=generator))]

        def paired(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
            if one is None or other is None:
                return None
            return collage(pick(one), pick(other), self.fit)

        many = len(self.concepts)
        if torch.rand((), generator=generator) < self.probability:
            i, j = torch.randperm(many, generator=generator)[:2].tolist()
            one, other = self.concepts[i], self.concepts[j]
            picture = collage(pick(one.images), pick(other.images), self.fit)
            caption, of_classes = self.captions(i, j)
            prior = paired(one.prior_images, other.prior_images)
            return Drawn(picture, caption, *self.marks(i, j), prior, of_classes)
        one = self.concepts[int(torch.randint(many, (), generator=generator))]
        nothing = torch.zeros_like(self.tokenize(""), dtype=torch.bool)
        prior = None if one.prior_images is None else pick(one.prior_images)
        caption, of_class = single_captions(one, self.single)
        return Drawn(pick(one.images), caption, nothing, nothing, prior, of_class)
