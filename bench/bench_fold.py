"""Folding every Linear of an SD 1.5-shaped UNet, beside copying the same weights."""

from typing import Any

import pytest
import torch

from bench.shapes import linears
from fastlora import ops

RANK = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    with torch.no_grad():
        if contender != "peft":
            benchmark.pedantic(runs[contender], rounds=10, warmup_rounds=2)
            return
        layers = peft_layers(weights)
        benchmark.pedantic(
            lambda: [layer.merge() for layer in layers],
            setup=lambda: [layer.unmerge() for layer in layers if layer.merged] and None,
            rounds=4,
            warmup_rounds=1,
        )


def peft_layers(weights: list[torch.Tensor]) -> list[Any]:
    tuner = pytest.importorskip("peft.tuners.lora")
    config = pytest.importorskip("peft").LoraConfig(r=RANK)
    layers = []
    for weight in weights:
        base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        base.weight = torch.nn.Parameter(weight.clone())
        layers.append(tuner.Linear(base, "default", config, r=RANK, lora_alpha=RANK))
    return layers
