"""A pipeline's call with strengths by adapter, per image, and from a timestep on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from fastlora.adapters.lookup import arenas, parts_of, unwrapped
from fastlora.adapters.specs import AdapterError
from fastlora.integrations.pipelines.requests import Factor, Request, taken
from fastlora.integrations.pipelines.strengths import Strengths
from fastlora.integrations.pipelines.watching import (
    Before,
    before_calls,
    in_common,
    rows_of_prompts,
    starting,
    tiling,
)

TEXT = "text_encoder"  # how the names of text encoders begin
IMAGES = ("vae", "vqvae", "vqgan", "movq", "image_encoder", "safety_checker")  # no denoisers


def call(base: Any, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`base.__call__`, in which the "scale" of its attention arguments may be

        0.5                                a factor on the strengths of all adapters
        {"a": 0.5, "b": [0, 1, 1]}         by adapter, a number or one an image
        {"a": 0.5, "start": {"a": 600}}    and the timestep from which down an adapter is on

    Strengths are multiplied: those that `set_adapters` or `fastlora.set_scale` have set. After the
    call they are what they were, bit for bit, also after an error. Strengths per image that
    `fastlora.set_scale` has set hold for the images, whatever guidance makes of the batch.

    Raises AdapterError, before anything is computed, for unknown names, for what is no strength,
    and where an adapter cannot have one per image.
    """
    try:
        bound = inspect.signature(base.__call__).bind(pipe, *args, **kwargs)
    except TypeError:  # which its own call says best
        return base.__call__(pipe, *args, **kwargs)
    request = taken(bound)
    parts = {name: part for name, part in parts_of(pipe).items() if name not in IMAGES}
    if request.nothing and not any(map(_per_sample, parts.values())):
        return base.__call__(*bound.args, **bound.kwargs)
    there = {name: Strengths(unwrapped(part)) for name, part in parts.items()}
    there = {name: found for name, found in there.items() if found.names}
    _check_names(request, there)
    with ExitStack() as stack:
        for component, found in there.items():
            factors = _factors(request, component, found)
            if component.startswith(TEXT):
                factors = {name: in_common(factor) for name, factor in factors.items()}
            found.check(factors)
            stack.enter_context(found.restored())
            found.multiply_plain(factors)
            notes: list[Before] = []
            if component.startswith(TEXT):
                numbers = {n: f for n, f in factors.items() if not isinstance(f, Tensor)}
                found.multiply(numbers)
                if len(numbers) < len(factors):
                    notes.append(rows_of_prompts(component, found, factors))
            else:
                found.multiply(factors)
                if any(name in found.own_names for name in request.start):
                    switching = starting(found.model, request.start, pipe.scheduler)
                    notes.append(stack.enter_context(switching))
                # After it: an adapter that has just been switched on has rows too.
                notes.append(stack.enter_context(tiling(component, found.model)))
            if notes:
                stack.enter_context(before_calls(parts[component], notes))
        return base.__call__(*bound.args, **bound.kwargs)


def _per_sample(part: nn.Module) -> bool:
    """Whether some strength is a tensor already."""
    return any(arena.per_sample for arena in arenas(unwrapped(part)))


def _factors(request: Request, component: str, found: Strengths) -> dict[str, Factor]:
    """The factors on a component's strengths, by adapter."""
    if request.everywhere == 1.0:
        return {name: f for name, f in request.factors.items() if name in found.names}
    if component.startswith("controlnet") and request.channel == "cross_attention_kwargs":
        return {}  # diffusers hands these on to the UNet alone
    return dict.fromkeys(found.names, request.everywhere)


def _check_names(request: Request, there: Mapping[str, Strengths]) -> None:
    known = sorted({name for found in there.values() for name in found.names})
    for name in request.names:
        if name not in known:
            raise AdapterError(f"no adapter named {name!r}; this pipeline has {known or 'none'}")
    for name in request.start:
        denoisers = [found for c, found in there.items() if not c.startswith(TEXT)]
        if not any(name in found.own_names for found in denoisers):
            raise AdapterError(
                f"start of {name!r}: expected an adapter of fastlora's in the denoiser; it is in "
                f"{' and '.join(c for c, found in there.items() if name in found.names)}"
            )
