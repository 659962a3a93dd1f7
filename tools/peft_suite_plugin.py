"""The pytest plugin of peft_suite.py: picks the LoRA cases, accelerates, counts forwards.

Every model is accelerated right after PEFT has put LoRA layers into it for the first time. All ways
there (get_peft_model, from_pretrained, add_weighted_adapter, inject_adapter_in_model) go through
`BaseTuner.inject_adapter`. Layers that PEFT puts into the same model later are left to fastlora.
"""

from __future__ import annotations

import functools
import inspect
import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner

import fastlora


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("peft_suite")
    group.addoption("--suite-kind", choices=("plain", "fast"), default="plain")
    group.addoption("--suite-result", type=Path, required=True)
    group.addoption(
        "--suite-part", type=int, nargs=2, default=(0, 1), help="which part, of how many"
    )


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(Suite(config.option))


class Suite:
    """What became of each test, and the forwards of LoRA layers in it."""

    def __init__(self, options: Any) -> None:
        self.part, self.parts = options.suite_part
        self.result: Path = options.suite_result
        self.tests: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.forwards: dict[str, dict[str, int]] = {}
        self.layers: Counter[str] = Counter()
        self.watch = Watch(accelerate=options.suite_kind == "fast")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        chosen = [item for item in items if concerns_lora(item)][self.part :: self.parts]
        config.hook.pytest_deselected(items=[i for i in items if i not in set(chosen)])
        items[:] = chosen

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        torch.manual_seed(0)  # some tests fail with one in twenty seeds, accelerated or not

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.keep(report)
        if report.when == "teardown":
            self.forwards[report.nodeid] = dict(self.watch.counts)
            self.watch.counts.clear()

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported is a failure too."""
        if report.outcome == "failed":
            self.keep(report)

    def keep(self, report: Any) -> None:
        self.tests[report.nodeid] = report.outcome
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            place = f"{Path(crash.path).name}:{crash.lineno}: " if crash else ""
            error = crash.message if crash else str(report.longrepr).strip().splitlines()[-1]
            self.errors[report.nodeid] = place + error

    def pytest_sessionfinish(self) -> None:
        kept = {"tests": self.tests, "errors": self.errors, "forwards": self.forwards}
        kept |= {"layers": self.watch.layers, "version": peft.__version__}
        self.result.write_text(json.dumps(kept))


def concerns_lora(item: Any) -> bool:
    """Whether a test's parameters name a LoraConfig, or no configuration at all."""
    callspec = getattr(item, "callspec", None)
    kinds = set(configurations(callspec.params)) if callspec else set()
    return not kinds or any(issubclass(kind, peft.LoraConfig) for kind in kinds)


def configurations(value: Any) -> list[type]:
    """The classes of PEFT's configurations in a parameter: classes, objects, or lists of them."""
    if isinstance(value, dict):
        return configurations(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [kind for part in value for kind in configurations(part)]
    kind = value if inspect.isclass(value) else type(value)
    return [kind] if issubclass(kind, peft.PeftConfig) else []


class Watch:
    """Accelerates models and counts what their LoRA layers do.

    `counts`, since it was last cleared: "layers" found after injections; "accelerated" layers'
    forwards; those of them that called PEFT's own with adapters merged or disabled ("base"), and
    else ("fallbacks"); forwards of "plain" layers. `layers`: how many of each class were found,
    accelerated or not. Compiled calls are not counted.
    """

    def __init__(self, accelerate: bool) -> None:
        self.counts: Counter[str] = Counter()
        self.layers: Counter[str] = Counter()
        self.accelerates = accelerate
        self.accelerated: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self.counting: set[type] = set()
        for kind in vars(lora.layer).values():
            if inspect.isclass(kind) and issubclass(kind, LoraLayer):
                self.count_forward(kind)
        if accelerate:
            fastlora.accelerate(torch.nn.Module())  # follows injections too, and has to come first
        self.follow_injections()

    def follow_injections(self) -> None:
        inject = BaseTuner.inject_adapter

        @functools.wraps(inject)
        def injecting(tuner: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
            inject(tuner, model, *args, **kwargs)
            self.injected(model)

        setattr(BaseTuner, "inject_adapter", injecting)  # noqa: B010

    def injected(self, model: torch.nn.Module) -> None:
        if not any(isinstance(module, LoraLayer) for module in model.modules()):
            return
        if self.accelerates and model not in self.accelerated:
            fastlora.accelerate(model)
            self.accelerated.add(model)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                self.counts["layers"] += 1
                self.layers[f"{'accelerated ' * is_fast(module)}{type(module).__name__}"] += 1
                self.count_forward(type(module))

    def count_forward(self, kind: type) -> None:
        """Replaces the forward of the class that `kind` has it from, once."""
        owner = next((k for k in kind.__mro__ if "forward" in vars(k)), torch.nn.Module)
        if owner in self.counting or owner is torch.nn.Module:
            return
        self.counting.add(owner)
        forward = vars(owner)["forward"]
        ours = forward.__module__.startswith("fastlora")

        @functools.wraps(forward)
        def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.counts["accelerated" if ours else peft_forward(layer)] += 1
            return forward(layer, *args, **kwargs)

        owner.forward = counted


def peft_forward(layer: Any) -> str:
    """What a call of PEFT's own forward counts as."""
    if not is_fast(layer):
        return "plain"
    return "base" if layer.merged or layer.disable_adapters else "fallbacks"


def is_fast(layer: torch.nn.Module) -> bool:
    return type(layer).forward.__module__.startswith("fastlora")
