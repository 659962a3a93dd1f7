"""Whole trajectories of diffusers' schedulers beside tables read from their configurations."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.ops import _philox
from fastlora.samplers import noise, sample_steps, schedule_from_config, table_from_config

SEEDS = torch.tensor([5, 6])
SHAPE = (3, 8, 8)


def network(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
    """Something non-linear in x and t."""
    wave = (x.roll(1, -1) * 1.3 + t.view(-1, 1, 1, 1).to(x.dtype) * 0.01).sin()
    return 0.4 * x.tanh() + 0.7 * wave


def noise_at(step: int) -> Tensor:
    """What a table adds at a step to samples of `SEEDS`."""
    return _philox.normal(SEEDS, step, 3 * 8 * 8, torch.float32).view(2, *SHAPE)


def scheduler_of(name: str, config: dict[str, Any]) -> Any:
    """diffusers' scheduler, with the float64 schedule where it has one: the steps are compared
    here, and in float32 sqrt(1 - abar) and its like lose half of the digits near 0."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name).from_config(config)
    if hasattr(scheduler, "alphas_cumprod"):
        schedule = schedule_from_config({"_class_name": name, **config})
        abar = schedule.alphas_cumprod.clone()
        torch.testing.assert_close(abar, scheduler.alphas_cumprod.double(), rtol=1e-3, atol=1e-6)
        if scheduler.alphas_cumprod[-1] == 2**-24:
            abar[-1] = 2**-24
        scheduler.alphas_cumprod = abar
        for level in ("final_alpha_cumprod", "initial_alpha_cumprod"):
            if hasattr(scheduler, level):
                one = getattr(scheduler, level) == 1
                setattr(scheduler, level, torch.tensor(1.0) if one else abar[0])
        if hasattr(scheduler, "lambda_t"):
            scheduler.lambda_t = 0.5 * (abar.log() - (1 - abar).log())
    return scheduler


def theirs(scheduler: Any, x: Tensor, begin: int = 0, **options: Any) -> list[Tensor]:
    """x after every step; noise at step i is what a table would add there."""
    xs: list[Tensor] = []
    module = sys.modules[type(scheduler).__module__]
    draws = pytest.MonkeyPatch()
    if hasattr(module, "randn_tensor"):
        draws.setattr(module, "randn_tensor", lambda *args, **kwargs: noise_at(len(xs)))
    if begin:
        scheduler.set_begin_index(begin)
    with draws.context(), pytest.MonkeyPatch.context():
        for t in scheduler.timesteps[begin:]:
            model_input = x
            if hasattr(scheduler, "scale_model_input"):
                model_input = scheduler.scale_model_input(x, t)
            out = network(model_input, t.expand(x.shape[0]))
            x = scheduler.step(out, t, x, **options).prev_sample
            xs.append(x)
    draws.undo()
    return xs


def compare(
    name: str,
    config: dict[str, Any],
    steps: int | None = None,
    *,
    tolerance: float = 1e-5,
    eta: float = 0.0,
    rederive: bool = False,
    begin: int = 0,
    **arguments: Any,
) -> float:
    """Holds every step within `tolerance` of max|x|; returns the largest difference so measured."""
    scheduler = scheduler_of(name, config)
    lists = {k: v for k, v in arguments.items() if v is not None}
    scheduler.set_timesteps(**({} if steps is None else {"num_inference_steps": steps}), **lists)
    if hasattr(scheduler, "sigmas") and isinstance(scheduler.sigmas, Tensor):
        scheduler.sigmas = scheduler.sigmas.double()  # rounded to float32, but computed with in 64
    table = table_from_config(
        {"_class_name": name, **config},
        steps,
        eta=eta,
        rederive=rederive,
        begin=begin,
        **arguments,
    )
    told = scheduler.timesteps[begin:].double()
    torch.testing.assert_close(table.timesteps.double(), told, rtol=1e-6, atol=1e-4)
    x = noise(SEEDS, SHAPE)
    if not begin:
        start = float(getattr(scheduler, "init_noise_sigma", 1.0))
        assert table.init_noise_sigma == pytest.approx(start, rel=1e-6)
    options: dict[str, Any] = {}
    if eta:
        options["eta"] = eta
    if rederive:
        options["use_clipped_model_output"] = True
    expected = theirs(scheduler, x * table.init_noise_sigma, begin, **options)
    assert len(expected) == len(table)
    worst = 0.0
    for step in sample_steps(network, table, x, seeds=SEEDS):
        reference = expected[step.index]
        scale = max(reference.abs().max().item(), 1.0)
        assert reference.isfinite().all()
        difference = (step.x - reference).abs().max().item() / scale
        assert difference <= tolerance, f"step {step.index} of {len(table)}: {difference:.1e}"
        worst = max(worst, difference)
    return worst
