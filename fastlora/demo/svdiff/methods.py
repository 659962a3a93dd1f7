"""One subject by three methods, with and without a prior, over several seeds."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fastlora
from fastlora.demo.subject import Scores, Task, distances, judged, prepare
from fastlora.demo.svdiff.settings import ShiftSettings
from fastlora.demo.world import World
from fastlora.methods import personalise
from fastlora.methods.svdiff import draw
from fastlora.models._files import save_weights
from fastlora.models.digits import DigitsModel
from fastlora.training import prior_preservation, train
from fastlora.training.losses import Batch

NAME = "mirrored"


@dataclass(frozen=True)
class Run:
    """One training: a method, a weight of the prior, a seed."""

    method: str
    prior_weight: float
    seed: int
    parameters: int
    size: int  # bytes of its file
    seconds: float
    kept: float  # share of samples of the plain class that the judge reads as it
    scores: Scores


@dataclass(frozen=True)
class Compared:
    task: Task  # of the first seed
    floor: float  # distance of the five pictures themselves to the held-out ones, over the seeds
    before: list[Run]  # one a seed, untrained
    runs: list[Run]

    def of(self, method: str, prior_weight: float) -> list[Run]:
        return [r for r in self.runs if (r.method, r.prior_weight) == (method, prior_weight)]


def compare(world: World, settings: ShiftSettings) -> Compared:
    first, floors = None, []
    before: list[Run] = []
    runs: list[Run] = []
    total = settings.seeds * len(settings.rates) * len(settings.weights)
    with world.bar(total, "trainings", "run") as bar:
        for seed in range(settings.seeds):
            here = replace(world, seed=world.seed + seed, progress=False)
            plain = here.load_model()
            task = prepare(here, plain)
            first = first or task
            floors.append(distances(task.subject.images, task.subject.held_out).mean().item())
            before.append(_run(here, plain, task, "before", 0.0, 0, 0, 0.0))
            for weight in settings.weights:
                for method, rate in settings.rates:
                    runs.append(_train(here, settings, task, method, rate, weight))
                    bar.update()
    assert first is not None
    return Compared(first, sum(floors) / len(floors), before, runs)


def _train(
    world: World, settings: ShiftSettings, task: Task, method: str, rate: float, weight: float
) -> Run:
    model, subject = world.load_model(), task.subject
    images, prior = subject.images.to(world.device), task.prior.to(world.device)

    def cond(drawn: torch.Tensor) -> torch.Tensor:
        return model.encode([subject.caption] * len(drawn))

    def prior_cond(drawn: torch.Tensor) -> torch.Tensor:
        return model.encode([task.captions[i] for i in drawn.tolist()])

    common: dict[str, Any] = {"steps": settings.steps, "seed": world.seed, "progress": False}
    start = world.clock()
    if method == "all":

        def batches(generator: torch.Generator) -> Batch:
            x0, its = draw(images, cond, settings.batch, generator)
            found = {"x0": x0, "cond": its}
            if weight:
                x0, its = draw(prior, prior_cond, settings.batch, generator)
                found |= {"prior_x0": x0, "prior_cond": its}
            return found

        model.requires_grad_(True)
        train(model, prior_preservation("v", weight), batches, world.schedule, lr=rate, **common)
        parameters = sum(p.numel() for p in model.parameters())
    else:
        shifts = method == "SVDiff"
        if weight:
            common |= {"prior_images": prior, "prior_cond": prior_cond, "prior_weight": weight}
        personalise(
            model,
            images,
            cond,
            world.schedule,
            name=NAME,
            adapter=fastlora.Spectral() if shifts else fastlora.LoRA(rank=settings.rank),
            prediction="v",
            batch=settings.batch,
            lr=rate,
            norm_lr=settings.norm_rate,
            materialize="step",
            **common,
        )
        parameters = fastlora.adapters(model)[NAME].parameters
    seconds = world.clock() - start
    return _run(world, model, task, method, weight, parameters, _size(model), seconds)


def _run(
    world: World,
    model: DigitsModel,
    task: Task,
    method: str,
    weight: float,
    parameters: int,
    size: int,
    seconds: float,
) -> Run:
    scores = judged(world, model, task.subject)
    read = world.score(scores.class_images)["digit"] == task.subject.digit
    kept = read.float().mean().item()
    return Run(method, weight, world.seed, parameters, size, seconds, kept, scores)


def _size(model: DigitsModel) -> int:
    """Bytes of what has to be kept: an adapter's file, or all weights in float32."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.safetensors"
        if fastlora.adapters(model):
            fastlora.save(model, path, name=NAME)
        else:
            save_weights(model, path, torch.float32)
        return path.stat().st_size
