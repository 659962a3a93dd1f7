"""After training: both adapters from their files in one model, and fused against reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fastlora
from fastlora.demo import slider, subject
from fastlora.demo.world import World
from fastlora.models.digits import DigitsModel
from fastlora.verify import VerifyReport


@dataclass(frozen=True)
class Together:
    """The mirrored subject at every strength of the slider. R noises, S strengths."""

    images: torch.Tensor  # [R, S, 1, 32, 32]
    thickness: list[float]  # S, means
    shown: list[float]  # S, shares that show the subject


@dataclass(frozen=True)
class Check:
    """One configuration of a model, verified."""

    title: str
    report: VerifyReport

    @property
    def layers(self) -> int:
        return len(self.report.rows) - 1

    @property
    def shares(self) -> list[float]:
        """Error over allowed error of every row; infinite where nothing can be compared."""
        return [
            r.error / r.allowed if r.allowed else 0.0 if r.passed else math.inf
            for r in self.report.rows
        ]


class FromCaptions(nn.Module):
    """The model from token ids on, so that adapted layers of its text encoder are called too."""

    def __init__(self, model: DigitsModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.model(x, t, self.model.text_encoder(input_ids=ids).last_hidden_state)


def make_together(
    world: World, saved: tuple[Path, Path], found: subject.Personalised
) -> tuple[DigitsModel, Together]:
    """Loads the slider and the subject into a fresh model and samples with both."""
    model = world.load_model()
    for path, name in zip(saved, (slider.NAME, subject.NAME), strict=True):
        fastlora.load(model, path, name=name)
    strengths, rows = world.settings.strengths, world.settings.together
    captions = [found.subject.caption] * rows
    images = slider.sample_strengths(world, model, captions, strengths, stream=4)
    flat = images.flatten(0, 1)
    thickness = world.score(flat)["thickness"].view(rows, -1).mean(0).tolist()
    shown = subject.shows(world, flat, found.subject).view(rows, -1).float().mean(0).tolist()
    return model, Together(images, thickness, shown)


def make_checks(world: World, model: DigitsModel) -> list[Check]:
    """`model` with both adapters: together with a strength for every sample, each alone, folded."""
    strengths = torch.tensor(world.settings.strengths, dtype=torch.float32).to(world.device)
    count = len(strengths)
    generator = torch.Generator().manual_seed(world.seed)
    x = torch.randn(count, *model.shape, generator=generator).to(world.device)
    t = torch.randint(len(world.schedule), (count,), generator=generator).to(world.device)
    ids = model.tokenizer(["a v1 three"] * count).to(world.device)
    whole = FromCaptions(model)
    thick, mirrored = slider.NAME, subject.NAME
    checks = []
    configurations = {
        "slider and subject, a strength for every sample": {thick: strengths, mirrored: 1.0},
        "slider alone, a strength for every sample": {thick: strengths, mirrored: 0.0},
        "subject alone": {thick: 0.0, mirrored: 1.0},
    }
    with world.bar(4, "verifying", "model") as bar:
        for title, scales in configurations.items():
            with fastlora.scaled(whole, scales):
                checks.append(Check(title, fastlora.verify(whole, x, t, ids)))
            bar.update()
        fastlora.set_scale(whole, {thick: 1.5, mirrored: 1.0})
        fastlora.fold(whole)
        checks.append(Check("slider at 1.5 and subject, folded", fastlora.verify(whole, x, t, ids)))
        fastlora.unfold(whole)
        fastlora.set_scale(whole, 1.0)
        bar.update()
    return checks
