"""Changing the strengths of three adapters on a model with the layers of SDXL: the host's time.

The tree is that of SDXL's UNet, 743 Linear layers in their places. They are 16 wide, because a
strength does not depend on the width of its layer and the real ones would take gigabytes.
"""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from bench.timing import DEVICE

WIDTH = RANK = 16
NAMES = ("a", "b", "c")
SCALES = ((0.5, 0.7, 0.9), (0.25, 1.0, 0.3))  # in turns, so that every call has something to do
# Of every level: residual blocks, and transformer blocks in each of its attention blocks.
DOWN = ((2, ()), (2, (2, 2)), (2, (10, 10)))
MIDDLE = (2, (10,))
UP = ((3, (10, 10, 10)), (3, (2, 2, 2)), (3, ()))


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, device=DEVICE)


def named(**children: nn.Module) -> nn.Module:
    holder = nn.Module()
    for name, child in children.items():
        holder.add_module(name, child)
    return holder


def attention() -> nn.Module:
    to_out = nn.ModuleList([linear(), nn.Dropout()])
    return named(to_q=linear(), to_k=linear(), to_v=linear(), to_out=to_out)


def transformer() -> nn.Module:
    net = nn.ModuleList([named(proj=linear()), nn.Dropout(), linear()])
    norms = {f"norm{i}": nn.LayerNorm(WIDTH, device=DEVICE) for i in (1, 2, 3)}
    return named(attn1=attention(), attn2=attention(), ff=named(net=net), **norms)


def level(residuals: int, depths: tuple[int, ...]) -> nn.Module:
    attentions = [
        named(
            proj_in=linear(),
            proj_out=linear(),
            transformer_blocks=nn.ModuleList(transformer() for _ in range(depth)),
        )
        for depth in depths
    ]
    resnets = [named(time_emb_proj=linear()) for _ in range(residuals)]
    return named(attentions=nn.ModuleList(attentions), resnets=nn.ModuleList(resnets))


def sdxl() -> nn.Module:
    return named(
        time_embedding=named(linear_1=linear(), linear_2=linear()),
        add_embedding=named(linear_1=linear(), linear_2=linear()),
        down_blocks=nn.ModuleList(level(*blocks) for blocks in DOWN),
        mid_block=level(*MIDDLE),
        up_blocks=nn.ModuleList(level(*blocks) for blocks in UP),
    )


def by_fastlora() -> Callable[[], Any]:
    model = sdxl()
    for name in NAMES:
        fastlora.inject(model, fastlora.LoRA(RANK), name=name)
    turns = itertools.cycle([dict(zip(NAMES, scales, strict=True)) for scales in SCALES])
    return lambda: fastlora.set_scale(model, next(turns))


def peft_model() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = sdxl()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a second adapter
        for name in NAMES:
            targets = [n for n, m in sdxl().named_modules() if isinstance(m, nn.Linear)]
            config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
            peft.inject_adapter_in_model(config, model, adapter_name=name)
    for layer in peft_layers(model).values():
        layer.set_adapter(list(NAMES))
    return model


def peft_layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def by_peft() -> Callable[[], Any]:
    """Only the numbers, in layers that have been looked up beforehand."""
    layers = list(peft_layers(peft_model()).values())
    turns = itertools.cycle(SCALES)

    def run() -> None:
        scales = next(turns)
        for layer in layers:
            for name, scale in zip(NAMES, scales, strict=True):
                layer.set_scale(name, scale)

    return run


def by_diffusers() -> Callable[[], Any]:
    """What `set_adapters` of a diffusers pipeline does: looks for the layers, activates, scales."""
    model = peft_model()
    turns = itertools.cycle(SCALES)

    def run() -> None:
        scales = next(turns)
        for layer in peft_layers(model).values():
            layer.set_adapter(list(NAMES))
            for name, scale in zip(NAMES, scales, strict=True):
                layer.set_scale(name, scale)

    return run


CONTENDERS = {
    "fastlora": by_fastlora,
    "peft, numbers only": by_peft,
    "peft, as set_adapters": by_diffusers,
}


@pytest.mark.parametrize("contender", CONTENDERS)
def test_set_scale(benchmark, contender):
    benchmark.group = "set_scale of 3 adapters on 743 layers"
    run = CONTENDERS[contender]()
    setup = torch.cuda.synchronize if DEVICE == "cuda" else None
    with torch.no_grad():
        run()
        # No waiting for the device: what the host is busy with is what is asked for.
        benchmark.pedantic(run, setup=setup, rounds=40, warmup_rounds=4)
    benchmark.extra_info |= {"device": DEVICE, "strengths": True}
    if benchmark.stats is not None:
        benchmark.extra_info["host"] = benchmark.stats.stats.median * 1e6
