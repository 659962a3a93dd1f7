"""`tune`: measures which route of `lora_linear` is fastest, instead of predicting it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.components import Models, as_one
from fastlora.adapters.lookup import adapted_layers, no_module
from fastlora.adapters.specs import AdapterError
from fastlora.ops import _routes, _tuned, operators
from fastlora.ops._define import kernels
from fastlora.samplers.graph import Graph

ROUNDS = 7
SAMPLE = 2e-3  # seconds that a sample should take at least
CAPTURED = 20  # calls in one CUDA graph
WORTH = 0.97  # of the time of the predicted route: what less would gain is noise

Arguments = tuple[Any, ...]
Times = dict[str, float]


@dataclass(frozen=True)
class TuneRow:
    """One kind of call: seconds by route."""

    call: str  # shapes, dtype, what else matters: "2x1280x320, rank 16, float32, bias"
    device: str
    predicted: Times
    measured: Times
    expected: str  # the route that the cost model takes
    chosen: str  # what calls of this kind take from now on

    @property
    def gain(self) -> float:
        """How many times faster than what was expected to be fastest."""
        return self.measured[self.expected] / self.measured[self.chosen]


@dataclass(frozen=True)
class TuneReport:
    """What `tune` has measured; `str(report)` is a table."""

    rows: tuple[TuneRow, ...]
    file: str  # where it was saved, "" if it was not
    problem: str = ""  # why it was not

    def __str__(self) -> str:
        if not self.rows:
            return "no adapted layer called lora_linear: nothing to tune"
        width = max(len(row.call) for row in self.rows)
        lines = []
        for device in dict.fromkeys(row.device for row in self.rows):
            lines += [device, f"{'call':<{width}}  microseconds by route (predicted)"]
            for row in self.rows:
                if row.device == device:
                    routes = sorted(row.measured, key=lambda name: row.measured[name])
                    cells = [f"{r} {_cell(row.measured[r], row.predicted[r])}" for r in routes]
                    change = f", {row.gain:.2f} x {row.expected}" if row.gain > 1 else ""
                    lines.append(
                        f"{row.call:<{width}}  {'  '.join(cells)}  -> {row.chosen}{change}"
                    )
        changed = sum(row.chosen != row.expected for row in self.rows)
        lines.append(f"{changed} of {len(self.rows)} kinds of calls take another route than before")
        kept = f"saved in {self.file}" if self.file else f"for this process only: {self.problem}"
        return "\n".join([*lines, kept])


def _cell(measured: float, predicted: float) -> str:
    guess = f"{predicted * 1e6:.1f}" if predicted < float("inf") else "-"
    return f"{measured * 1e6:.1f} ({guess})"


@torch.no_grad()
def tune(model: Models, *inputs: Any, **keywords: Any) -> TuneReport:
    """Times every route of every kind of `lora_linear` call that the model makes on these inputs,
    and lets calls of that kind take the fastest from now on.

    `model`: a module, or a pipeline, which is called likewise and all of whose components are
    looked at: `tune(pipe, "a prompt", num_inference_steps=1)`. It runs once, in eval mode and
    without gradients; its modes and the random state are as before afterwards. Calls are told apart
    by shapes, dtypes, layouts and device; use inputs of the sizes that you will serve. On a GPU
    calls are timed inside a CUDA graph where that is possible. Routes differ in the order of
    roundings: results may change by as much, once, here.

    What was measured is kept in `FASTLORA_TUNE_FILE` (default: fastlora/tune.json in the user's
    cache folder) by device, and later processes use it; where that cannot be written the report
    says so, and this process uses it all the same. Raises AdapterError if there are no adapters, or
    if the model fails on the inputs.
    """
    if not callable(model):
        raise no_module(model)
    one = as_one(model, "tune")
    if not adapted_layers(one):
        raise AdapterError("tune: the model has no adapters")
    calls = _calls_of(model, one, inputs, keywords)
    rows: list[TuneRow] = []
    entries: dict[str, dict[str, str]] = {}
    try:
        for (device, call), args in calls.items():
            plans = _routes.routes(*args)
            predicted = _routes.predicted(*args)
            expected = min(plans, key=lambda name: predicted[name])
            measured = _measured(plans, args)
            fastest = min(measured, key=lambda name: measured[name])
            worth = measured[fastest] <= WORTH * measured[expected]
            chosen = fastest if worth else expected
            named = {name: predicted[name] for name in plans}
            rows.append(TuneRow(call, device, named, measured, expected, chosen))
            entries.setdefault(device, {})[call] = chosen
        problem = _tuned.remember(entries) if entries else ""
    finally:
        operators["lora_linear"].clear()  # plans that were made before, or while watching
    saved = str(_tuned.file()) if entries and not problem else ""
    return TuneReport(tuple(rows), saved, problem)


def _calls_of(
    model: Callable[..., Any], one: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> dict[tuple[str, str], Arguments]:
    """(device, call) -> arguments of one such call, for all that have more than one route. `one`
    has the modules of what is called."""
    seen: dict[tuple[str, str], Arguments] = {}

    def watch(*args: Any) -> None:
        device = _tuned.device_key(args[0])
        if device is not None and len(_routes.routes(*args)) > 1:
            detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            seen.setdefault((device, _tuned.call_key(*args)), detached)

    devices = {p.device for p in one.parameters() if p.is_cuda}
    modes = {module: module.training for module in one.modules()}
    one.eval()  # dropout takes another way
    operators[
        "lora_linear"
    ].clear()  # every kind of call has to make its plan again, and is seen there
    try:
        with torch.random.fork_rng(list(devices)), _routes.watched(watch):
            model(*inputs, **keywords)
    except Exception as error:
        raise AdapterError(
            f"tune: the model fails on these inputs: {type(error).__name__}: {error}"
        ) from error
    finally:
        operators["lora_linear"].clear()
        for module, mode in modes.items():
            module.training = mode
    return seen


# --- timing ---------------------------------------------------------------------------------------


def _measured(plans: dict[str, Any], args: Arguments) -> Times:
    """Seconds of a call by route: the fastest of several rounds, in which routes take turns."""
    samples = {}
    for name, plan in plans.items():
        samples[name] = _on_cuda(plan, args) if args[0].is_cuda else _on_cpu(plan, args)
    times = dict.fromkeys(plans, float("inf"))
    for _ in range(ROUNDS):
        for name, sample in samples.items():
            times[name] = min(times[name], sample())
    return times


_plan: Any = None
# Native plans are called by a dispatcher, and one serves for all trials.
_, _run, _forget, _ = kernels.make_dispatcher(lambda *_: _plan, None, None, False)


def _on_cpu(plan: Any, args: Arguments) -> Callable[[], float]:
    def seconds(count: int) -> float:
        global _plan
        _plan = plan
        _forget()
        _run(*args)
        start = time.perf_counter()
        for _ in range(count):
            _run(*args)
        return (time.perf_counter() - start) / count

    count = max(1, min(1000, int(SAMPLE / max(seconds(1), 1e-7))))
    return lambda: seconds(count)


def _on_cuda(plan: Any, args: Arguments) -> Callable[[], float]:
    """Many calls in one captured graph, as a served model runs; one after the other where a call
    cannot be captured."""
    device = args[0].device

    def many() -> None:
        for _ in range(CAPTURED):
            plan(*args)

    run: Callable[[], None] = many
    try:
        run = Graph(many, device).replay
    except RuntimeError:
        many()

    def seconds() -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e-3 / CAPTURED

    seconds()  # the first replay uploads the graph
    return seconds
