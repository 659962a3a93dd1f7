"""Pictures of several subjects side by side, with their captions: what Cut-Mix-Unmix trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fastlora.methods.arguments import check_pictures
from fastlora.methods.attention_maps import token_positions
from fastlora.samplers.arguments import describe

PROBABILITY = 0.6  # of a collage, the paper's
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
