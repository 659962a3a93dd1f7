"""Timings beside plain PyTorch, PEFT and diffusers: in turns, medians, ratios within the run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlora
from fastlora.demo.slider import where
from fastlora.demo.world import World

Calls = dict[str, Callable[[], Any] | None]  # None: the package is not installed


@dataclass(frozen=True)
class Row:
    """One contestant: the median time of a call and its ratio to the first one's, None where it is
    not installed."""

    name: str
    seconds: float | None
    ratio: float | None

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastlora")


@dataclass(frozen=True)
class Comparison:
    """Contestants at one task; the first is what ratios are to."""

    title: str
    what: str
    rows: list[Row]


def compare(
    title: str, what: str, calls: Calls, seconds: float, device: torch.device
) -> Comparison:
    """Times the calls in turns, so that whatever else the machine does hits all of them alike.

    A sample is as many calls as take about 2 ms together. A ratio is the median of the ratios to
    the first contestant within the same turn.
    """
    present = {name: call for name, call in calls.items() if call is not None}
    many = {name: repetitions(call, device) for name, call in present.items()}
    samples: dict[str, list[float]] = {name: [] for name in present}
    names, turn, end = list(present), 0, time.perf_counter() + seconds
    while turn < 5 or (time.perf_counter() < end and turn < 400):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]  # nobody is always after the same one
            samples[name].append(timed(present[name], many[name], device))
        turn += 1
    rows = []
    for name in calls:
        if name in present:
            ratios = (a / b for a, b in zip(samples[name], samples[names[0]], strict=True))
            rows.append(Row(name, median(samples[name]), median(ratios)))
        else:
            rows.append(Row(name, None, None))
    return Comparison(title, what, rows)


def timed(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Seconds of one call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return (time.perf_counter() - start) / count


def repetitions(call: Callable[[], Any], device: torch.device) -> int:
    timed(call, 3, device)
    return max(1, min(500, int(2e-3 / timed(call, 3, device))))


@torch.no_grad()
def make_comparisons(world: World) -> list[Comparison]:
    """All of them, with a bar."""
    shared = models(world)
    makers = [
        lambda: linear(world, 1, 8, 8),
        lambda: linear(world, 256, 320, 320),
        lambda: linear(world, 1024, 640, 640),
        lambda: forward(world, *shared),
        lambda: training_step(world, *shared),
        lambda: sampler(world, 1, 64),
        lambda: sampler(world, 4, 128),
        lambda: folding(world),
    ]
    found = []
    with world.bar(len(makers), "timing", "comparison") as bar:
        for make in makers:
            found.append(make())
            bar.update()
    return found


# --- the tasks ------------------------------------------------------------------------------------

RANK = 16
PLAIN, OURS, PEFT, DIFFUSERS = "plain PyTorch", "fastlora", "PEFT", "diffusers"


def linear(world: World, tokens: int, inside: int, outside: int) -> Comparison:
    """A linear layer with a LoRA that is not merged."""
    torch.manual_seed(0)
    layer = nn.Linear(inside, outside, device=world.device).requires_grad_(False)
    x = torch.randn(1, tokens, inside, device=world.device)
    rank = min(RANK, inside)
    adapted = nn.Sequential(nn.Linear(inside, outside, device=world.device))
    fastlora.inject(adapted, fastlora.LoRA(rank=rank), name="a", seed=0)
    fill(fastlora.parameters(adapted, "a"))
    ours = adapted[0]
    down, up = fastlora.parameters(adapted, "a")
    gate = torch.ones(rank, device=world.device)

    def plain() -> Tensor:
        return F.linear(x, layer.weight, layer.bias) + F.linear(F.linear(x, down) * gate, up)

    other = with_peft(nn.Sequential(layer_copy(layer)), ["0"], rank)
    peft = None if other is None else other[0]
    calls: Calls = {
        "no adapter": lambda: layer(x),
        OURS: lambda: ours(x),
        PLAIN: plain,
        PEFT: None if peft is None else lambda: peft(x),
    }
    shape = f"{tokens} token{'s' * (tokens > 1)}, {inside} → {outside}, rank {rank}"
    return compare("Adapted linear layer", shape, calls, world.settings.seconds, world.device)


def forward(
    world: World, inputs: tuple[Tensor, ...], base: Any, ours: Any, folded: Any, peft: Any
) -> Comparison:
    """The demo's model with its slider, and without."""
    calls: Calls = {
        "no adapter": lambda: base(*inputs),
        "fastlora, unmerged": lambda: ours(*inputs),
        "fastlora, folded": lambda: folded(*inputs),
        "PEFT, unmerged": None if peft is None else lambda: peft(*inputs),
    }
    what = f"the digits UNet, {len(fastlora.adapters(ours)['a'].modules)} adapted layers, batch 8"
    return compare("Model, forward", what, calls, world.settings.seconds, world.device)


def training_step(
    world: World, inputs: tuple[Tensor, ...], base: Any, ours: Any, folded: Any, peft: Any
) -> Comparison:
    """Forward and backward through the adapters."""

    def step(model: nn.Module) -> Callable[[], None]:
        parameters = [p for p in model.parameters() if p.requires_grad]

        def run() -> None:
            with torch.enable_grad():
                torch.autograd.grad(model(*inputs).square().mean(), parameters)

        return run

    calls: Calls = {OURS: step(ours), PEFT: None if peft is None else step(peft)}
    what = "forward and backward of the same model, batch 8"
    return compare("Training step", what, calls, world.settings.seconds, world.device)


