"""The training loop: an optimiser over given parameters, EMA, metrics, progress, checkpoints that
resume exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm

from fastlora.adapters.folding import is_folded
from fastlora.adapters.lookup import adapted_layers
from fastlora.adapters.materialize import materialize as keeping_weights
from fastlora.adapters.specs import AdapterError
from fastlora.samplers.arguments import integer, number
from fastlora.samplers.schedule import Schedule

from .checkpoint import ensure_writable, load_checkpoint, save_checkpoint
from .ema import EMA
from .losses import Batch, Loss
from .optimizers import adamw

_READ_EVERY = 10  # steps between two readings of the metrics: a reading waits for the device


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves besides the trained parameters."""

    steps: int
    metrics: dict[str, list[float]]  # the mean of every `_READ_EVERY` steps, by name
    ema: EMA | None


def train(
    model: nn.Module,
    loss: Loss,
    batches: Callable[[torch.Generator], Batch],
    schedule: Schedule,
    *,
    parameters: Iterable[nn.Parameter] | None = None,
    steps: int,
    lr: float = 1e-4,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    warmup: int = 0,
    decay: Callable[[float], float] | None = None,
    clip: float | None = 1.0,
    ema_decay: float | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    materialize: Literal["forward", "step"] | None = None,
    progress: bool = True,
    description: str = "training",
) -> TrainResult:
    """Minimise `loss(model, batches(generator), schedule, generator)` over `parameters`, in place.

    `batches` makes the next batch from a CPU generator (of `seed`), which also gives the loss its t
    and noise; dropout draws from torch's global generator, seeded alike for the run and put back
    after it: the run is a function of the seed. `parameters` (default: all that require a
    gradient) must be the model's; `optimizer` makes the optimiser from them (default AdamW with
    `lr`, weight decay 1e-2). The learning rate is multiplied by `min(1, (step + 1) / warmup)` and
    by `decay(step / steps)`. Gradients are clipped to the norm `clip`; None leaves them alone.

    `checkpoint` names a file that is written every `checkpoint_every` steps and at the end; if it
    exists, the run goes on from there, bit for bit as if it had not stopped. Its directory is tried
    before the first step.

    `materialize`: how long weights under spectral shifts are kept, as `fastlora.materialize` says;
    None leaves that as it is.

    The model's training mode is set for the run and put back.

    Raises, before anything is written, ValueError for a number outside its range and for parameters
    that are not the model's, none, or duplicates, and AdapterError where a folded weight stands in
    for some of them; then CheckpointError for a foreign checkpoint; OSError for a directory that
    cannot be written; FloatingPointError when the loss is not finite: on the CPU before the
    parameters are touched, on other devices, where looking at it would wait for the device, at the
    next reading (every 10 steps), and never after a checkpoint of it.
    """
    steps = _whole("steps", steps, 0)
    warmup = _whole("warmup", warmup, 0)
    checkpoint_every = _whole("checkpoint_every", checkpoint_every, 1)
    if not 0 <= number(lr) < math.inf:
        raise ValueError(f"train: lr: expected a finite number >= 0, got {lr!r}")
    if clip is not None and not 0 < number(clip) < math.inf:  # a negative norm turns gradients over
        raise ValueError(f"train: clip: expected a positive finite number or None, got {clip!r}")
    if ema_decay is not None and not 0 <= number(ema_decay) < 1:
        raise ValueError(
            f"train: ema_decay: expected a number from 0 to below 1 or None, got {ema_decay!r}"
        )
    named = _named(model, parameters)
    _check_used(model, named)
    signature = {name: list(p.shape) for name, p in named.items()}
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        ensure_writable(path.parent)
    make = optimizer or (lambda p: adamw(p, lr=lr))
    ema = None if ema_decay is None else EMA(named, ema_decay)
    state = _State(named, make(list(named.values())), ema, seed)
    was_training = model.training
    bar = tqdm(total=steps, desc=description, disable=not progress)
    window: list[dict[str, torch.Tensor]] = []
    try:
        keeping = nullcontext() if materialize is None else keeping_weights(model, materialize)
        with torch.random.fork_rng(state.gpus), keeping:
            torch.manual_seed(seed)
            if path is not None and path.exists():
                state.load(load_checkpoint(path, signature))
                bar.update(state.step)
            model.train()
            while state.step < steps:
                factor = min(1.0, (state.step + 1) / warmup) if warmup else 1.0
                state.scale_lr(factor * (decay(state.step / steps) if decay else 1.0))
                value, metrics = loss(model, batches(state.generator), schedule, state.generator)
                if value.device.type == "cpu":
                    _check_finite(value.item(), state.step + 1)
                state.optimizer.zero_grad(set_to_none=True)
                value.backward()
                if clip is not None:
                    norm = nn.utils.clip_grad_norm_(named.values(), clip)
                    metrics = {**metrics, "grad_norm": norm.detach()}
                state.optimizer.step()
                if ema is not None:
                    ema.update()
                window.append(metrics)
                state.step += 1
                # A checkpoint sits on a reading, so that a resumed run has the same windows.
                due = state.step % checkpoint_every == 0 or state.step == steps
                if due or state.step % _READ_EVERY == 0:
                    read = state.read(window)
                    bar.update(len(window))
                    # All of them would leave no room for the bar itself.
                    bar.set_postfix(loss=f"{read.get('loss', math.nan):.4g}", refresh=False)
                    window.clear()
                if path is not None and due:
                    save_checkpoint(path, {"signature": signature, **state.dump()})
    finally:
        bar.close()
        model.train(was_training)
    state.optimizer.zero_grad(set_to_none=True)
    return TrainResult(state.step, state.history, ema)


