"""A subject from five pictures: SVDiff with prior preservation, judged on both sides.

The subject is a mirrored digit ("a v1 three"), which pretraining never showed. What matters is
whether it is learnt, whether the plain "a three" stays as it was, and whether the other digits do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fastlora
from fastlora.demo.world import WORDS, World
from fastlora.methods.svdiff import personalise
from fastlora.models import digits_data
from fastlora.models.digits import DigitsModel

NAME = "mirrored"


@dataclass(frozen=True)
class Scores:
    """One model, judged. Shares are of samples; distances are per `distances`."""

    distance: float  # of samples of the subject to its held-out pictures
    shown: float  # share of samples of the subject that show it, as `shows` says
    leaked: float  # share of samples of the plain class that show it
    classes: float  # share of samples of the ten digits that the judge reads as asked for
    subject_images: torch.Tensor  # [N, 1, 32, 32]
    class_images: torch.Tensor  # [N, 1, 32, 32]
    digit_images: torch.Tensor  # [M, 1, 32, 32] zero to nine, again and again


@dataclass(frozen=True)
class Trained:
    """One way of personalising, and how well it did."""

    method: str
    parameters: int
    seconds: float
    scores: Scores


@dataclass(frozen=True)
class Task:
    """What is to be learnt, and what to hold on to."""

    subject: digits_data.Subject
    prior: torch.Tensor  # [P, 1, 32, 32] class pictures, sampled once from the plain model
    captions: list[str]  # P


@dataclass(frozen=True)
class Personalised:
    model: DigitsModel  # with the spectral adapter `mirrored`
    subject: digits_data.Subject
    prior: torch.Tensor  # [P, 1, 32, 32] class pictures, sampled once from the plain model
    floor: float  # distance of the subject's own pictures to the held-out ones
    before: Scores
    spectral: Trained
    lora: Trained


def make_subject(world: World) -> Personalised:
    """Personalises one model by SVDiff, which is kept, and one by LoRA."""
    model, other = world.load_model(), world.load_model()
    task = prepare(world, model)
    before = judged(world, model, task.subject)
    spectral = train(world, model, task, fastlora.Spectral())
    lora = train(world, other, task, fastlora.LoRA(rank=world.settings.lora_rank))
    floor = distances(task.subject.images, task.subject.held_out).mean().item()
    return Personalised(model, task.subject, task.prior, floor, before, spectral, lora)


def prepare(world: World, model: DigitsModel) -> Task:
    """The subject, and pictures of its class and of all others from the plain model."""
    settings = world.settings
    subject = digits_data.subject(
        "mirrored", settings.subject_digit, count=settings.subject_images, seed=world.seed
    )
    of_class, of_others = settings.prior
    captions = [subject.class_caption] * of_class
    captions += [f"a {w}" for d, w in enumerate(WORDS) if d != subject.digit] * of_others
    prior = world.sample(model, captions, world.seeds(2, len(captions)), "class pictures")
    return Task(subject, prior, captions)


def train(
    world: World, model: DigitsModel, task: Task, adapter: fastlora.Spectral | fastlora.LoRA
) -> Trained:
    """Adds `mirrored` to the UNet and the text encoder and trains it."""
    settings, subject = world.settings, task.subject
    method = "LoRA" if isinstance(adapter, fastlora.LoRA) else "SVDiff"

    def takes(path: str, module: nn.Module) -> bool:
        kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
        norms = () if method == "LoRA" else (nn.GroupNorm, nn.LayerNorm)
        return isinstance(module, (*kinds, *norms))

    start = world.clock()
    personalise(
        model,
        subject.images.to(world.device),
        lambda drawn: model.encode([subject.caption] * len(drawn)),
        world.schedule,
        prior_images=task.prior.to(world.device),
        prior_cond=lambda drawn: model.encode([task.captions[i] for i in drawn.tolist()]),
        name=NAME,
        adapter=adapter,
        where=takes,
        prediction="v",
        steps=settings.subject_steps,
        batch=settings.subject_batch,
        lr=settings.lora_lr if method == "LoRA" else settings.subject_lr,
        norm_lr=settings.subject_norm_lr,
        seed=world.seed,
        progress=world.progress,
        description=f"  training ({method})",
    )
    seconds = world.clock() - start
    parameters = fastlora.adapters(model)[NAME].parameters
    return Trained(method, parameters, seconds, judged(world, model, subject))


def judged(world: World, model: DigitsModel, subject: digits_data.Subject) -> Scores:
    """Samples the subject, its class and all ten digits; the same noise for every model."""
    settings = world.settings
    n, each = settings.judged, settings.judged_classes
    captions = [subject.caption] * n + [subject.class_caption] * n
    captions += [f"a {word}" for word in WORDS] * each
    images = world.sample(model, captions, world.seeds(3, len(captions)))
    ours, plain, digits = images.split([n, n, 10 * each])
    read = world.score(digits)["digit"] == torch.arange(10).repeat(each)
    return Scores(
        distance=distances(ours, subject.held_out).mean().item(),
        shown=shows(world, ours, subject).float().mean().item(),
        leaked=shows(world, plain, subject).float().mean().item(),
        classes=read.float().mean().item(),
        subject_images=ours,
        class_images=plain,
        digit_images=digits,
    )


def distances(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Distance [N] of each picture to the nearest reference, both blurred over 3x3 pixels: a stroke
    that is a pixel off is near.
    """
    ours, theirs = (F.avg_pool2d(x.float(), 3, 1, 1).flatten(1) for x in (images, references))
    return torch.cdist(ours, theirs).amin(1)


def shows(world: World, images: torch.Tensor, subject: digits_data.Subject) -> torch.Tensor:
    """bool [N]: nearer to the subject's held-out pictures than to their mirror images, and in a
    mirror the judge reads the digit.
    """
    kept = subject.held_out
    faces = distances(images, kept) < distances(images, kept.flip(3))
    return faces & (world.score(images.flip(3))["digit"] == subject.digit)


def save_subject(found: Personalised, out: Path) -> Path:
    path = out / f"{NAME}.safetensors"
    fastlora.save(found.model, path, name=NAME)
    return path
