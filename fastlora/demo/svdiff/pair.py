"""Two subjects in one picture, with and without Cut-Mix-Unmix.

The canvas is twice as wide as the pictures that the model knows, so that two digits have room, and
each half is one that the judge can read: nothing is resized anywhere. A subject alone stands in the
middle of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import fastlora
from fastlora.demo.subject import shows
from fastlora.demo.svdiff.settings import ShiftSettings
from fastlora.demo.world import World
from fastlora.methods import Concept, capture_attention, cut_mix_unmix, unmix_loss
from fastlora.methods.collages import Draws, collage_captions
from fastlora.models import digits_data
from fastlora.models.digits import DigitsModel
from fastlora.samplers import noise, sample

NAME = "pair"
TEXTS: dict[str, Any] = {
    "template": "a {left} on the left and a {right} on the right",
    "single": "a {name}",
}


@dataclass(frozen=True)
class Together:
    """One way of training on both. Shares are of all samples, of both orders."""

    images: torch.Tensor  # [2 N, 1, 32, 64]: N in the first order, then N in the other
    placed: float  # each subject in the half that the caption gives it
    present: float  # both, in any order
    either: float  # at least one
    apart: float  # two things of some kind, one in each half
    strayed: float  # the unmix loss of the trained model on the collages that it was not shown


@dataclass(frozen=True)
class Paired:
    captions: tuple[str, str]
    examples: torch.Tensor  # [N, 1, 32, 64] collages as they are trained on
    ceiling: float  # share of collages of held-out pictures that the judge counts as placed
    ways: dict[str, Together]


def wide(images: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 1, 32, 32] in the middle of canvases [N, 1, 32, 64]."""
    return F.pad(images, (16, 16), value=-1.0)


def make_pair(world: World, settings: ShiftSettings) -> Paired:
    subjects = [digits_data.subject("mirrored", digit, seed=world.seed) for digit in settings.pair]
    plain = world.load_model()
    n = settings.pair_prior
    words = [s.class_caption for s in subjects for _ in range(n)]
    prior = world.sample(plain, words, world.seeds(8, 2 * n), "class pictures").split(n)
    concepts = [
        Concept(
            wide(s.images).to(world.device),
            f"v{i + 1} {digits_data.DIGITS[s.digit]}",
            digits_data.DIGITS[s.digit],
            wide(prior[i]).to(world.device),
        )
        for i, s in enumerate(subjects)
    ]
    ways = {}
    for name, options in {
        "both, one at a time": {"probability": 0.0, "unmix_weight": 0.0},
        "Cut-Mix": {"unmix_weight": 0.0},
        "Cut-Mix-Unmix": {"unmix_weight": settings.unmix_weight},
    }.items():
        ways[name] = _way(world, settings, subjects, concepts, name, options)
    m = min(len(s.held_out) for s in subjects)
    held_out = torch.cat([s.held_out[:m] for s in subjects], 3)
    pairs = (concepts, concepts[::-1])
    first, second = (collage_captions(a, b, TEXTS["template"])[0] for a, b in pairs)
    ceiling = placed(world, held_out, subjects).float().mean().item()
    examples = torch.cat([subjects[0].images, subjects[1].images], 3)
    return Paired((first, second), examples, ceiling, ways)


def _way(
    world: World,
    settings: ShiftSettings,
    subjects: list[digits_data.Subject],
    concepts: list[Concept],
    name: str,
    options: dict[str, Any],
) -> Together:
    model = world.load_model()

    def tokenize(caption: str) -> torch.Tensor:
        return model.tokenizer(caption)[0]

    cut_mix_unmix(
        model,
        concepts,
        model.encode,
        tokenize,
        world.schedule,
        prediction="v",
        batch=settings.pair_batch,
        name=NAME,
        adapter=fastlora.Spectral(),
        steps=settings.pair_steps,
        lr=settings.pair_rate,
        norm_lr=settings.norm_rate,
        materialize="step",
        seed=world.seed,
        progress=world.progress,
        description=f"  training ({name})",
        **TEXTS,
        **options,
    )
    draws = Draws(concepts, tokenize, **TEXTS)
    n = settings.pair_judged
    captions = [draws.captions(0, 1)[0]] * n + [draws.captions(1, 0)[0]] * n
    images = sample_wide(world, model, captions)
    first, second = (
        placed(world, part, pair)
        for part, pair in zip(images.split(n), (subjects, subjects[::-1]), strict=True)
    )
    other = torch.cat(
        [placed(world, images[:n], subjects[::-1]), placed(world, images[n:], subjects)]
    )
    right = torch.cat([first, second])
    halves = images.split(32, 3)
    some = [shows(world, half, s) for half in halves for s in subjects]
    return Together(
        images,
        right.float().mean().item(),
        (right | other).float().mean().item(),
        torch.stack(some).any(0).float().mean().item(),
        apart(images, subjects).float().mean().item(),
        strayed(world, model, draws, subjects),
    )


def sample_wide(world: World, model: DigitsModel, captions: list[str]) -> torch.Tensor:
    """[N, 1, 32, 64], on the CPU; the two orders of a caption start from the same noises."""
    n = len(captions) // 2
    with torch.no_grad():
        cond, empty = model.encode(captions), model.encode([""] * len(captions))
    x = noise(world.seeds(3, n) * 2, (1, 32, 64), world.device)
    guidance = world.settings.guidance
    return sample(model, world.table, x, cond, empty, guidance, progress=False).cpu()


def placed(world: World, images: torch.Tensor, subjects: list[digits_data.Subject]) -> torch.Tensor:
    """bool [N]: the left half shows the first subject and the right half the second."""
    left, right = images.split(32, 3)
    return shows(world, left, subjects[0]) & shows(world, right, subjects[1])


def apart(images: torch.Tensor, subjects: list[digits_data.Subject]) -> torch.Tensor:
    """bool [N]: either half has at least half of the ink of the subjects' held-out pictures, and
    the four columns in the middle, which no digit on its side reaches, have none to speak of."""
    usual = torch.stack([s.held_out.add(1).sum((1, 2, 3)).mean() for s in subjects]).min()
    ink = [half.add(1).clamp_min(0).sum((1, 2, 3)) for half in images.split(32, 3)]
    empty = images[..., 30:34].amax((1, 2, 3)) < -0.5
    return (torch.stack(ink).amin(0) >= usual / 2) & empty


@torch.no_grad()
def strayed(
    world: World, model: DigitsModel, draws: Draws, subjects: list[digits_data.Subject]
) -> float:
    """The unmix loss at four noise levels of collages of held-out pictures."""
    m = min(8, *(len(s.held_out) for s in subjects))
    x0 = torch.cat([s.held_out[:m] for s in subjects], 3).to(world.device)
    left, right = (mark.expand(m, -1) for mark in draws.marks(0, 1))
    cond = model.encode([draws.captions(0, 1)[0]] * m)
    found = []
    for t in (200, 400, 600, 800):
        alpha, sigma = world.schedule.alpha[t].item(), world.schedule.sigma[t].item()
        x = alpha * x0 + sigma * noise(world.seeds(9, m), (1, 32, 64), world.device)
        with capture_attention(model) as maps:
            model(x, torch.full((m,), t, device=world.device), cond)
        found.append(unmix_loss(maps, left, right, (32, 64)).item())
    return sum(found) / len(found)
