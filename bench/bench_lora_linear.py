"""`lora_linear` unmerged beside the plain layer, torch's own expression and PEFT; no gradients."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastlora
from bench.shapes import linears
from bench.timing import DEVICE, DTYPES, measure

RANK = 16
CASES = [pytest.param(s, id=f"{s['tokens']}x{s['inp']}x{s['out']}") for s in linears()]


def peft_layer(layer: torch.nn.Linear, rank: int) -> torch.nn.Module:
    tuner = pytest.importorskip("peft.tuners.lora")
    config = pytest.importorskip("peft").LoraConfig(r=rank, lora_alpha=rank)
    wrapped = tuner.Linear(copy.deepcopy(layer), "default", config, r=rank, lora_alpha=rank)
    return wrapped.eval()


def function(
    layer: torch.nn.Linear, x: torch.Tensor, contender: str, rank: int
) -> Callable[[], Any]:
    weight, bias = layer.weight, layer.bias
    at = {"device": DEVICE, "dtype": weight.dtype}
    down = torch.randn(rank, layer.in_features, **at)
    up = torch.randn(layer.out_features, rank, **at)
    if contender == "floor":
        return lambda: F.linear(x, weight, bias)
    if contender == "addmm":
        return lambda: F.linear(x, weight, bias).addmm_(x @ down.t(), up.t())
    if contender == "peft":
        wrapped = peft_layer(layer, rank)
        return lambda: wrapped(x)
    adapted = copy.deepcopy(layer)
    fastlora.inject(adapted, fastlora.LoRA(rank))
    with torch.no_grad():
        fastlora.parameters(adapted)[1].copy_(up)
    return lambda: adapted(x)


@pytest.mark.parametrize("contender", ["floor", "fastlora", "addmm", "peft"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", CASES)
def test_lora_linear(benchmark, shape, dtype, contender):
    """Through the adapted layer. The floor is F.linear on the same shape."""
    tokens, features, out = shape["tokens"], shape["inp"], shape["out"]
    low = "" if dtype == torch.float32 else " " + str(dtype).removeprefix("torch.")
    benchmark.group = f"lora_linear {tokens}x{features}x{out} r={RANK}{low}"
    benchmark.extra_info["count"] = shape["count"]
    torch.manual_seed(0)
    layer = torch.nn.Linear(features, out, device=DEVICE, dtype=dtype)
    x = torch.randn(tokens, features, device=DEVICE, dtype=dtype)
    run = function(layer, x, contender, RANK)
    work = tokens * features * out
    iterations = max(1, int(2e8 / max(work, 1e6)))
    size = (tokens * (features + out) + features * out) * dtype.itemsize
    measure(benchmark, run, rounds=12, iterations=iterations, size=size, work=2 * work)


@pytest.mark.parametrize("contender", ["linear", "fastlora", "peft"])
def test_tiny_call(benchmark, contender):
    """8x8 through modules: what a call costs when there is nothing to compute."""
    benchmark.group = "lora_linear tiny call 8x8 r=4"
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 8, device=DEVICE), torch.randn(8, 8, device=DEVICE)
    run = (lambda: layer(x)) if contender == "linear" else function(layer, x, contender, 4)
    measure(benchmark, run, rounds=60, iterations=2000 if DEVICE == "cpu" else 20)
