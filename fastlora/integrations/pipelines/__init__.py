"""A pipeline of diffusers that loads adapter files exactly, and takes strengths per image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fastlora.integrations.pipelines.classes import base_of, fast_class

__all__ = ["accelerate_pipeline", "restore_pipeline"]


def accelerate_pipeline(pipeline: Any, undo: list[Callable[[], Any]]) -> str:
    """Changes the class of a pipeline; what was done. `undo` gets what puts it back."""
    name = type(pipeline).__name__
    if base_of(type(pipeline)) is not None:
        return f"{name} is fastlora's already"
    cls = fast_class(type(pipeline))
    undo.append(partial(restore_pipeline, pipeline))
    object.__setattr__(pipeline, "__class__", cls)
    return f"{name}: {' and '.join(cls.fastlora_changes)}"


def restore_pipeline(pipeline: Any) -> str:
    """Gives a pipeline back its class; what was done."""
    base, name = base_of(type(pipeline)), type(pipeline).__name__
    if base is None:
        return f"{name} is its own class"
    object.__setattr__(pipeline, "__class__", base)
    return f"{name}: diffusers' own class"