def sampler(world: World, batch: int, size: int) -> Comparison:
    """What happens between two calls of the model: guidance, DDIM, the next doubled input."""
    torch.manual_seed(0)
    x = torch.randn(batch, 4, size, size, device=world.device)
    prediction = torch.randn(2 * batch, 4, size, size, device=world.device)
    schedule, g = fastlora.Schedule.scaled_linear(1000), 7.5
    table = fastlora.ddim(schedule, steps=50)
    coefficients = table.coefficients.to(world.device, torch.float32)
    weights = torch.tensor([[[g], [1 - g]]], device=world.device)
    row = torch.tensor(10, device=world.device)
    t = int(table.timesteps[10])
    abar, after = (float(schedule.alphas_cumprod[i]) for i in (t, t - 20))

    def ours() -> Any:
        outputs = list(prediction.chunk(2))
        return fastlora.ops.sampler_step(x, outputs, weights, coefficients, row, copies=2)

    def plain() -> Tensor:
        cond, uncond = prediction.chunk(2)
        eps = uncond + g * (cond - uncond)
        x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        return torch.cat([after**0.5 * x0 + (1 - after) ** 0.5 * eps] * 2)

    scheduler = diffusers_ddim()

    def theirs() -> Tensor:
        uncond, cond = prediction.chunk(2)
        eps = uncond + g * (cond - uncond)
        following = scheduler.step(eps, t, x).prev_sample
        return scheduler.scale_model_input(torch.cat([following] * 2), t)

    calls: Calls = {
        OURS: ours,
        PLAIN: plain,
        DIFFUSERS: None if scheduler is None else theirs,
    }
    what = f"guidance and DDIM, {batch}×4×{size}×{size}"
    return compare("Sampler step", what, calls, world.settings.seconds, world.device)


def folding(world: World) -> Comparison:
    """Writing W + U g D into the weights of many layers."""
    torch.manual_seed(0)
    sizes = [320] * 8 + [640] * 8 + [1280] * 8
    layers = [nn.Linear(n, n, bias=False, device=world.device) for n in sizes]
    model = nn.Sequential(*layers).requires_grad_(False)
    copies = [torch.empty_like(layer.weight) for layer in layers]
    weights = [layer.weight.detach().clone() for layer in layers]
    other = with_peft(nn.Sequential(*map(layer_copy, layers)), [str(i) for i in range(24)], RANK)
    fastlora.inject(model, fastlora.LoRA(rank=RANK), name="a", seed=0)
    fill(fastlora.parameters(model, "a"))
    factors = fastlora.parameters(model, "a")
    downs, ups = factors[::2], factors[1::2]

    def copy() -> None:
        for weight, out in zip(weights, copies, strict=True):
            out.copy_(weight)

    def plain() -> None:
        for weight, out, down, up in zip(weights, copies, downs, ups, strict=True):
            torch.addmm(weight, up, down, out=out)

    def merge() -> None:  # PEFT adds to the weight itself; how often does not change the time
        for layer in other:
            layer.merged_adapters.clear()
            layer.merge()

    calls: Calls = {
        "copying the weights": copy,
        OURS: lambda: fastlora.fold(model),
        "plain PyTorch, addmm": plain,
        "PEFT, merge": None if other is None else merge,
    }
    what = f"24 layers of SD 1.5's sizes, {sum(n * n for n in sizes) / 1e6:.0f} M weights, rank 16"
    return compare("Fold", what, calls, world.settings.seconds, world.device)


# --- helpers --------------------------------------------------------------------------------------


def models(world: World) -> tuple[tuple[Tensor, ...], Any, Any, Any, Any]:
    """(inputs, plain, adapted, adapted and folded, by PEFT), the last None without PEFT."""
    base = world.load_model()
    ours, folded = world.load_model(), world.load_model()
    rank = world.settings.slider_rank
    for model in (ours, folded):
        fastlora.inject(model, fastlora.LoRA(rank=rank), where=where, name="a", seed=0)
        fill(fastlora.parameters(model, "a"))
    fastlora.fold(folded)
    peft = with_peft(world.load_model(), list(fastlora.adapters(ours)["a"].modules), rank)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, *base.shape, generator=generator).to(world.device)
    t = torch.randint(1000, (8,), generator=generator).to(world.device)
    cond = base.encode(["a three"] * 8)
    return (x, t, cond), base, ours, folded, peft


def fill(parameters: list[nn.Parameter]) -> None:
    """Small numbers instead of the zeros at the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.01 * torch.randn(p.shape, generator=generator))


def layer_copy(layer: nn.Linear) -> nn.Linear:
    """An equal layer that shares nothing."""
    import copy

    return copy.deepcopy(layer)


def with_peft(model: nn.Module, modules: list[str], rank: int) -> Any:
    """The model with PEFT's LoRA on these modules; None where PEFT is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the imports of others warn about
        try:
            import peft
        except ImportError:
            return None
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=modules, init_lora_weights=False
    )
    return peft.inject_adapter_in_model(config, model)


def diffusers_ddim() -> Any:
    """diffusers' DDIM at SD 1.5's settings; None where diffusers is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        except ImportError:
            return None
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    scheduler.set_timesteps(50)
    return scheduler
