"""The sampling loop: one model call and one `sampler_step` a step, and no wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.samplers.arguments import describe
from fastlora.samplers.inputs import Guidance, Inputs, Model, prepare
from fastlora.samplers.stepping import Stepper
from fastlora.samplers.table import Table


@dataclass(frozen=True)
class Step:
    """`x` [B, ...] after step `index` of 0..S-1, at which the model saw `timestep`."""

    index: int
    timestep: float
    x: Tensor
    _clean: Callable[[], Tensor] = field(repr=False, compare=False)

    def x0(self) -> Tensor:
        """What the model takes for the clean sample [B, ...] at this step: a preview. Computed when
        it is asked for, from what the step has kept."""
        return self._clean()


def sample(
    model: Model,
    table: Table,
    x: Tensor,
    cond: Any = None,
    uncond: Any = None,
    guidance_scale: float | Tensor = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    progress: bool = True,
    start: Mapping[str, float] | None = None,
    *,
    weights: Sequence[Any] | Tensor | None = None,
    guidance_rescale: float | Tensor = 0.0,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    check_finite: bool = False,
) -> Tensor:
    """Samples [B, ...] from noise `x` [B, ...] by a solver's table; `sample_steps` has every step.

    `model(x, t, cond) -> prediction`, of x's shape, is all that is asked of a model; t is [batch],
    int64, or of the dtype that x has between steps where the table's timesteps are fractions. It is
    called without gradients. Where it is an nn.Module, x reaches it in the dtype of its first
    parameter, otherwise in the dtype of the x given here; between steps x is float32 (float64 if it
    came so, or if that parameter is float64), and so is the result. x is standard normal noise, as
    `noise(seeds, ...)` makes it; the table scales it by its `init_noise_sigma`. From an image
    instead: `table = table.since(k)`, and x is `table.noised(image, noise(seeds, ...))`.

    With `uncond` (classifier-free guidance) the model is called once on twice the batch, all of
    `cond`, then all of `uncond`: tensors [B, ...], or tuples, lists and dicts of them. Then the
    prediction is `e_u + g (e_c - e_u)`, g = `guidance_scale`, a number, a tensor [B], or
    [S, B or 1] by step. `guidance_rescale` φ gives it the standard deviation of e_c by that share
    (Lin et al., 2023). With `weights` ([n], [n, B] or [S, n, B]) `cond` is a list of n conditions
    and the prediction is `Σ w_j e_j`. Per-sample strengths of adapters inside `model` follow the
    repeated batch; for a function around a module use `tiled` in it (`from fastlora.adapters import
    tiled`).

    `mask` and `known` (inpainting): samples are made where the mask is 1 and are `known` [B, ...],
    clean values, where it is 0; on the way there the known part has the noise of the seeds. The
    mask's first two sizes may be 1.

    `start`: timesteps by adapter name. Such an adapter is off at steps whose timestep is above its
    (what the model is told: the other way round on grids that tell it a log-SNR), so that a slider
    leaves the layout alone (Concept Sliders, Gandikota et al. 2023, arXiv 2311.12092); afterwards
    strengths and switches are what they were. A model that was folded before is folded again at
    such a step where the cost model says that this takes less time than the adapters in the steps
    that follow, and runs unmerged else; it is folded at the end.

    `seeds`, one int per sample, decide the noise of a stochastic table; None draws them from
    torch's generator. A sample does not depend on the rest of its batch. `check_finite` looks at
    every prediction, which waits for the device, and raises FloatingPointError naming the step.

    Raises TypeError for a model that cannot be called, a table that is no Table and seeds that are
    no sequence, ValueError for all else that does not fit together; AdapterError for a `start` that
    the model does not fit.
    """
    guidance = Guidance(guidance_scale, weights, guidance_rescale)
    inputs = prepare("sample", model, table, x, cond, uncond, guidance, seeds, mask, known)
    return run(model, Stepper(table, inputs), inputs, start, progress, check_finite)


def sample_steps(
    model: Model,
    table: Table,
    x: Tensor,
    cond: Any = None,
    uncond: Any = None,
    guidance_scale: float | Tensor = 1.0,
    seeds: Sequence[int] | Tensor | None = None,
    start: Mapping[str, float] | None = None,
    *,
    weights: Sequence[Any] | Tensor | None = None,
    guidance_rescale: float | Tensor = 0.0,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    check_finite: bool = False,
) -> Iterator[Step]:
    """`sample` as an iterator: the model runs only as far as one looks, and is as it was between
    steps. Raises at once what `sample` raises before its first step."""
    guidance = Guidance(guidance_scale, weights, guidance_rescale)
    inputs = prepare("sample", model, table, x, cond, uncond, guidance, seeds, mask, known)
    return run_steps(model, Stepper(table, inputs), inputs, start, check_finite)


def run(
    model: Model,
    stepper: Stepper,
    inputs: Inputs,
    start: Mapping[str, float] | None,
    progress: bool,
    check_finite: bool,
) -> Tensor:
    """All steps; nobody looks at the model between them."""
    timesteps = stepper.table.timesteps.tolist()
    phases = _phases(model, start, timesteps)
    with _steady(model), _tiled(model, inputs.copies), phases as switch:

        def around(timestep: float) -> AbstractContextManager[Any]:
            switch(timestep)
            return nullcontext()

        x = inputs.x
        for step in watched(
            _steps(model, stepper, inputs, around, check_finite), progress, timesteps
        ):
            x = step.x
    return x


def run_steps(
    model: Model,
    stepper: Stepper,
    inputs: Inputs,
    start: Mapping[str, float] | None,
    check_finite: bool,
) -> Iterator[Step]:
    """Step by step; the model is as it was between them, and every step's x is its own."""
    check_start(model, start)

    @contextmanager
    def around(timestep: float) -> Iterator[None]:
        phases = _phases(model, start, [timestep])
        with _tiled(model, inputs.copies), phases as switch:
            switch(timestep)
            yield

    return _steps(model, stepper, inputs, around, check_finite, own=True)


