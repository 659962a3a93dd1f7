"""Hooks that put a forward on a layer itself: accelerate and diffusers call the adapters, whichever
came first; others are refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from tests.adapters.oracles import assert_unchanged, randomise, same_bits, snapshot


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Conv2d(3, 4, 1), nn.Linear(8, 5))


def run(net: Any, x: Tensor) -> Tensor:
    return net[2](net[0](x))


def adapt(net: nn.Module) -> None:
    fastlora.inject(net, fastlora.LoRA(rank=2), seed=0)
    randomise(net)


def accelerates(layer: nn.Module) -> Callable[[], Any]:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    hooks.add_hook_to_module(layer, hooks.ModelHook(), append=True)  # two of them
    return lambda: hooks.remove_hook_from_module(layer)


def diffusers_own(layer: nn.Module) -> Callable[[], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the imports of others warn about
        hooks = pytest.importorskip("diffusers.hooks")

    class Passing(hooks.ModelHook):
        pass

    class Calling(hooks.ModelHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.fn_ref.original_forward(*args, **kwargs)

    registry = hooks.HookRegistry.check_if_exists_or_initialize(layer)
    registry.register_hook(Calling(), "calling")
    registry.register_hook(Passing(), "passing")
    return lambda: [registry.remove_hook(name) for name in ("passing", "calling")]


@pytest.mark.parametrize("first", ["hooks", "adapters"])
@pytest.mark.parametrize("hook", [accelerates, diffusers_own])
def test_the_adapters_are_called(hook: Any, first: str) -> None:
    net, x = model(), torch.randn(3, 6)
    plain = run(net, x).detach()
    other = copy.deepcopy(net)
    adapt(other)
    expected = run(other, x).detach()
    if first == "adapters":
        adapt(net)
    undo = [hook(layer) for layer in net]
    if first == "hooks":
        adapt(net)
    assert same_bits(run(net, x), expected)
    fastlora.remove(net, "default")
    assert same_bits(run(net, x), plain)
    adapt(net)
    for take_off in undo:
        take_off()
    assert same_bits(run(net, x), expected)
    fastlora.remove(net, "default")
    assert [type(layer) for layer in net] == [nn.Linear, nn.Conv2d, nn.Linear]
    assert same_bits(run(net, x), plain)


def test_a_forward_that_goes_past_the_class_is_refused() -> None:
    net = model()
    inner = net[0].forward
    net[0].forward = lambda x: inner(x)  # type: ignore[method-assign]
    before = snapshot(net)
    with pytest.raises(fastlora.AdapterError, match=r"0 \(Linear\): its forward was put on the ob"):
        fastlora.inject(net, fastlora.LoRA(rank=2), where=r"\d")
    assert_unchanged(net, before)
    assert fastlora.inject(net, fastlora.LoRA(rank=2)).modules == ("1", "2")
