"""`spectral_linear`, a layer with shifted singular values in the activation domain, for few tokens.

Layers of SD 1.5 by themselves: forward, and forward and backward with the gradients of x and of the
shift. Factors are random: what they decompose does not change the time.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_spectral import DTYPE, SINGLE, random_layers
from bench.timing import DEVICE, Function, Turns, copies_for, replay, take_turns
from fastlora import ops

TOKENS = (1, 8, 77)
NAME = str(DTYPE).removeprefix("torch.")
SECONDS = 1.0  # of a layer's contenders together: there are many layers

Arguments = tuple[Tensor, ...]  # of `spectral_linear`
X, SHIFT = 0, 6  # the places of what has a gradient


def arguments(
    tokens: int, shapes: list[tuple[int, int]], dtype: torch.dtype = DTYPE
) -> list[Arguments]:
    """Of each of some layers `(out, in)`."""
    layers = random_layers(shapes, dtype)
    at: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
    found = []
    for weight, *factors, _ in zip(*layers.lists(), strict=True):
        out, features = weight.shape
        found.append(
            (torch.randn(tokens, features, **at), weight, torch.randn(out, **at), *factors)
        )
    return found


# --- contenders -----------------------------------------------------------------------------------


def by_weight(x: Tensor, weight: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
    return F.linear(x, ops.spectral_weight(weight, *factors), bias)


def by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    shift: Tensor,
    strength: Tensor,
) -> Tensor:
    c = torch.maximum(strength * shift, -s)
    return F.linear(x, weight, bias) + F.linear((F.linear(x, vh) * c).to(x.dtype), u)


LAYERS: dict[str, Callable[..., Tensor]] = {
    "fastlora": ops.spectral_linear, "W' then linear": by_weight, "torch": by_torch
}  # fmt: skip


def forward(args: Arguments) -> dict[str, Function]:
    """The floor is the library's products alone."""
    x, weight, bias, u, _, vh, *_ = args

    def products() -> tuple[Tensor, Tensor]:
        return F.linear(x, weight, bias), F.linear(F.linear(x, vh), u)

    runs = {name: functools.partial(layer, *args) for name, layer in LAYERS.items()}
    return {"floor": products, **runs}


def gradient_of_y(x: Tensor, weight: Tensor) -> Tensor:
    shape = (len(x), len(weight))
    return torch.linspace(-1, 1, shape[0] * shape[1]).view(shape).to(x)


def forward_and_backward(args: Arguments) -> dict[str, Function]:
    """Gradients of x and of the shift. The floor is the library's products alone, of which
    x V serves both passes."""
    x, weight, _, u, _, vh, *_ = args
    dy = gradient_of_y(x, weight)
    trained = [t.clone().requires_grad_() if i in (X, SHIFT) else t for i, t in enumerate(args)]
    products_of_y = forward(args)["floor"]

    def products() -> tuple[Any, Tensor, Tensor]:
        return products_of_y(), dy @ weight, (dy @ u) @ vh

    def gradients(layer: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(layer(*trained), (trained[X], trained[SHIFT]), dy)

    runs = {name: functools.partial(gradients, layer) for name, layer in LAYERS.items()}
    return {"floor": products, **runs}


PASSES = {"forward": forward, "forward and backward": forward_and_backward}


# --- benchmark ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # contenders of one layer follow one another
def turns(tokens: int, shape: tuple[int, int], passes: str) -> dict[str, Turns]:
    copies = copies_for(shape[0] * shape[1] * DTYPE.itemsize)
    layers = [PASSES[passes](args) for args in arguments(tokens, [shape] * copies)]
    return take_turns({name: [runs[name] for runs in layers] for name in layers[0]}, SECONDS)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("contender", ["floor", *LAYERS])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SINGLE, ids=lambda shape: "x".join(map(str, shape)))
def test_spectral_linear(benchmark, shape, tokens, passes, contender):
    out, features = shape
    benchmark.group = f"spectral_linear {tokens}x{features}x{out} {passes} {NAME}"
    entries = out * features + min(shape) * (out + features)  # of W, U and V
    benchmark.extra_info |= {
        "bytes": entries * DTYPE.itemsize,
        "operations": 2 * tokens * entries * (1 if passes == "forward" else 2),
        "dtype": NAME,
    }
    replay.show(benchmark, turns(tokens, shape, passes)[contender])
