"""`Sampler`: a sampling with buffers that stay, so that all of it can be one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from fastlora.samplers.arguments import describe, integer
from fastlora.samplers.buffers import Writes, copied, fitting, write
from fastlora.samplers.graph import Graph
from fastlora.samplers.inputs import (
    Guidance,
    Inputs,
    Model,
    given_weights,
    guided,
    inpainting,
    prepare,
    rescaling,
)
from fastlora.samplers.loop import Step, check_start, run, run_steps, watched
from fastlora.samplers.noise import as_seeds, noise
from fastlora.samplers.stepping import State, Stepper
from fastlora.samplers.table import Table

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Given(TypedDict, total=False):
    """What calls of a Sampler may give anew, as `sample` takes it; None is as not given."""

    seeds: Sequence[int] | Tensor | None
    cond: Any
    uncond: Any
    guidance_scale: float | Tensor | None
    weights: Sequence[Any] | Tensor | None
    guidance_rescale: float | Tensor | None
    mask: Tensor | None
    known: Tensor | None


class Sampler:
    """`sample` for one model, table and shape, called again and again with other prompts, seeds,
    guidance and strengths.

        sampler = Sampler(model, table, (4, 4, 64, 64), cond, uncond, 7.5, device="cuda").capture()
        images = sampler(seeds=[1, 2, 3, 4])
        others = sampler(seeds=[5, 6, 7, 8], cond=other_prompts, guidance_scale=5.0)

    The arguments are those of `sample`. `shape` [B, ...]; `device` and `dtype` of x: those of the
    model's first parameter by default, the CPU and float32 for a function. What is given here is
    what later calls start from; `guidance_rescale`, `mask` and `known` can be given later only
    where they were given here, for they change what is computed. `check_finite` raises
    FloatingPointError for predictions that are not finite: after each step where there are steps,
    after the loop where it is one graph; each look waits for the device.

    `capture` makes the whole loop one CUDA graph, or each step (`per_step=True`: for `steps`,
    previews and cancelling), replayed without waiting for the device. Graphs follow what calls are
    given, strengths, switches and `start`, and adapters that come and go in a `reserve`. After
    other changes of the model's adapters, or of where its parameters are, the next call captures
    again; `captures` counts.

    Not for several threads at once. Raises what `sample` raises.
    """

    def __init__(
        self,
        model: Model,
        table: Table,
        shape: Sequence[int],
        cond: Any = None,
        uncond: Any = None,
        guidance_scale: float | Tensor = 1.0,
        *,
        weights: Sequence[Any] | Tensor | None = None,
        guidance_rescale: float | Tensor | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        check_finite: bool = False,
    ) -> None:
        sizes = [integer(size) for size in shape] if isinstance(shape, Sequence) else []
        if not sizes or any(size is None or size < 0 for size in sizes):
            raise ValueError(f"Sampler: shape: expected sizes [B, ...], got {shape!r}")
        self.shape = tuple(shape)
        parameters = model.parameters() if isinstance(model, nn.Module) else ()
        first = next((p for p in parameters if p.is_floating_point()), torch.empty(0))
        x = torch.zeros(self.shape, device=device or first.device, dtype=dtype or first.dtype)
        guidance = Guidance(guidance_scale, weights)
        self._guided, self._weighted = uncond is not None, weights is not None
        rescales = guidance_rescale is not None
        with torch.inference_mode(False):  # buffers that every mode may write
            inputs = prepare(
                "Sampler", model, table, x, cond, uncond, guidance, [0] * len(x), mask, known
            )
            steps, copies = len(table), inputs.copies
            self._inputs = replace(
                inputs,
                x=inputs.x.clone(),
                cond=copied(inputs.cond),
                weights=inputs.weights.expand(steps, copies, len(x)).clone(),
                seeds=inputs.seeds if table.stochastic or mask is not None else None,
                rescale=inputs.x.new_zeros(len(x)) if rescales else None,
                mask=copied(inputs.mask),
                known=copied(inputs.known),
            )
            self._stepper = Stepper(table, self._inputs)
            self._row = torch.zeros((), dtype=torch.int64, device=x.device)  # that comes next
            self._finite = torch.ones(steps, dtype=torch.bool, device=x.device)
        self.model, self.table, self.captures = model, table, 0
        self._graph: Graph[Any] | None = None
        self._captured = self._per_step = False
        self._calls = 0
        self._strengths: Any = None
        self._state: State | None = None  # of a graph of one step
        self._check = check_finite
        if rescales:
            write(self._numbers({"guidance_rescale": guidance_rescale}))

    # --- calls ------------------------------------------------------------------------------------

    def __call__(
        self,
        x: Tensor | None = None,
        *,
        start: Mapping[str, float] | None = None,
        progress: bool = False,
        **given: Unpack[Given],
    ) -> Tensor:
        """Samples [B, ...] from noise x, by default the noise of the seeds, which are drawn where
        they are not given. What else of `Given` is not given is what it was before: seeds, cond,
        uncond, guidance_scale, weights, guidance_rescale, mask, known."""
        graph = self._begin(x, given, start)
        if graph is None:
            return run(self.model, self._stepper, self._inputs, start, progress, self._check)
        if self._per_step:
            for _ in watched(
                self._replayed(graph, self._calls), progress, self.table.timesteps.tolist()
            ):
                pass
        else:
            graph.replay()
            self._look(range(len(self.table)))
        return graph.result[0].clone()

    def steps(
        self,
        x: Tensor | None = None,
        *,
        start: Mapping[str, float] | None = None,
        **given: Unpack[Given],
    ) -> Iterator[Step]:
        """The same step by step; stop whenever you like. Where the whole loop is captured there are
        no steps: RuntimeError; so it is for steps of a graph after another call has begun."""
        if self._captured and not self._per_step:
            raise RuntimeError(
                "Sampler: steps: the whole loop is one CUDA graph; expected capture(per_step=True)"
            )
        graph = self._begin(x, given, start)
        if graph is None:
            return run_steps(self.model, self._stepper, snapshot(self._inputs), start, self._check)
        return self._replayed_steps(graph, self._calls)

    # --- capturing --------------------------------------------------------------------------------

    def capture(self, per_step: bool = False) -> Sampler:
        """Captures now, with the model as it is; returns itself. Raises RuntimeError where x is not
        on a CUDA device, AdapterError for strengths that require a gradient."""
        self._captured, self._per_step = False, per_step
        self._capture()
        self._captured = True
        return self

    @torch.no_grad()
    def _capture(self) -> None:
        self._graph = self._strengths = self._state = None  # first: its memory is used again
        device, strengths = self._inputs.x.device, None
        if isinstance(self.model, nn.Module):
            from fastlora.adapters import CapturedStrengths

            copies = self._inputs.copies
            strengths = CapturedStrengths(self.model, device, len(self.table), copies)
            strengths.write(self.table.timesteps.tolist(), None)
        self._strengths = strengths
        with torch.inference_mode(False), torch.no_grad():
            if self._per_step:
                self._state = self._stepper.begin(self._inputs)
                self._row.zero_()
            whole = self._one_step if self._per_step else self._all_steps
            with strengths.lent() if strengths else nullcontext():
                self._graph = Graph(whole, device)
        self.captures += 1

    def _all_steps(self) -> tuple[Tensor]:
        """The loop as it is captured: x at its end."""
        state = self._stepper.begin(self._inputs)
        with self._steady():
            for row, time in zip(self._stepper.numbers, self._stepper.times, strict=True):
                state, _ = self._advance(state, row, time)
        return (state.x,)

    def _one_step(self) -> tuple[Tensor, Tensor, Tensor]:
        """A step as it is captured: x after it and before it, and the prediction. The state and the
        number of the row are written in place for the next."""
        assert self._state is not None
        time = self._stepper.times.index_select(0, self._row.view(1))[0]
        before = self._state.x.clone()
        after, prediction = self._advance(self._state, self._row, time)
        write_state(self._state, after)
        self._row.add_(1)
        return self._state.x, before, prediction

    def _advance(self, state: State, row: Tensor, time: Tensor) -> tuple[State, Tensor]:
        if self._strengths is not None:
            self._strengths.load(row)
        state, prediction = self._stepper.advance(self.model, self._inputs, state, row, time)
        if self._check:
            self._finite.index_copy_(0, row.view(1), prediction.isfinite().all().view(1))
        return state, prediction

    def _steady(self) -> AbstractContextManager[Any]:
        if not isinstance(self.model, nn.Module):
            return nullcontext()
        from fastlora.adapters import steady

        return steady(self.model)

    def _begin(
        self, x: Tensor | None, given: Given, start: Mapping[str, float] | None
    ) -> Graph[Any] | None:
        """Takes what a call gives, or raises and changes nothing. The graph, where there is one,
        with all that it reads."""
        unknown = given.keys() - Given.__annotations__.keys()
        if unknown:
            raise TypeError(
                f"Sampler: {min(unknown)}: no such argument; expected x, start or one of"
                f" {', '.join(Given.__annotations__)}"
            )
        if not self._captured:
            check_start(self.model, start)
            self._take({"x": x, **given})
            return None
        if self._graph is None or (self._strengths is not None and not self._strengths.fits()):
            self._capture()
        if self._strengths is None and start:
            raise TypeError(
                "Sampler: start: expected a module with adapters as the model, got"
                f" {describe(self.model)}"
            )
        if self._strengths is not None:
            self._strengths.write(self.table.timesteps.tolist(), start)
        self._take({"x": x, **given})
        self._calls += 1
        if self._state is not None:
            write_state(self._state, self._stepper.begin(self._inputs))
            self._row.zero_()
        return self._graph

    def _replayed(self, graph: Graph[Any], call: int) -> Iterator[int]:
        """Replays the graph of one step for each, as long as `call` is the last one."""
        for index in range(len(self.table)):
            if call != self._calls:
                raise RuntimeError(
                    "Sampler: steps: expected no other call before the last step, got one: they"
                    " share the memory of one graph"
                )
            graph.replay()
            self._look([index])
            yield index

    @torch.no_grad()
    def _replayed_steps(self, graph: Graph[Any], call: int) -> Iterator[Step]:
        inputs: Inputs | None = None
        for index in self._replayed(graph, call):
            inputs = inputs or snapshot(self._inputs)
            x, before, prediction = (t.clone() for t in graph.result)  # the next writes over them

            def clean(
                x: Tensor = before,
                e: Tensor = prediction,
                index: int = index,
                inputs: Inputs = inputs,
            ) -> Tensor:
                with torch.no_grad():
                    return self._stepper.clean(inputs, State(x, None, e), e, index)

            yield Step(index, self.table.timesteps[index].item(), x, clean)

    def _look(self, steps: Sequence[int]) -> None:
        """Raises FloatingPointError for the first of these steps with a prediction that is not
        finite."""
        if self._check:
            for index, finite in zip(steps, self._finite[list(steps)].tolist(), strict=True):
                if not finite:
                    raise FloatingPointError(
                        "Sampler: model: expected finite predictions, got some that are not at step"
                        f" {index}, timestep {self.table.timesteps[index].item():g}"
                    )

    # --- what calls are given ---------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, given: Mapping[str, Any]) -> None:
        """Writes what is given into the buffers; raises, and changes nothing, where something does
        not fit."""
        said = {name: value for name, value in given.items() if value is not None}
        writes = [*self._conditions(said), *self._numbers(said), *self._inpainting(said)]
        write(writes + self._noise(said))

    def _noise(self, said: Mapping[str, Any]) -> Writes:
        inputs, x = self._inputs, said.get("x")
        right = isinstance(x, Tensor) and tuple(x.shape) == self.shape and x.is_floating_point()
        if x is not None and not right:
            raise ValueError(
                f"Sampler: x: expected a floating-point tensor {list(self.shape)}, got"
                f" {describe(x)}"
            )
        seeds = as_seeds(said.get("seeds"), self.shape[0], torch.device("cpu"), "Sampler")
        writes = [(inputs.seeds, seeds)] if inputs.seeds is not None else []
        if x is None:
            x = noise(seeds, self.shape[1:], inputs.x.device)
        return [*writes, (inputs.x, x)]

    def _conditions(self, said: Mapping[str, Any]) -> Writes:
        batch, cond = self.shape[0], self._inputs.cond
        if "uncond" in said and not self._guided:
            raise ValueError(
                "Sampler: uncond: expected one when the Sampler was made, got none then"
            )
        parts: dict[int, tuple[str, Any]] = {}
        if "cond" in said and self._weighted:
            n, values = self._inputs.copies, said["cond"]
            if not isinstance(values, (tuple, list)) or len(values) != n:
                raise ValueError(
                    f"Sampler: cond: expected a list of {n}, one for each weight, got"
                    f" {describe(values)}"
                )
            parts = {j: (f"cond[{j}]", value) for j, value in enumerate(values)}
        elif "cond" in said:
            parts[0] = "cond", said["cond"]
        if "uncond" in said:
            parts[1] = "uncond", said["uncond"]
        writes: Writes = []
        for j, (name, values) in parts.items():
            writes += fitting(cond, values, slice(j * batch, (j + 1) * batch), name)
        return writes

    def _numbers(self, said: Mapping[str, Any]) -> Writes:
        batch, steps, inputs = self.shape[0], len(self.table), self._inputs
        writes: Writes = []
        if "weights" in said or (self._weighted and "guidance_scale" in said):
            if not self._weighted:
                raise ValueError("Sampler: weights: expected them when the Sampler was made")
            guidance = Guidance(said.get("guidance_scale", 1.0), said.get("weights"))
            new = given_weights("Sampler", guidance, None, batch, steps)
            if new.shape[1] != inputs.copies:
                raise ValueError(
                    f"Sampler: weights: expected {inputs.copies}, as when the Sampler was made, got"
                    f" {new.shape[1]}"
                )
            writes.append((inputs.weights, new))
        elif "guidance_scale" in said:
            new = guided("Sampler", said["guidance_scale"], self._guided, batch, steps)
            writes.append((inputs.weights, new))
        if "guidance_rescale" in said:
            phi = rescaling("Sampler", said["guidance_rescale"], batch)
            if inputs.rescale is None:
                raise ValueError(
                    "Sampler: guidance_rescale: expected one (or 0.0) when the Sampler was made"
                )
            writes.append((inputs.rescale, torch.zeros(1) if phi is None else phi))
        return writes

    def _inpainting(self, said: Mapping[str, Any]) -> Writes:
        if "mask" not in said and "known" not in said:
            return []
        inputs = self._inputs
        if inputs.mask is None or inputs.known is None:
            raise ValueError("Sampler: mask: expected mask and known when the Sampler was made")
        mask, known = inpainting(
            "Sampler", said.get("mask", inputs.mask), said.get("known", inputs.known), inputs.x
        )
        if mask.shape != inputs.mask.shape:
            raise ValueError(
                f"Sampler: mask: expected {list(inputs.mask.shape)}, as when the Sampler was made,"
                f" got {list(mask.shape)}"
            )
        return [(inputs.mask, mask), (inputs.known, known)]


def snapshot(inputs: Inputs) -> Inputs:
    """The same with tensors of their own, for steps that somebody takes later."""
    return Inputs(**{name: copied(value) for name, value in vars(inputs).items()})


def write_state(to: State, source: State) -> None:
    to.x.copy_(source.x)
    to.model_input.copy_(source.model_input)
    if to.history is not None and source.history is not None:
        to.history.copy_(source.history)