class _State:
    """What changes from step to step: all of it is in a checkpoint."""

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        seed: int,
    ) -> None:
        self.named = named
        self.optimizer = optimizer
        self.ema = ema
        self.step = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.history: dict[str, list[float]] = {}
        self.gpus = sorted({p.get_device() for p in named.values() if p.is_cuda})
        self._base_lr = [group["lr"] for group in optimizer.param_groups]

    def scale_lr(self, factor: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * factor

    def read(self, window: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Means of the window's metrics, appended to the history; one transfer for all of them."""
        names = list(window[0])
        rows = torch.stack([torch.stack([m[name].float() for m in window]) for name in names])
        read = dict(zip(names, rows.mean(1).tolist(), strict=True))
        _check_finite(read.get("loss", 0.0), self.step)
        for name, mean in read.items():
            self.history.setdefault(name, []).append(mean)
        return read

    def dump(self) -> dict[str, Any]:
        ema = self.ema
        return {
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.named.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "global_generators": self._global_generators(),
            "history": self.history,
            "ema": None if ema is None else {"shadow": ema.shadow, "updates": ema.updates},
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        for name, p in self.named.items():
            p.copy_(state["parameters"][name])
        if self.ema is not None and state["ema"] is not None:
            self.ema.updates = state["ema"]["updates"]
            for name, average in self.ema.shadow.items():
                average.copy_(state["ema"]["shadow"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global_generators"][0])
        for gpu, rng in zip(self.gpus, state["global_generators"][1:], strict=False):
            torch.cuda.set_rng_state(rng, gpu)
        self.history = state["history"]

    def _global_generators(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self.gpus)]


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"train: loss: expected a finite number, got {loss} at step {step};"
            " lower the learning rate, or look for NaN in the weights and the data"
        )


def _whole(name: str, value: int, least: int) -> int:
    whole = integer(value)
    if whole is None or whole < least:
        raise ValueError(f"train: {name}: expected an int >= {least}, got {value!r}")
    return whole


def _check_used(model: nn.Module, named: dict[str, nn.Parameter]) -> None:
    """Raises AdapterError for parameters that a folded layer does not compute with."""
    hidden: set[int] = set()
    for layer in adapted_layers(model).values():
        if is_folded(layer):
            hidden |= {id(p) for p in (*layer.fastlora.parameters(), layer.weight)}
    found = [name for name, p in named.items() if id(p) in hidden]
    if found:
        raise AdapterError(
            "train: parameters: expected those that the model computes with, got"
            f" {len(found)} that folded weights stand in for: {', '.join(found[:3])};"
            " unfold the model first: fastlora.unfold(model)"
        )


def _named(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> dict[str, nn.Parameter]:
    """The given parameters by their names in the model, in the given order."""
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = (
        [p for p in model.parameters() if p.requires_grad]
        if parameters is None
        else list(parameters)
    )
    if not chosen:
        raise ValueError(
            "train: parameters: expected at least one, got none that requires a gradient"
        )
    foreign = [list(p.shape) for p in chosen if id(p) not in names]
    if foreign:
        raise ValueError(
            "train: parameters: expected parameters of the model,"
            f" got {len(foreign)} others, of shapes {foreign[:3]}"
        )
    fixed = [names[id(p)] for p in chosen if not p.requires_grad]
    if fixed:
        raise ValueError(
            f"train: parameters: expected requires_grad, got frozen ones: {', '.join(fixed[:3])}"
        )
    named = {names[id(p)]: p for p in chosen}
    if len(named) != len(chosen):
        raise ValueError(
            f"train: parameters: expected each once, got {len(chosen) - len(named)} twice"
        )
    return named
