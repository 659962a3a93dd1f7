"""Which way a layer computes under spectral shifts, and shifts beside low-rank parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters import changed_weight, layers
from tests.adapters.oracles import adapted_weight, randomise, spectral_weight, with_weight

FEW, MANY = 2, 64


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that were taken: activations, or W' made."""
    taken: list[str] = []

    def spy(module: Any, name: str) -> None:
        real = getattr(module, name)

        def called(*args: Any) -> Any:
            taken.append(name)
            return real(*args)

        monkeypatch.setattr(module, name, called)

    spy(layers, "spectral_linear")
    spy(changed_weight, "changed_weight")
    return taken


def shifted(*specs: Any, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(12, 9, bias=bias, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    for i, spec in enumerate((fastlora.Spectral(), *specs)):
        fastlora.inject(layer, spec, name="sabc"[i])
    randomise(layer)
    return layer, plain


def tokens(count: int) -> Tensor:
    return torch.randn(count, 12, dtype=torch.float64)


def test_few_tokens_are_computed_in_activations(calls: list[str]) -> None:
    layer, plain = shifted()
    for count, way in ((FEW, "spectral_linear"), (MANY, "changed_weight")):
        x = tokens(count)
        exact = with_weight(plain, spectral_weight(plain, layer.fastlora["s"].shift, 1.0), x)
        torch.testing.assert_close(layer(x).detach(), exact)
        assert calls == [way]
        calls.clear()


def test_steady_blocks_make_the_weight_once(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every device: values, which wait for an accelerator, are not compared."""
    layer, plain = shifted()
    monkeypatch.setattr(type(layer), "cached", lambda *_: pytest.fail("compares values"))

    def check(scale: float) -> None:
        for count in (FEW, MANY, FEW):
            x = tokens(count)
            weight = spectral_weight(plain, layer.fastlora["s"].shift, scale)
            torch.testing.assert_close(layer(x), with_weight(plain, weight, x))

    with torch.no_grad(), fastlora.steady(layer):
        check(1.0)
        assert calls == ["changed_weight"]
        fastlora.set_scale(layer, {"s": -0.5})
        check(-0.5)
        assert len(calls) == 2
        with torch.inference_mode():
            fastlora.set_scale(layer, {"s": 2.0})
        check(2.0)
        assert len(calls) == 3
    assert layer._state.kept == ({}, {})


SPECS = {
    "lora": [fastlora.LoRA(rank=3, alpha=2)],
    "two": [fastlora.LoRA(rank=3), fastlora.LoRA(rank=2)],
    "dora": [fastlora.LoRA(rank=3, dora=True)],
    "dora and lora": [fastlora.LoRA(rank=3, dora=True), fastlora.LoRA(rank=2)],
}


@pytest.mark.parametrize("when", ["forward", "step"])
@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_spectral_first_then_low_rank(specs: list[Any], count: int, when: Any) -> None:
    layer, plain = shifted(*specs)
    strengths = {"s": 0.75, "a": -0.5, "b": 2.0}
    fastlora.set_scale(layer, {n: s for n, s in strengths.items() if n in layer.fastlora})
    changed = copy.deepcopy(plain)
    with torch.no_grad():
        changed.weight.copy_(spectral_weight(plain, layer.fastlora["s"].shift, 0.75))
    slots = [(s, strengths[n] * s.ratio) for n, s in layer.fastlora.items() if n != "s"]
    x = tokens(count)
    exact = with_weight(plain, adapted_weight(changed, slots), x)
    with fastlora.materialize(layer, when):
        torch.testing.assert_close(layer(x).detach(), exact)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), exact)
        shift = layer.fastlora["s"].shift
        probe = torch.randn(count, 9, dtype=torch.float64)
        (grad,) = torch.autograd.grad((layer(x) * probe).sum(), shift)
        if any(spec.dora for spec in specs):
            return  # its norm has no gradient, so differences are no measure
        for i in range(len(shift)):
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    shift[i] += step
                values.append((layer(x) * probe).sum().detach())
                with torch.no_grad():
                    shift[i] -= step
            torch.testing.assert_close(
                grad[i], (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-6
            )
    fastlora.fold(layer)
    torch.testing.assert_close(layer(x), exact)


def test_convolutions_keep_to_the_weight(calls: list[str]) -> None:
    layer = nn.Conv2d(6, 6, 1)
    fastlora.inject(layer, fastlora.Spectral())
    layer(torch.randn(1, 6, 1, 1))
    assert calls == ["changed_weight"]
