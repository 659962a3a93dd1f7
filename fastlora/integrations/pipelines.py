"""`accelerate` and `restore`: a pipeline of diffusers with fastlora's parts in it, and without."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastlora.samplers.arguments import describe


@dataclass(frozen=True)
class Accelerated:
    """What `accelerate` and `restore` did to each scheduler of a pipeline, by its name there:
    `replaced`, the names of both classes; `left`, why it is as it was."""

    replaced: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.replaced.items()]
        lines += [f"{name}: left as it is, {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "nothing to do"


def accelerate(pipeline: Any) -> Accelerated:
    """Puts fastlora's schedulers in the place of diffusers' own, in `pipeline` itself.

    Configuration and state (timesteps, indices, levels) are kept, and so is what a saved pipeline
    says of its scheduler: diffusers' own class. Schedulers that have no counterpart or options that
    it refuses, and classes of other origin, are left as they are and named in the report, and in a
    warning where nothing was replaced. Raises TypeError for what is no pipeline, ImportError where
    diffusers is missing.
    """
    if isinstance(pipeline, nn.Module):
        from fastlora.integrations.peft import accelerate_layers

        return accelerate_layers(pipeline)  # type: ignore[return-value]
    from fastlora.integrations import diffusers as fast

    counterparts = {getattr(fast, name).replaces: getattr(fast, name) for name in fast.__all__}
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    made: dict[int, Any] = {}  # pipelines inside of others share schedulers with them
    for path, owner, name, scheduler in _schedulers(pipeline, "accelerate"):
        cls = counterparts.get(type(scheduler))
        if type(scheduler) in counterparts.values():
            left[path] = f"{type(scheduler).__name__} is fastlora's already"
            continue
        if cls is None:
            left[path] = f"{type(scheduler).__name__} has no counterpart"
            continue
        try:
            drop_in = made.get(id(scheduler)) or _counterpart(cls, scheduler)
        except ValueError as error:
            left[path] = str(error)
            continue
        made[id(scheduler)] = drop_in
        _exchange(owner, name, drop_in, cls.replaces)
        replaced[path] = f"{type(scheduler).__name__} -> {cls.__name__}"
    report = Accelerated(replaced, left)
    if not replaced and any("already" not in why for why in left.values()):
        warnings.warn(f"accelerate: nothing was replaced\n{report}", stacklevel=2)
    return report


def restore(pipeline: Any) -> Accelerated:
    """Puts back the schedulers that `accelerate` has replaced, the very objects, as they were.

    A scheduler that `accelerate` did not put there is left. Raises TypeError for what is no
    pipeline.
    """
    if isinstance(pipeline, nn.Module):
        from fastlora.integrations.peft import restore_layers

        return restore_layers(pipeline)  # type: ignore[return-value]
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    for path, owner, name, scheduler in _schedulers(pipeline, "restore"):
        original = vars(scheduler).get("original")
        if original is None:
            left[path] = f"{type(scheduler).__name__} replaces nothing"
            continue
        _exchange(owner, name, original, type(original))
        replaced[path] = f"{type(scheduler).__name__} -> {type(original).__name__}"
    return Accelerated(replaced, left)


def _schedulers(pipeline: Any, operator: str) -> list[tuple[str, Any, str, Any]]:
    """(path, owner, name, scheduler) of each in the pipeline, and in pipelines inside of it."""
    try:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
        from diffusers.schedulers.scheduling_utils import SchedulerMixin
    except ImportError as error:
        message = f'{operator} needs diffusers: pip install "fastlora[diffusers]"'
        raise ImportError(message) from error
    if isinstance(pipeline, SchedulerMixin):
        raise TypeError(
            f"{operator}: pipeline: expected a pipeline, got a scheduler,"
            f" {type(pipeline).__name__} (its counterpart in fastlora.integrations.diffusers has"
            " from_config)"
        )
    found: list[tuple[str, Any, str, Any]] = []

    def look(owner: Any, prefix: str) -> None:
        for name, part in list(getattr(owner, "__dict__", {}).items()):
            if isinstance(part, SchedulerMixin):
                found.append((prefix + name, owner, name, part))
            elif isinstance(part, DiffusionPipeline) and not prefix:
                look(part, f"{name}.")

    if not isinstance(pipeline, type):
        look(pipeline, "")
    if not found:
        got = pipeline.__name__ + " itself" if isinstance(pipeline, type) else describe(pipeline)
        raise TypeError(
            f"{operator}: pipeline: expected a diffusers pipeline with a scheduler, got {got}"
        )
    return found


def _counterpart(cls: Any, scheduler: Any) -> Any:
    """A scheduler of this class in the state of that one. Raises ValueError for options refused."""
    drop_in = cls.__new__(cls)
    for name, value in vars(scheduler).items():
        # tensors and the configuration are shared, what steps write to in place is not
        vars(drop_in)[name] = list(value) if type(value) is list else value
    drop_in.check_config()
    drop_in.original = scheduler
    return drop_in


def _exchange(owner: Any, name: str, scheduler: Any, cls: type) -> None:
    setattr(owner, name, scheduler)
    register = getattr(owner, "register_to_config", None)
    if register is not None:  # what a saved pipeline says
        register(**{name: ("diffusers", cls.__name__)})
