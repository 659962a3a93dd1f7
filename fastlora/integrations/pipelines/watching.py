"""What stands before the calls of a model inside of a pipeline: rows for its batch, start steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from fastlora.adapters.control import retile
from fastlora.adapters.lookup import arenas, known_names
from fastlora.adapters.phases import phases
from fastlora.adapters.specs import AdapterError
from fastlora.integrations.pipelines.strengths import Strengths
from fastlora.integrations.pipelines.timesteps import Clock

Before = Callable[[tuple[Any, ...], Mapping[str, Any]], None]


@contextmanager
def before_calls(model: nn.Module, notes: Sequence[Before]) -> Iterator[None]:
    """Within it, each `note(args, kwargs)` runs before every call of the model, and outside of what
    `model.compile()` has compiled, which would trace a hook."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for note in notes:
            note(args, kwargs)

    compiled = getattr(model, "_compiled_call_impl", None)
    if compiled is None:
        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        before(model, args, kwargs)
        return compiled(*args, **kwargs)

    model._compiled_call_impl = call  # type: ignore[assignment]
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


@contextmanager
def tiling(component: str, model: nn.Module) -> Iterator[Before]:
    """A function to call before a denoiser: its strengths per image are repeated as its batch has
    the images, which pipelines concatenate for guidance: [all unconditional, all conditional]."""
    before = [(arena, arena.copies) for arena in arenas(model)]

    def note(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for arena, _ in before:
            if arena.batch is None:
                continue
            rows = leading_size(args, kwargs)
            if rows is None or rows % arena.batch:
                raise AdapterError(
                    f"{component}: expected a batch of {arena.batch} images, or of several copies "
                    f"of them, as its adapters have strengths per image, got {rows}"
                )
            if rows != arena.batch * arena.copies:
                retile([arena], rows // arena.batch, arena.copies)

    try:
        yield note
    finally:
        for arena, copies in before:
            retile([arena], copies, arena.copies)


@contextmanager
def starting(model: nn.Module, start: Mapping[str, float], scheduler: Any) -> Iterator[Before]:
    """A function to call before a denoiser, which switches adapters on when it is their turn."""
    own = {name: first for name, first in start.items() if name in known_names(model)}
    clock = Clock(scheduler)
    switch: Callable[[float], None] | None = None
    last: int | None = None

    with ExitStack() as stack:

        def note(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            nonlocal switch, last
            given = kwargs["timestep"] if "timestep" in kwargs else args[1]
            step = clock.step(given)
            if switch is None:  # only now are the timesteps of this call there
                switch = stack.enter_context(phases(model, own, clock.timesteps[step:]))
            if step != last:
                switch(clock.timesteps[step])
                last = step

        yield note


def rows_of_prompts(
    component: str, there: Strengths, factors: Mapping[str, float | Tensor]
) -> Before:
    """A function to call before a text encoder: it runs once a prompt, and so have its strengths to
    be one for all images of a prompt."""
    last: int | None = None

    def note(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal last
        prompts = leading_size(args, kwargs)
        if prompts is None or prompts == last:
            return
        rows = {name: _of_prompts(component, name, f, prompts) for name, f in factors.items()}
        there.multiply(rows)
        last = prompts

    return note


def _of_prompts(component: str, name: str, factor: float | Tensor, prompts: int) -> float | Tensor:
    if not isinstance(factor, Tensor):
        return factor
    each, rest = divmod(len(factor), prompts)
    rows = factor.view(prompts, -1) if not rest else None
    if rows is None or not bool((rows == rows[:, :1]).all()):
        raise AdapterError(
            f"scale of {name!r}: the {component} runs once a prompt, for {each} images of it, "
            f"whose strengths differ: {factor.tolist()}; give every image a prompt of its own, or "
            "prompt_embeds"
        )
    return rows[:, 0].contiguous()


def in_common(factor: float | Tensor) -> float | Tensor:
    """One number where it is the same for all images."""
    if isinstance(factor, Tensor) and bool((factor == factor[0]).all()):
        return float(factor[0])
    return factor


def leading_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many samples a model is called with: of its first argument, a tensor or a list of one
    a sample."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return len(value)
    return None
