"""What is timed for `lora_linear`: ways to compute one layer with its adapters, no gradients.

Every contender is given the same weights and the same input and returns the same result
(tests/test_bench_contenders.py). All strengths are 1, so that a peer may leave them out.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora import ops
from fastlora.ops import _routes
from fastlora.ops._device import kernels_of

# The rank of the comparison, and the ranks of the adapters that it is made of.
RANKS = {16: (16,), 64: (64,), 128: (16,) * 8}
# What the layer does by itself, and each way to compute it by force.
FORMS = {"products": None, "tiled": 0, "extended": 1, "appended": 2}
TILED_WORK = 1 << 25  # without tensor cores, more than so many multiplications are no contest
APPENDED_RANK = 32

Run = Callable[[], Tensor]


@dataclass
class Case:
    """One layer and its adapters."""

    layer: nn.Linear
    downs: list[Tensor]  # each [r, in]
    ups: list[Tensor]  # each [out, r]

    @property
    def rank(self) -> int:
        return sum(len(down) for down in self.downs)


def case(
    features: int,
    out: int,
    ranks: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    at: dict[str, Any] = {"dtype": dtype, "device": device}
    layer = nn.Linear(features, out, **at).requires_grad_(False)
    downs = [torch.randn(r, features, **at) / features**0.5 for r in ranks]
    return Case(layer, downs, [torch.randn(out, r, **at) for r in ranks])


def floor(c: Case, x: Tensor) -> Run:
    """The plain layer."""
    weight, bias = c.layer.weight, c.layer.bias
    return lambda: F.linear(x, weight, bias)


def addmm(c: Case, x: Tensor) -> Run:
    """The shortest expression of torch, factors concatenated beforehand."""
    weight, bias = c.layer.weight, c.layer.bias
    down, up = torch.cat(c.downs), torch.cat(c.ups, 1)
    return lambda: F.linear(x, weight, bias).addmm_(x @ down.t(), up.t())


def sharing(layer: nn.Linear) -> nn.Linear:
    """A layer with the same parameters: what is timed beside the floor reads the floor's memory."""
    twin = nn.Linear(layer.in_features, layer.out_features, device="meta")
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin


def adapted(c: Case, x: Tensor) -> Run:
    """The layer as a service has it: adapters in a reserve, computed as its plan chooses."""
    layer = sharing(c.layer)
    fastlora.reserve(layer, c.rank)
    for i, (down, up) in enumerate(zip(c.downs, c.ups, strict=True)):
        fastlora.inject(layer, fastlora.LoRA(len(down)), name=f"a{i}")
        with torch.no_grad():
            for parameter, value in zip(fastlora.parameters(layer, f"a{i}"), (down, up),
                                        strict=True):  # fmt: skip
                parameter.copy_(value)
    layer.eval()
    return lambda: layer(x)


def operator(c: Case, x: Tensor) -> Run:
    """The operator by itself, factors concatenated beforehand; `forced` picks its form."""
    weight, bias = c.layer.weight, c.layer.bias
    down, up = torch.cat(c.downs), torch.cat(c.ups, 1)
    gate = torch.ones(c.rank, device=x.device)
    call = ops.lora_linear.eager
    return lambda: call(x, weight, bias, down, up, gate, None)


def peft(c: Case, x: Tensor) -> Run:
    layer = peft_layer(c)
    return lambda: layer(x)


def accelerated(c: Case, x: Tensor) -> Run:
    """PEFT's layer after `fastlora.accelerate`."""
    layer = peft_layer(c)
    fastlora.accelerate(nn.ModuleList([layer]))
    return lambda: layer(x)


def compiled(c: Case, x: Tensor) -> Run:
    """PEFT's layer under torch.compile. Layers of one shape share their compiled code."""
    layer = peft_layer(c)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            layer = torch.compile(layer, dynamic=False)
            torch._dynamo.config.recompile_limit = 1000  # every shape is one
            layer(x)
        except Exception as error:  # it needs a compiler and headers, and who knows what
            pytest.skip(f"torch.compile: {str(error).strip().splitlines()[0][:100]}")
    return lambda: layer(x)


def peft_layer(c: Case) -> Any:
    peft = pytest.importorskip("peft")
    holder = nn.Module()
    holder.add_module("linear", sharing(c.layer))
    names = [f"a{i}" for i in range(len(c.downs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a second adapter
        for name, down in zip(names, c.downs, strict=True):
            config = peft.LoraConfig(
                r=len(down), lora_alpha=len(down), lora_dropout=0.0, target_modules=["linear"]
            )
            peft.inject_adapter_in_model(config, holder, adapter_name=name)
    layer: Any = holder.linear
    layer.set_adapter(names)
    for name, down, up in zip(names, c.downs, c.ups, strict=True):
        layer.lora_A[name].weight = nn.Parameter(down, requires_grad=False)
        layer.lora_B[name].weight = nn.Parameter(up, requires_grad=False)
    return layer.requires_grad_(False).eval()


CONTENDERS: dict[str, Callable[[Case, Tensor], Run]] = {
    "floor": floor,
    "fastlora": adapted,
    **dict.fromkeys(FORMS, operator),
    "addmm": addmm,
    "peft": peft,
    "accelerated": accelerated,
    "peft + compile": compiled,
}


def wanted(name: str, tokens: int, features: int, out: int, rank: int, gpu: bool) -> bool:
    """Whether a contender takes part."""
    if name in ("floor", "fastlora", "addmm", "peft", "accelerated"):
        return True
    if not gpu:
        return False
    if name == "tiled":
        return tokens * (features * out + rank * (features + out)) <= TILED_WORK
    if name == "appended":
        return rank <= APPENDED_RANK
    return name != "peft + compile" or rank == 16  # compiling every shape takes minutes


def gemm(x: Tensor, weight: Tensor, y: Tensor) -> Run:
    """`y = x Wᵀ` by the main loop that the forms share (csrc/gemm_sm80.cuh), without adapters."""
    down, up = x.new_empty(0, x.shape[1]), x.new_empty(len(weight), 0)
    gate = torch.empty(0, device=x.device)
    entry = kernels_of(x).lora_linear

    def run() -> Tensor:
        entry(y, x, weight, None, down, up, gate, None, None, FORMS["extended"])
        return y

    return run


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Within it `lora_linear` has one form on a GPU, whatever the cost model says."""
    if name not in FORMS:
        yield
        return
    ops.lora_linear.clear()
    try:
        with _routes.forced(name):
            yield
    finally:
        ops.lora_linear.clear()
