"""Whole trajectories of diffusers' schedulers beside tables read from their configurations.

The schedulers run in float64: in their module float32 means float64. So what is compared with them
is compared with exact arithmetic, and the difference to the same in float32 is that of diffusers.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlora.ops import _philox
from fastlora.samplers import Table, noise, sample_steps, table_from_config

SEEDS = torch.tensor([5, 6])
SHAPE = (3, 8, 8)


def network(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
    """Something non-linear in x and t."""
    wave = (x.roll(1, -1) * 1.3 + t.view(-1, 1, 1, 1).to(x.dtype) * 0.01).sin()
    return 0.4 * x.tanh() + 0.7 * wave


def noise_at(step: int) -> Tensor:
    """What a table adds at a step to samples of `SEEDS`."""
    return _philox.normal(SEEDS, step, 3 * 8 * 8, torch.float64).view(2, *SHAPE)


class Wide:
    """A module in which float32 is float64."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, "float64" if name == "float32" else name)


@contextmanager
def wide(scheduler: type, draw: Any = None) -> Iterator[None]:
    """The scheduler's code in float64; `draw()` is its noise; its warnings are its own."""
    module = importlib.import_module(scheduler.__module__)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(module, "torch", Wide(torch))
        patch.setattr(module, "np", Wide(np))
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *args, **kwargs: draw())
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def theirs(
    name: str,
    config: dict[str, Any],
    x: Tensor,
    steps: int | None,
    begin: int = 0,
    options: dict[str, Any] | None = None,
    **lists: Any,
) -> tuple[Any, list[Tensor]]:
    """The scheduler, and x after every step from unit noise x, scaled as it says (begin: as it is).

    Noise at step i is what a table would add there.
    """
    diffusers = pytest.importorskip("diffusers")
    xs: list[Tensor] = []
    kind = getattr(diffusers, name)
    count = {} if steps is None else {"num_inference_steps": steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        narrow = kind.from_config(config)
        narrow.set_timesteps(**count, **lists)
        told = narrow.timesteps
    with wide(kind, lambda: noise_at(len(xs))):
        scheduler = kind.from_config(config)
        scheduler.set_timesteps(**count, **lists)
        if not scheduler.timesteps.is_floating_point():
            scheduler.timesteps = told  # ints that were cut off, as they are used
        x = x.double() * (1.0 if begin else float(getattr(scheduler, "init_noise_sigma", 1.0)))
        if hasattr(scheduler, "set_begin_index"):  # else it looks for the first timestep, which
            scheduler.set_begin_index(begin)  # may be listed twice
        for t in scheduler.timesteps[begin:]:
            seen = (
                scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            )
            x = scheduler.step(network(seen, t.expand(len(x))), t, x, **(options or {})).prev_sample
            assert x.dtype == torch.float64 and x.isfinite().all()
            xs.append(x)
    return scheduler, xs


def compare(
    name: str,
    config: dict[str, Any],
    steps: int | None = None,
    *,
    eta: float = 0.0,
    rederive: bool = False,
    begin: int = 0,
    **arguments: Any,
) -> Table:
    """Holds every step to diffusers' in float64: within 1e-7 of max|x| in float64 (timesteps are
    told as float32, which shows there), within 1e-5 in float32."""
    if config.get("use_beta_sigmas"):
        pytest.importorskip("scipy")
    options: dict[str, Any] = {"eta": eta} if eta else {}
    if rederive:
        options["use_clipped_model_output"] = True
    x = noise(SEEDS, SHAPE)
    scheduler, expected = theirs(name, config, x, steps, begin, options, **arguments)
    table = table_from_config(
        {"_class_name": name, **config},
        steps,
        eta=eta,
        rederive=rederive,
        begin=begin,
        **arguments,
    )
    told = scheduler.timesteps[begin:].double()
    torch.testing.assert_close(table.timesteps.double(), told, rtol=1e-7, atol=1e-7)
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-5)):
        scales = [max(table.init_noise_sigma, 1.0)]
        for step in sample_steps(network, table, x.to(dtype), seeds=SEEDS):
            reference = expected[step.index]
            # a step rounds x before it and after it; Heun's has two rows
            scales.append(max(reference.abs().max().item(), 1.0))
            scale = max(scales[-3 if "Heun" in name else -2 :])
            difference = (step.x - reference).abs().max().item() / scale
            where = f"step {step.index} of {len(table)} in {dtype}"
            assert difference <= tolerance, f"{where}: {difference:.1e} of max|x|"
    return table
