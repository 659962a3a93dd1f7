"""What a call of a pipeline asks of its adapters: the "scale" in its attention arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlora.adapters.arena import checked
from fastlora.adapters.phases import as_timestep
from fastlora.adapters.specs import AdapterError

CHANNELS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
Factor = float | Tensor


@dataclass(frozen=True)
class Request:
    """Factors on the strengths for the time of a call.

    `everywhere`: on those of all adapters. `factors`: by adapter, a number or float32 [images], on
    the CPU. `start`: by adapter, the timestep from which down it is on. `channel`: the argument in
    which this was, None without one.
    """

    everywhere: float = 1.0
    factors: Mapping[str, Factor] = field(default_factory=dict)
    start: Mapping[str, float] = field(default_factory=dict)
    channel: str | None = None

    @property
    def nothing(self) -> bool:
        return self.everywhere == 1.0 and not self.factors and not self.start

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.factors, *self.start)))

    @property
    def images(self) -> int | None:
        """How many images have a strength of their own."""
        return next((len(f) for f in self.factors.values() if isinstance(f, Tensor)), None)


def taken(bound: inspect.BoundArguments) -> Request:
    """The request in a call's arguments, which is taken out of them: diffusers would walk over the
    model before and after every step to multiply and divide its strengths.

    Raises AdapterError for values that are none.
    """
    for channel in CHANNELS:
        given = bound.arguments.get(channel)
        if isinstance(given, Mapping) and "scale" in given:
            others = {key: value for key, value in given.items() if key != "scale"}
            bound.arguments[channel] = others
            return request_of(given["scale"], channel, images_of(bound))
    return Request()


def request_of(scale: Any, channel: str | None, images: int | None) -> Request:
    """`scale` as a Request; `images`: as many are made, None where nobody knows."""
    if scale is None:
        return Request(channel=channel)
    if not isinstance(scale, Mapping):
        factor = checked("all adapters", scale)
        if isinstance(factor, Tensor):
            raise AdapterError(
                "scale: expected a number, or strengths by adapter name, {name: [one an image]}, "
                f"got a tensor {list(factor.shape)} for no adapter by name"
            )
        return Request(everywhere=factor, channel=channel)
    factors = dict(scale)
    start = factors.pop("start", {}) if isinstance(scale.get("start"), Mapping) else {}
    factors = {name: _factor(name, value, images) for name, value in factors.items()}
    sizes = {len(f) for f in factors.values() if isinstance(f, Tensor)}
    if len(sizes) > 1:
        raise AdapterError(f"scale: expected one number of images, got {sorted(sizes)}")
    start = {name: as_timestep(name, value) for name, value in start.items()}
    return Request(factors=factors, start=start, channel=channel)


def _factor(name: str, value: Any, images: int | None) -> Factor:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        try:
            value = torch.tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise AdapterError(f"scale of {name!r}: expected numbers, got {value!r}") from None
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", torch.float32)
    factor = checked(name, value)
    if isinstance(factor, Tensor) and images is not None and len(factor) != images:
        raise AdapterError(
            f"scale of {name!r}: expected one strength for each of {images} images, got "
            f"{len(factor)}"
        )
    return factor


def images_of(bound: inspect.BoundArguments) -> int | None:
    """How many images a call makes, where its arguments tell."""
    given = bound.arguments
    prompts = None
    for name in ("prompt", "prompt_embeds", "class_labels"):
        value = given.get(name)
        if value is not None:
            prompts = 1 if isinstance(value, str) else len(value)
            break
    if prompts is None:
        return None
    for name, parameter in bound.signature.parameters.items():
        if name.startswith("num_") and name.endswith("_per_prompt"):
            prompts *= given.get(name, parameter.default) or 1
    return prompts
