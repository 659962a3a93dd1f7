"""Folding every layer of an SD 1.5- or SDXL-shaped UNet, beside copying the same weights.

On a GPU in bfloat16 and with the convolutions, as matrices `[out, in · k · k]`; on the CPU the
Linear layers of SD 1.5 in float32.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from bench.shapes import NAMES, weights
from bench.timing import DEVICE, measure
from fastlora import ops

RANK = 16
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
MODELS = ["SD 1.5", "SDXL"] if DEVICE == "cuda" else ["SD 1.5"]


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Iterator[tuple[str, list[Any]]]:
    torch.manual_seed(0)
    shapes = weights(NAMES[request.param], convolutions=DEVICE == "cuda")
    at: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE}
    layers = [
        [torch.randn(s, **at) for s in shapes],
        [torch.randn(RANK, i, **at) for _, i in shapes],
        [torch.randn(o, RANK, **at) for o, _ in shapes],
        [torch.rand(RANK, device=DEVICE) for _ in shapes],
        [torch.empty(s, **at) for s in shapes],
    ]
    yield request.param, layers
    layers.clear()  # one model at a time


@pytest.mark.parametrize("contender", ["floor", "fastlora", "addmm", "peft"])
def test_fold(benchmark, model, contender):
    name, (layers, downs, ups, gates, outs) = model
    dtype = str(DTYPE).removeprefix("torch.")
    numbers = sum(w.numel() for w in layers)
    benchmark.group = f"fold {name}: {len(layers)} layers, {numbers / 1e6:,.0f} M weights {dtype}"
    benchmark.extra_info["fold"] = name

    def copies() -> None:
        for weight, out in zip(layers, outs, strict=True):
            out.copy_(weight)

    def addmm() -> None:
        for weight, down, up, gate, out in zip(layers, downs, ups, gates, outs, strict=True):
            torch.addmm(weight, up * gate.to(up.dtype), down, out=out)

    fold = lambda: ops.fold(layers, downs, ups, gates, outs)  # noqa: E731
    runs = {"floor": copies, "fastlora": fold, "addmm": addmm}
    size = 2 * sum(w.nbytes for w in layers)
    if contender != "peft":
        size += sum(f.nbytes for f in downs + ups) if contender == "fastlora" else 0
        measure(benchmark, runs[contender], rounds=10, size=size)
        return
    wrapped = peft_layers(layers)

    def pristine() -> None:
        for layer in wrapped:
            if layer.merged:
                layer.unmerge()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    merge = lambda: [layer.merge() for layer in wrapped]  # noqa: E731
    measure(benchmark, merge, rounds=4, setup=pristine, size=size)


def peft_layers(matrices: list[torch.Tensor]) -> list[Any]:
    peft = pytest.importorskip("peft")
    holder = nn.Module()
    for i, weight in enumerate(matrices):
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(weight.clone(), requires_grad=False)
        holder.add_module(f"layer{i}", base)
    targets = [name for name, _ in holder.named_children()]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    peft.inject_adapter_in_model(config, holder, adapter_name="default")
    return [layer.to(weight.dtype) for layer, weight in zip(holder.children(), matrices,
                                                            strict=True)]  # fmt: skip
