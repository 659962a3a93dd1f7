"""Folding every Linear of an SD 1.5-shaped UNet, beside copying the same weights."""

from typing import Any

import pytest
import torch

from bench.shapes import linears
from bench.timing import DEVICE, measure
from fastlora import ops

RANK = 16


@pytest.fixture(scope="module")
def model() -> list[Any]:
    torch.manual_seed(0)
    shapes = [(s["out"], s["inp"]) for s in linears() for _ in range(s["count"])]
    at = {"device": DEVICE}
    return [
        [torch.randn(s, **at) for s in shapes],
        [torch.randn(RANK, i, **at) for _, i in shapes],
        [torch.randn(o, RANK, **at) for o, _ in shapes],
        [torch.rand(RANK, **at) for _ in shapes],
        [torch.empty(s, **at) for s in shapes],
    ]


@pytest.mark.parametrize("contender", ["floor", "fastlora", "addmm", "peft"])
def test_fold(benchmark, model, contender):
    benchmark.group = (
        f"fold of {len(model[0])} layers, {sum(w.numel() for w in model[0]):,} weights"
    )
    weights, downs, ups, gates, outs = model

    def copies() -> None:
        for weight, out in zip(weights, outs, strict=True):
            out.copy_(weight)

    def addmm() -> None:
        for weight, down, up, gate, out in zip(weights, downs, ups, gates, outs, strict=True):
            torch.addmm(weight, up * gate, down, out=out)

    runs = {"floor": copies, "fastlora": lambda: ops.fold(*model), "addmm": addmm}
    size = 2 * sum(w.numel() * w.element_size() for w in weights)
    if contender != "peft":
        measure(benchmark, runs[contender], rounds=10, size=size)
        return
    layers = peft_layers(weights)

    def pristine() -> None:
        for layer in layers:
            if layer.merged:
                layer.unmerge()

    merge = lambda: [layer.merge() for layer in layers]  # noqa: E731
    measure(benchmark, merge, rounds=4, setup=pristine, size=size)


def peft_layers(weights: list[torch.Tensor]) -> list[Any]:
    tuner = pytest.importorskip("peft.tuners.lora")
    config = pytest.importorskip("peft").LoraConfig(r=RANK)
    layers = []
    for weight in weights:
        base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        base.weight = torch.nn.Parameter(weight.clone())
        layers.append(tuner.Linear(base, "default", config, r=RANK, lora_alpha=RANK))
    return layers
