"""The schedulers of a pipeline exchanged for fastlora's, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Done = tuple[dict[str, str], dict[str, str]]  # what was replaced, and what was left and why


def accelerate_schedulers(pipeline: Any, undo: list[Callable[[], None]]) -> Done:
    """Puts fastlora's schedulers in the place of diffusers' own; `undo` gets what puts each back.

    Configuration and state (timesteps, indices, levels) are kept, and so is what a saved pipeline
    says of its scheduler: diffusers' own class. Schedulers that have no counterpart or options that
    it refuses, and classes of other origin, are left as they are.
    """
    from fastlora.integrations import diffusers as fast

    counterparts = {getattr(fast, name).replaces: getattr(fast, name) for name in fast.__all__}
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    made: dict[int, Any] = {}  # pipelines inside of others share schedulers with them
    for path, owner, name, scheduler in _schedulers(pipeline):
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
        undo.append(lambda at=(owner, name, scheduler, cls.replaces): _exchange(*at))
        _exchange(owner, name, drop_in, cls.replaces)
        replaced[path] = f"{type(scheduler).__name__} -> {cls.__name__}"
    return replaced, left


def restore_schedulers(pipeline: Any) -> Done:
    """Puts back the schedulers that `accelerate_schedulers` has replaced, the very objects, as they
    were. Those that it did not put there are left."""
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    for path, owner, name, scheduler in _schedulers(pipeline):
        original = vars(scheduler).get("original")
        if original is None:
            left[path] = f"{type(scheduler).__name__} replaces nothing"
            continue
        _exchange(owner, name, original, type(original))
        replaced[path] = f"{type(scheduler).__name__} -> {type(original).__name__}"
    return replaced, left


def _schedulers(pipeline: Any) -> list[tuple[str, Any, str, Any]]:
    """(path, owner, name, scheduler) of each in the pipeline, and in pipelines inside of it."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    found: list[tuple[str, Any, str, Any]] = []

    def look(owner: Any, prefix: str) -> None:
        for name, part in list(vars(owner).items()):
            if isinstance(part, SchedulerMixin):
                found.append((prefix + name, owner, name, part))
            elif isinstance(part, DiffusionPipeline) and not prefix:
                look(part, f"{name}.")

    look(pipeline, "")
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
