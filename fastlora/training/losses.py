"""Losses of diffusion training: callables `loss(model, batch, schedule, generator)`.

A loss returns a scalar to minimise and detached scalars to look at, by name.
`model(x, t, cond)` predicts what `prediction` says; `batch` is a mapping of tensors on the model's
device (each loss names its keys); `generator` is a CPU generator from which everything random
comes, so that a run is a function of its seed on every device. Convention: `a = sqrt(abar)`,
`s = sqrt(1 - abar)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from fastlora.adapters import scaled
from fastlora.ops import add_noise
from fastlora.samplers.schedule import Schedule

Batch = Mapping[str, Any]
Metrics = dict[str, torch.Tensor]
Loss = Callable[[Any, Batch, Schedule, torch.Generator], tuple[torch.Tensor, Metrics]]


@lru_cache(maxsize=16)
def noise_table(schedule: Schedule, prediction: str, device: torch.device) -> torch.Tensor:
    """`schedule.noise_table(prediction)` on the device, made once for each schedule object."""
    return schedule.noise_table(prediction).to(device)


def draw_timesteps(
    schedule: Schedule,
    count: int,
    generator: torch.Generator,
    low: int = 0,
    high: int | None = None,
) -> torch.Tensor:
    """t int64 [count] in [low, high): one from each of `count` equal parts, in random order.

    Every sample's t is uniform, as in a plain draw; the mean over a batch varies less.
    """
    high = len(schedule) if high is None else high
    if not 0 <= low < high <= len(schedule):
        raise ValueError(
            f"timesteps: expected 0 <= low < high <= {len(schedule)}, got [{low}, {high})"
        )
    part = torch.randperm(count, generator=generator)
    u = (part + torch.rand(count, generator=generator, dtype=torch.float64)) / max(count, 1)
    return (low + u * (high - low)).long().clamp(max=high - 1)


def draw_seeds(count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise seeds int64 [count], of 2^62: a few distinct seeds are a known fault elsewhere."""
    return torch.randint(2**62, (count,), generator=generator)


def noised(
    x0: torch.Tensor, t: torch.Tensor, seeds: torch.Tensor, schedule: Schedule, prediction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(x_t, target)` of pictures x0 [B, ...] at t [B], each with its own noise, on its device."""
    device = x0.device
    table = noise_table(schedule, prediction, device)
    return add_noise(x0, None, seeds.to(device), t.to(device), table)


def per_sample_mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error [B] in float32 (float64 stays)."""
    error = (
        prediction - target
        if prediction.dtype == torch.float64
        else (prediction.float() - target.float())
    )
    return error.square().flatten(1).mean(1)


def denoising(prediction: str = "epsilon", low: int = 0, high: int | None = None) -> Loss:
    """`mean ||model(x_t, t, cond) - target||^2`, unweighted (L_simple): target eps, v = a eps - s
    x0, or x0.

    Batch: x0 [B, ...], cond. t is uniform in [low, high).
    """

    def loss(
        model: Any, batch: Batch, schedule: Schedule, generator: torch.Generator
    ) -> tuple[torch.Tensor, Metrics]:
        x0 = batch["x0"]
        t = draw_timesteps(schedule, len(x0), generator, low, high)
        x_t, target = noised(x0, t, draw_seeds(len(x0), generator), schedule, prediction)
        value = per_sample_mse(model(x_t, t.to(x0.device), batch["cond"]), target).mean()
        return value, {"loss": value.detach()}

    return loss


epsilon_loss = denoising("epsilon")
v_loss = denoising("v")


def prior_preservation(prediction: str = "epsilon", weight: float = 1.0) -> Loss:
    """`L(subject) + weight L(class)` (DreamBooth; SVDiff), both in one batch and one forward pass.

    Batch: x0 [B, ...], cond of the subject; prior_x0 [P, ...], prior_cond of the class. weight 0
    leaves the prior out.
    """
    if weight < 0:
        raise ValueError(f"prior_preservation: weight: expected >= 0, got {weight}")

    def loss(
        model: Any, batch: Batch, schedule: Schedule, generator: torch.Generator
    ) -> tuple[torch.Tensor, Metrics]:
        if weight == 0:
            return denoising(prediction)(model, batch, schedule, generator)
        subject, prior = batch["x0"], batch["prior_x0"]
        x0 = torch.cat([subject, prior])
        # The two halves draw t apart: each is stratified over all noise levels.
        t = torch.cat([draw_timesteps(schedule, len(part), generator) for part in (subject, prior)])
        x_t, target = noised(x0, t, draw_seeds(len(x0), generator), schedule, prediction)
        cond = torch.cat([batch["cond"], batch["prior_cond"]])
        error = per_sample_mse(model(x_t, t.to(x0.device), cond), target)
        instance, kept = error[: len(subject)].mean(), error[len(subject) :].mean()
        value = instance + weight * kept
        return value, {"loss": value.detach(), "subject": instance.detach(), "prior": kept.detach()}

    return loss


def visual_slider(name: str, prediction: str = "epsilon", strength: float = 1.0) -> Loss:
    """`MSE(f_{+s}(B_t), target_B) + MSE(f_{-s}(A_t), target_A)`: Concept Sliders (2311.12092) from
    pairs A low, B high.

    Batch: low [B, ...], high [B, ...], cond for one of the two. A pair shares its noise and its t.
    One forward pass over cat(B_t, A_t): the adapter `name` has a strength per sample, +s for the
    first half and -s for the second. The published loss is for epsilon; for a v model it is the
    same in v.
    """

    def loss(
        model: Any, batch: Batch, schedule: Schedule, generator: torch.Generator
    ) -> tuple[torch.Tensor, Metrics]:
        high, low = batch["high"], batch["low"]
        if high.shape != low.shape:
            raise ValueError(
                f"visual_slider: low: expected the shape of high {list(high.shape)},"
                f" got {list(low.shape)}"
            )
        count, device = len(high), high.device
        t = draw_timesteps(schedule, count, generator).repeat(2)
        seeds = draw_seeds(count, generator).repeat(2)
        x_t, target = noised(torch.cat([high, low]), t, seeds, schedule, prediction)
        rows = torch.tensor([strength, -strength], device=device).repeat_interleave(count)
        with scaled(model, {name: rows}):
            error = per_sample_mse(model(x_t, t.to(device), torch.cat([batch["cond"]] * 2)), target)
        up, down = error[:count].mean(), error[count:].mean()
        value = up + down
        return value, {"loss": value.detach(), "high": up.detach(), "low": down.detach()}

    return loss
