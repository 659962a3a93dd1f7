"""The training loop: an optimiser over given parameters, EMA, metrics, progress, checkpoints that
resume exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from fastlora.samplers.schedule import Schedule

from .checkpoint import ensure_writable, load_checkpoint, save_checkpoint
from .ema import EMA
from .losses import Batch, Loss

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
    progress: bool = True,
    description: str = "training",
) -> TrainResult:
    """Minimise `loss(model, batches(generator), schedule, generator)` over `parameters`, in place,
    for `steps` steps.

    `batches` makes the next batch from a CPU generator (of `seed`), which also gives the loss its t
    and noise: the run is a function of the seed. `parameters` (default: all that require a
    gradient) must be the model's; `optimizer` makes the optimiser from them (default AdamW with
    `lr`, weight decay 1e-2). The learning rate is multiplied by `min(1, (step + 1) / warmup)` and
    by `decay(step / steps)`. Gradients are clipped to the norm `clip`.

    `checkpoint` names a file that is written every `checkpoint_every` steps and at the end; if it
    exists, the run goes on from there, bit for bit as if it had not stopped. Its directory is tried
    before the first step.

    The model's training mode is set for the run and put back. Raises ValueError for parameters that
    are not the model's, none, or duplicates; CheckpointError for a foreign checkpoint; OSError for
    a directory that cannot be written; FloatingPointError when the loss is not finite: on the CPU
    before the parameters are touched, on other devices, where looking at it would wait for the
    device, at the next reading (every 10 steps), and never after a checkpoint of it.
    """
    named = _named(model, parameters)
    signature = {name: list(p.shape) for name, p in named.items()}
    if steps < 0 or warmup < 0 or checkpoint_every < 1:
        raise ValueError(
            "train: expected steps >= 0, warmup >= 0, checkpoint_every >= 1,"
            f" got {steps}, {warmup}, {checkpoint_every}"
        )
    if checkpoint is not None:
        ensure_writable(Path(checkpoint).parent)
    make = optimizer or (lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=1e-2))
    state = _State(
        make(list(named.values())), EMA(named, ema_decay) if ema_decay is not None else None, seed
    )
    start = 0
    if checkpoint is not None and Path(checkpoint).exists():
        start = state.load(load_checkpoint(checkpoint, signature), named)

    was_training = model.training
    model.train()
    bar = tqdm(
        total=steps, initial=min(start, steps), desc=description, disable=not progress, leave=True
    )
    window: list[dict[str, torch.Tensor]] = []
    try:
        for step in range(start, steps):
            factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
            state.scale_lr(factor * (decay(step / steps) if decay else 1.0))
            value, metrics = loss(model, batches(state.generator), schedule, state.generator)
            if value.device.type == "cpu":
                _check_finite(value.item(), step)
            state.optimizer.zero_grad(set_to_none=True)
            value.backward()
            if clip is not None:
                metrics["grad_norm"] = nn.utils.clip_grad_norm_(named.values(), clip).detach()
            state.optimizer.step()
            if state.ema is not None:
                state.ema.update()
            window.append(metrics)
            # A checkpoint sits on a reading, so that a resumed run has the same windows.
            due = (step + 1) % checkpoint_every == 0 or step + 1 == steps
            if due or (step + 1) % _READ_EVERY == 0:
                read = state.read(window, step)
                window.clear()
                bar.update(step + 1 - bar.n)
                bar.set_postfix(
                    {name: f"{number:.4g}" for name, number in read.items()}, refresh=False
                )
            if checkpoint is not None and due:
                save_checkpoint(checkpoint, state.dump(step + 1, named, signature))
    finally:
        bar.close()
        model.train(was_training)
    return TrainResult(steps, state.history, state.ema)


class _State:
    """All that a checkpoint must hold besides the parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, ema: EMA | None, seed: int) -> None:
        self.optimizer = optimizer
        self.ema = ema
        self.generator = torch.Generator().manual_seed(seed)
        self.history: dict[str, list[float]] = {}
        self._base_lr = [group["lr"] for group in optimizer.param_groups]

    def scale_lr(self, factor: float) -> None:
        for group, base in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * factor

    def read(self, window: list[dict[str, torch.Tensor]], step: int) -> dict[str, float]:
        """Means of the window's metrics, appended to the history."""
        names = list(window[0])
        # One transfer for all numbers.
        means = torch.stack(
            [torch.stack([m[n].float() for m in window]).mean() for n in names]
        ).tolist()
        read = dict(zip(names, means, strict=True))
        for name, number in read.items():
            if name == "loss":
                _check_finite(number, step)
            self.history.setdefault(name, []).append(number)
        return read

    def dump(
        self, step: int, named: dict[str, nn.Parameter], signature: dict[str, list[int]]
    ) -> dict[str, Any]:
        return {
            "signature": signature,
            "step": step,
            "parameters": {name: p.detach() for name, p in named.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "history": self.history,
            "ema": None
            if self.ema is None
            else {"shadow": self.ema.shadow, "updates": self.ema.updates},
        }

    def load(self, state: dict[str, Any], named: dict[str, nn.Parameter]) -> int:
        """Take over a checkpoint; the number of steps done."""
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(state["parameters"][name])
            if self.ema is not None and state["ema"] is not None:
                self.ema.updates = state["ema"]["updates"]
                for name, average in self.ema.shadow.items():
                    average.copy_(state["ema"]["shadow"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.history = state["history"]
        return state["step"]


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"train: loss: expected a finite number, got {loss} at step {step + 1};"
            " lower the learning rate, or look for NaN in the weights and the data"
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