def check_start(model: Model, start: Mapping[str, float] | None) -> None:
    """Raises what a sampling with it would."""
    with _phases(model, start, []):
        pass


def watched(steps: Any, progress: bool, timesteps: Sequence[float]) -> Any:
    """The steps with a progress bar, or without."""
    if not progress:
        return steps
    from tqdm import tqdm

    return tqdm(steps, total=len(timesteps), desc="sampling", unit="step")


@torch.no_grad()
def _steps(
    model: Model,
    stepper: Stepper,
    inputs: Inputs,
    around: Callable[[float], AbstractContextManager[Any]],  # each call of the model, by timestep
    check_finite: bool,
    own: bool = False,  # somebody looks at the steps, and may write to them
) -> Iterator[Step]:
    state = stepper.begin(inputs)
    places = stepper.table.timesteps.tolist(), stepper.numbers.unbind(), stepper.times.unbind()
    for index, (timestep, row, time) in enumerate(zip(*places, strict=True)):
        before = state
        with around(timestep):
            state, prediction = stepper.advance(model, inputs, state, row, time)
        if check_finite and not bool(prediction.isfinite().all()):
            raise FloatingPointError(not_finite(prediction, index, timestep))
        if own:  # a model may use its output's memory again
            prediction = prediction.clone()

        def clean(before: Any = before, prediction: Any = prediction, index: int = index) -> Tensor:
            with torch.no_grad():
                return stepper.clean(inputs, before, prediction, index)

        yield Step(index, timestep, state.x.clone() if own else state.x, clean)


def not_finite(prediction: Tensor, index: int, timestep: float) -> str:
    bad = prediction[~prediction.isfinite()]
    return (
        f"sample: model: expected finite predictions, got {bad[0].item()} and the like in"
        f" {bad.numel()} of {prediction.numel()} places at step {index}, timestep {timestep:g}"
    )


def _tiled(model: Model, copies: int) -> AbstractContextManager[Any]:
    """Per-sample strengths of the model's adapters, repeated as the batch is."""
    if copies == 1 or not isinstance(model, nn.Module):
        return nullcontext()
    from fastlora.adapters import tiled  # a sibling: samplers do not need adapters until here

    return tiled(model, copies)


def _steady(model: Model) -> AbstractContextManager[Any]:
    if not isinstance(model, nn.Module):
        return nullcontext()
    from fastlora.adapters import steady

    return steady(model)


def _phases(
    model: Model, start: Mapping[str, float] | None, timesteps: Sequence[float]
) -> AbstractContextManager[Callable[[float], None]]:
    """A function that switches the adapters in `start` for a timestep."""
    if start is None:
        return nullcontext(lambda timestep: None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"sample: start: expected a module with adapters as the model, got {describe(model)}"
        )
    from fastlora.adapters import phases

    return phases(model, start, timesteps)
