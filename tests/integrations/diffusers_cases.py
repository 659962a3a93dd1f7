"""Trajectories of diffusers' schedulers, of the drop-ins, and of diffusers' formulas in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers: Any = pytest.importorskip("diffusers")

NAMES = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
]
SHAPE = (2, 3, 8, 8)


@dataclass
class Case:
    """A class of diffusers, its options, and arguments of set_timesteps and step."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    steps: int | None = 20
    step: dict[str, Any] = field(default_factory=dict)
    timesteps: dict[str, Any] = field(default_factory=dict)
    begin: int = 0

    def __str__(self) -> str:
        said = {**self.options, **self.step, **self.timesteps}
        if self.begin:
            said["begin"] = self.begin
        words = "-".join(f"{k}={v}" for k, v in said.items()) or "default"
        return f"{self.name.removesuffix('Scheduler')}-{self.steps}-{words}".replace(" ", "")

    def theirs(self) -> Any:
        return getattr(diffusers, self.name)(**self.options)

    def ours(self) -> Any:
        from fastlora.integrations import diffusers as fast

        return getattr(fast, f"Fast{self.name}")(**self.options)

    @property
    def learned(self) -> bool:
        return str(self.options.get("variance_type")).startswith("learned")


@dataclass
class Trajectory:
    """After every step: x, and the other field where there is one. `outputs`: the model's."""

    x: list[Tensor] = field(default_factory=list)
    x0: list[Tensor | None] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    drawn: Tensor | None = None  # the generator afterwards


def network(x: Tensor, t: Any) -> Tensor:
    """Something non-linear in x and t, computed in float64: it is the schedulers that differ."""
    wide = x.double()
    wave = (wide.roll(1, -1) * 1.3 + float(t) * 0.01).sin()
    return (0.4 * wide.tanh() + 0.7 * wave).to(x.dtype)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def run(
    case: Case,
    scheduler: Any,
    dtype: torch.dtype = torch.float32,
    outputs: list[Tensor] | None = None,
    prepare: Callable[[Any], None] = lambda scheduler: None,
) -> Trajectory:
    """A whole trajectory; with `outputs` the model's are given."""
    lists = {} if case.steps is None else {"num_inference_steps": case.steps}
    scheduler.set_timesteps(**lists, **case.timesteps)
    prepare(scheduler)
    if case.begin:
        scheduler.set_begin_index(case.begin)
    x = (start() * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)
    generator = torch.Generator().manual_seed(1)
    found = Trajectory()
    for i, t in enumerate(scheduler.timesteps[case.begin :]):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(scaled, t) if outputs is None else outputs[i].to(dtype)
        if case.learned and outputs is None:
            variance = network(0.7 * scaled, t).clamp(-1, 1)
            variance = variance.abs() if case.options["variance_type"] == "learned" else variance
            output = torch.cat((output, variance), dim=1)
        if hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
            found.alphas.append(scheduler.alphas_cumprod[int(t)].sqrt().item())
        step = scheduler.step(output, t, x, generator=generator, **case.step)
        x = step.prev_sample
        found.x.append(x)
        found.x0.append(next((v for k, v in step.items() if k != "prev_sample"), None))
        found.outputs.append(output)
    found.drawn = generator.get_state()
    return found


class _Wide:
    """torch, for which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_float64(scheduler: Any, drawn: torch.dtype) -> Iterator[None]:
    """diffusers' own formulas in float64, with the numbers that are drawn in another dtype."""
    module: Any = sys.modules[type(scheduler).__module__]
    assert module.__name__.startswith("diffusers.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", _Wide())
        if hasattr(module, "randn_tensor"):
            draw = module.randn_tensor

            def narrow(shape: Any, generator: Any = None, device: Any = None, **_: Any) -> Tensor:
                return draw(shape, generator=generator, device=device, dtype=drawn).double()

            patch.setattr(module, "randn_tensor", narrow)
        yield


def run_in_float64(
    case: Case,
    dtype: torch.dtype = torch.float32,
    outputs: list[Tensor] | None = None,
) -> Trajectory:
    """What diffusers means: its formulas and float32 levels, evaluated in float64. Noise is drawn
    in the dtype in which diffusers draws it for samples of `dtype`."""
    scheduler = case.theirs()

    def widen(scheduler: Any) -> None:
        for level in ("alphas_cumprod", "final_alpha_cumprod", "sigmas", "one"):
            if hasattr(scheduler, level):
                setattr(scheduler, level, getattr(scheduler, level).double())

    in_float32 = case.name.startswith(("DPMSolver", "FlowMatch"))
    with in_float64(scheduler, torch.float32 if in_float32 else dtype):
        return run(case, scheduler, torch.float64, outputs, widen)


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference, of max|b| at that step."""
    assert len(a) == len(b) > 0
    worst = 0.0
    for u, v in zip(a, b, strict=True):
        assert u.shape == v.shape and u.isfinite().all()
        scale = v.abs().max().item()
        worst = max(worst, (u.double() - v.double()).abs().max().item() / scale)
    return worst


def pair(name: str, steps: int = 4, **options: Any) -> tuple[Any, Any]:
    """diffusers' scheduler and the drop-in, their timesteps set."""
    case = Case(name, options)
    both = case.theirs(), case.ours()
    for scheduler in both:
        scheduler.set_timesteps(steps)
    return both


def first_step(scheduler: Any, x: Tensor | None = None, **arguments: Any) -> Any:
    x = start() if x is None else x
    t = scheduler.timesteps[0]
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, t)
    return scheduler.step(network(x, t), t, x, **arguments)
