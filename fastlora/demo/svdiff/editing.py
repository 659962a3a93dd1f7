"""One picture edited by its caption: thin made thick, the hand that wrote it kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

import fastlora
from fastlora.demo.subject import distances
from fastlora.demo.svdiff.settings import ShiftSettings
from fastlora.demo.world import World
from fastlora.methods import edit, personalise
from fastlora.models import digits_data
from fastlora.models.digits import DigitsModel
from fastlora.models.digits_data import caption

NAME = "edit"
THIN, THICK = 2.0, 4.6  # pixels, in the middle of what the words mean
DIGITS = (5, 2, 3, 4, 6, 9, 7)


@dataclass(frozen=True)
class Way:
    """Edited pictures [N, 1, 32, 32] and, over them, what the judge says."""

    images: torch.Tensor
    thickness: float  # pixels
    kept: float  # share in which it reads the digit
    distance: float  # to the same line drawn thick, which no model has seen


@dataclass(frozen=True)
class Edited:
    originals: torch.Tensor  # [N, 1, 32, 32] drawn thin
    wanted: torch.Tensor  # [N, 1, 32, 32] the same lines, drawn thick
    captions: list[tuple[str, str]]  # before, after
    thickness: tuple[float, float]  # by the judge, of both
    start: float  # distance between the two
    ways: dict[str, Way]


def make_edits(world: World, settings: ShiftSettings) -> Edited:
    """Lines that pretraining has not seen, each with a model of its own."""
    source = digits_data.split(400)[1]  # enough, and quicker to trace than all
    digits = torch.tensor(DIGITS[: settings.edits])
    which = torch.tensor([int((source.digit == d).nonzero()[world.seed % 3, 0]) for d in digits])
    lines, n = source[which], len(which)
    upright, full = torch.zeros(n), torch.ones(n)
    thin, thick = (
        digits_data.draw(lines, torch.full((n,), width), upright, full) for width in (THIN, THICK)
    )
    words = [digits_data.DIGITS[d] for d in digits.tolist()]
    captions = [
        (caption(w, "thin", "upright", "bright"), caption(w, "thick", "upright", "bright"))
        for w in words
    ]
    found: dict[str, list[torch.Tensor]] = {}
    with world.bar(n, "pictures", "picture") as bar:
        for i in range(n):
            edits = _edits(world, settings, thin[i : i + 1], captions[i], i)
            for name, picture in edits.items():
                found.setdefault(name, []).append(picture)
            bar.update()
    ways = {}
    for name, parts in found.items():
        images = torch.cat(parts)
        score = world.score(images)
        near = [distances(a[None], b[None]) for a, b in zip(images, thick, strict=True)]
        ways[name] = Way(
            images,
            score["thickness"].mean().item(),
            (score["digit"] == digits).float().mean().item(),
            torch.cat(near).mean().item(),
        )
    widths = tuple(world.score(x)["thickness"].mean().item() for x in (thin, thick))
    start = torch.cat([distances(a[None], b[None]) for a, b in zip(thin, thick, strict=True)])
    return Edited(thin, thick, captions, (widths[0], widths[1]), start.mean().item(), ways)


def _edits(
    world: World,
    settings: ShiftSettings,
    picture: torch.Tensor,
    captions: tuple[str, str],
    i: int,
) -> dict[str, torch.Tensor]:
    model, picture = world.load_model(), picture.to(world.device)
    before, after = captions
    options: dict[str, Any] = {
        "prediction": "v",
        "steps": settings.edit_sampling,
        "spacing": "trailing",
        "seeds": world.seeds(6, i + 1)[-1:],
    }
    with torch.no_grad():
        target, empty = model.encode([after]), model.encode([""])
    found = {
        "caption alone": _sampled(world, model, after, i),
        "inversion alone": edit(model, picture, target, empty, world.schedule, **options),
    }
    with torch.no_grad():
        own = model.encode([before])
    personalise(
        model,
        picture,
        own,
        world.schedule,
        name=NAME,
        adapter=fastlora.Spectral(),
        where=lambda path, module: path.startswith("unet."),
        prediction="v",
        steps=settings.edit_steps,
        batch=settings.edit_batch,
        lr=settings.edit_rate,
        norm_lr=settings.norm_rate,
        materialize="step",
        seed=world.seed,
        progress=False,
    )
    ways: dict[str, dict[str, Any]] = {
        "SVDiff, eta 0.5": {"eta": 0.5},
        "SVDiff, slerp 0.2": {"eta": 0.0, "perturb": 0.2},
    }
    for name, loose in ways.items():
        found[name] = edit(model, picture, target, empty, world.schedule, **options, **loose)
    return {name: images.cpu() for name, images in found.items()}


def _sampled(world: World, model: DigitsModel, caption: str, i: int) -> torch.Tensor:
    return replace(world, progress=False).sample(model, [caption], world.seeds(7, i + 1)[-1:])
