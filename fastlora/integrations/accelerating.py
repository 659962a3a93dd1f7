"""`accelerate` and `restore`: what a user has running, with fastlora's parts in it, and without."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from fastlora.adapters.lookup import parts_of
from fastlora.integrations.versions import warn_untested
from fastlora.samplers.arguments import describe

Undo = list[Callable[[], Any]]


@dataclass(frozen=True)
class Accelerated:
    """What `accelerate` or `restore` did. `str(report)` says it in lines.

    `replaced`: what is another object now, by its name in the pipeline (schedulers), and the names
    of both classes; `layers`: the paths of PEFT's layers that were changed, by component ("": the
    model itself); `pipeline`: what became of the pipeline itself, "" for what is none; `left`: what
    is as it was, and why, by name or path.
    """

    replaced: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pipeline: str = ""
    undone: bool = False  # by `restore`

    def __str__(self) -> str:
        lines = [f"{name}: {what}" for name, what in self.replaced.items()]
        for component, paths in self.layers.items():
            if paths:
                which = f"{component}: " if component else ""
                lines.append(f"{which}{counted(len(paths), self.undone)}")
        lines += [f"pipeline: {self.pipeline}"] * bool(self.pipeline)
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name or "the model")
        for why, names in reasons.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            verb = "are as they were" if len(names) > 1 else "is as it was"
            lines.append(f"{', '.join(names[:3])}{more} {verb}: {why}")
        return "\n".join(lines) or "nothing to do"


def counted(layers: int, undone: bool) -> str:
    if layers == 1:
        return f"1 layer of PEFT's {'is its own again' if undone else 'computes fused'}"
    return f"{layers} layers of PEFT's {'are its own again' if undone else 'compute fused'}"


def accelerate(target: Any) -> Accelerated:
    """Puts fastlora's parts into what is there, in place.

    `target`: a pipeline of diffusers, a module (of diffusers, transformers, or a PeftModel), or a
    dict of modules by component. Live LoRA layers of PEFT compute with fastlora's operators. A
    pipeline also gets fastlora's schedulers where they have a counterpart, loads adapter files
    exactly, and takes strengths per image in its calls (docs/diffusers.md). Everything that others
    read stays: module and layer objects, classes' names, configurations, state dicts.

    What cannot be accelerated is left as it is and named in the report: schedulers without a
    counterpart (with a warning where none was replaced), models with adapters of PEFT that are no
    LoRA. Versions of the host libraries that fastlora is not tested with are warned of, once. Twice
    is harmless. Where anything raises, everything is put back first.

    Raises TypeError for another `target`, ImportError where diffusers would be needed.
    """
    _check_target(target, "accelerate")
    warn_untested()
    undo: Undo = []
    try:
        report = _accelerate(target, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    schedulers = [why for name, why in report.left.items() if name.endswith("scheduler")]
    if not report.replaced and any("already" not in why for why in schedulers):
        warnings.warn(f"accelerate: no scheduler was replaced\n{report}", stacklevel=2)
    return report


def restore(target: Any) -> Accelerated:
    """Undoes `accelerate`: the schedulers and classes that were there, the very objects.

    What `accelerate` did not put there is left. Raises TypeError and ImportError as it does.
    """
    _check_target(target, "restore")
    replaced, left, pipeline = {}, {}, ""
    if _is_pipeline(target):
        from fastlora.integrations.pipelines import restore_pipeline
        from fastlora.integrations.schedulers import restore_schedulers

        replaced, left = restore_schedulers(target)
        pipeline = restore_pipeline(target)
    peft = _peft_layers()
    models = _models(target).items() if peft else ()
    layers = {component: peft.restore_layers(model) for component, model in models}
    return Accelerated(replaced, left, layers, pipeline, undone=True)


def _accelerate(target: Any, undo: Undo) -> Accelerated:
    layers: dict[str, Sequence[str]] = {}
    replaced: dict[str, str] = {}
    left: dict[str, str] = {}
    pipeline = ""
    peft = _peft_layers()
    for component, model in _models(target).items() if peft else ():
        if not peft.is_accelerated(model):
            undo.append(partial(peft.restore_layers, model))
        layers[component], others = peft.accelerate_layers(model)
        left |= {".".join(filter(None, (component, path))): why for path, why in others.items()}
    if _is_pipeline(target):
        from fastlora.integrations.pipelines import accelerate_pipeline
        from fastlora.integrations.schedulers import accelerate_schedulers

        replaced, others = accelerate_schedulers(target, undo)
        left |= others
        pipeline = accelerate_pipeline(target, undo)
    return Accelerated(replaced, left, layers, pipeline)


def _peft_layers() -> Any:
    """The module about PEFT's layers; None where there can be no such layers."""
    if sys.modules.get("peft") is None:
        return None
    from fastlora.integrations import peft

    return peft


def _models(target: Any) -> dict[str, nn.Module]:
    """The modules of a target by component; a module alone has the name ""."""
    return {"": target} if isinstance(target, nn.Module) else parts_of(target)


def _is_pipeline(target: Any) -> bool:
    return not isinstance(target, nn.Module | Mapping)


def _check_target(target: Any, operator: str) -> None:
    if isinstance(target, nn.Module):
        return
    if isinstance(target, Mapping):
        if target and all(isinstance(part, nn.Module) for part in target.values()):
            return
        got = ", ".join(f"{name!r}: {type(part).__name__}" for name, part in target.items())
        raise TypeError(f"{operator}: target: expected modules by component, got {{{got}}}")
    try:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
        from diffusers.schedulers.scheduling_utils import SchedulerMixin
    except ImportError as error:
        message = f'{operator} needs diffusers: pip install "fastlora[diffusers]"'
        raise ImportError(message) from error
    if isinstance(target, SchedulerMixin):
        raise TypeError(
            f"{operator}: target: expected a pipeline or modules, got a scheduler,"
            f" {type(target).__name__} (its counterpart in fastlora.integrations.diffusers has"
            " from_config)"
        )
    if not isinstance(target, DiffusionPipeline):
        got = target.__name__ + " itself" if isinstance(target, type) else describe(target)
        raise TypeError(
            f"{operator}: target: expected a diffusers pipeline, a module, or modules by"
            f" component, got {got}"
        )
