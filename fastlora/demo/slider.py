"""The thickness slider: trained from pairs of pictures, sampled at many strengths, judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fastlora
from fastlora.demo.world import WORDS, World
from fastlora.methods.visual_slider import noxattn, train_visual_slider
from fastlora.models import digits_data
from fastlora.models.digits import DigitsModel

NAME = "thickness"
THIN, THICK = 1.8, 4.8  # pixels, of the pairs


@dataclass(frozen=True)
class Slider:
    """What came out. R rows (a digit from some noise), S strengths."""

    model: DigitsModel
    pairs: digits_data.Pairs
    modules: int
    parameters: int
    loss: list[float]
    train_seconds: float
    sample_seconds: float
    strengths: tuple[float, ...]  # S
    rows: list[int]  # R digits; a digit's rows differ in their noise
    images: torch.Tensor  # [R, S, 1, 32, 32]
    thickness: torch.Tensor  # [R, S] in pixels, by the judge
    kept: torch.Tensor  # [R, S] bool: the judge reads the digit that was asked for
    slant: torch.Tensor  # [R, S] degrees; like the next, what a slider should leave alone
    brightness: torch.Tensor  # [R, S] 0 to 1

    @property
    def mean(self) -> list[float]:
        """Thickness by strength, over all rows."""
        return self.thickness.mean(0).tolist()

    @property
    def accuracy(self) -> list[float]:
        """Share of rows whose digit is kept, by strength."""
        return self.kept.float().mean(0).tolist()

    @property
    def mean_rises(self) -> bool:
        return bool((self.thickness.mean(0).diff() > 0).all())

    @property
    def rows_rising(self) -> int:
        """Rows that are thicker at every strength than at the one before."""
        return int((self.thickness.diff(dim=1) > 0).all(1).sum())

    @property
    def steps_rising(self) -> float:
        """Share of single steps, of one row from one strength to the next, that are thicker."""
        return (self.thickness.diff(dim=1) > 0).float().mean().item()

    @property
    def worst_fall(self) -> float:
        """The largest loss of thickness from one strength to the next in any row, in pixels."""
        return max(0.0, -self.thickness.diff(dim=1).min().item())


def where(path: str, module: nn.Module) -> bool:
    """The layers of the UNet that sliders adapt."""
    return path.startswith("unet.") and noxattn(path, module)


def make_slider(world: World) -> Slider:
    """Trains and samples; the model keeps the adapter `thickness` at scale 1."""
    settings = world.settings
    model = world.load_model()
    pairs = digits_data.pairs(settings.pairs, thin=THIN, thick=THICK, seed=world.seed)
    before = world.clock()
    result = train_visual_slider(
        model,
        pairs.low.to(world.device),
        pairs.high.to(world.device),
        model.encode(pairs.captions).detach(),
        world.schedule,
        name=NAME,
        adapter=fastlora.LoRA(rank=settings.slider_rank, alpha=settings.slider_alpha),
        where=where,
        prediction="v",
        steps=settings.slider_steps,
        batch=settings.slider_batch,
        lr=settings.slider_lr,
        seed=world.seed,
        progress=world.progress,
        description="  training",
    )
    trained = world.clock()
    info = fastlora.adapters(model)[NAME]

    strengths = settings.strengths
    rows = [d for _ in range(settings.noises) for d in range(10)]
    images = sample_strengths(world, model, [f"a bright {WORDS[d]}" for d in rows], strengths)
    sampled = world.clock()
    score = world.score(images.flatten(0, 1))
    kept = score["digit"].view(len(rows), -1) == torch.tensor(rows)[:, None]
    return Slider(
        model=model,
        pairs=pairs,
        modules=len(info.modules),
        parameters=info.parameters,
        loss=result.metrics["loss"],
        train_seconds=trained - before,
        sample_seconds=sampled - trained,
        strengths=strengths,
        rows=rows,
        images=images,
        thickness=score["thickness"].view(len(rows), -1),
        kept=kept,
        slant=score["slant"].view(len(rows), -1),
        brightness=score["brightness"].view(len(rows), -1),
    )


def sample_strengths(
    world: World,
    model: DigitsModel,
    captions: list[str],  # R
    strengths: tuple[float, ...],  # S
    stream: int = 1,
) -> torch.Tensor:
    """Pictures [R, S, 1, 32, 32]: every row at every strength, in one batch of R S samples with a
    gate for each. A row's pictures start from the same noise.
    """
    rows, count = len(captions), len(strengths)
    seeds = [seed for seed in world.seeds(stream, rows) for _ in strengths]
    repeated = [caption for caption in captions for _ in strengths]
    gates = torch.tensor(strengths, dtype=torch.float32, device=world.device).repeat(rows)
    with fastlora.scaled(model, {NAME: gates}):
        return world.sample(model, repeated, seeds).unflatten(0, (rows, count))


def save_slider(slider: Slider, out: Path) -> Path:
    path = out / f"{NAME}.safetensors"
    fastlora.save(slider.model, path, name=NAME)
    return path
