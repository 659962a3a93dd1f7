"""Weights with shifted singular values, and the gradients of the shifts.

Single layers, and every layer of an SD 1.5-shaped UNet in one call: on a GPU in bfloat16 with the
convolutions, as matrices `[out, in · k · k]`; on the CPU some Linear layers in float32. Factors are
random: what they decompose does not change the time.
"""

import functools
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.shapes import MODELS, weights
from bench.timing import DEVICE, Function, Turns, replay, take_turns
from fastlora import ops

SINGLE = [(320, 320), (640, 2560), (1280, 1280)]
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
FEW = 1 << 28  # multiplications of a layer that a CPU does in passing


@dataclass
class Layers:
    """The arguments of `spectral_weights`."""

    weights: list[Tensor]
    us: list[Tensor]
    ss: list[Tensor]
    vhs: list[Tensor]
    shifts: list[Tensor]
    strengths: list[Tensor]
    outs: list[Tensor]

    def lists(self) -> list[list[Tensor]]:
        return [getattr(self, field.name) for field in fields(self)]

    def operations(self) -> int:
        return sum(2 * u.numel() * w.shape[1] for u, w in zip(self.us, self.weights, strict=True))


def random_layers(shapes: list[tuple[int, int]], dtype: torch.dtype) -> Layers:
    torch.manual_seed(0)
    at: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
    ranks = [min(shape) for shape in shapes]
    return Layers(
        [torch.randn(shape, **at) for shape in shapes],
        [torch.randn(o, r, **at) for (o, _), r in zip(shapes, ranks, strict=True)],
        [torch.rand(r, device=DEVICE) + 0.1 for r in ranks],
        [torch.randn(r, i, **at) for (_, i), r in zip(shapes, ranks, strict=True)],
        [torch.randn(r, device=DEVICE) / 8 for r in ranks],
        [torch.tensor(0.5, device=DEVICE) for _ in ranks],
        [torch.empty(shape, **at) for shape in shapes],
    )


# --- contenders -----------------------------------------------------------------------------------


def reconstructions(layers: Layers) -> dict[str, Function]:
    """Ways to write W' into `outs`; the literal one, of the reference repositories, has no W. The
    floor is the library's products alone."""
    every = list(zip(*layers.lists(), strict=True))

    def products() -> None:
        for weight, u, _, vh, _, _, out in every:
            torch.addmm(weight, u, vh, out=out)

    def addmm() -> None:
        for weight, u, s, vh, shift, strength, out in every:
            c = torch.maximum(strength * shift, -s)
            torch.addmm(weight, (u * c).to(u.dtype), vh, out=out)

    def literal() -> None:
        for _, u, s, vh, shift, strength, out in every:
            sigma = (s + strength * shift).relu().to(u.dtype)
            torch.mm(u @ torch.diag(sigma), vh, out=out)

    fastlora = functools.partial(ops.spectral_weights, *layers.lists())
    return {
        "floor": products, "fastlora": fastlora, "addmm": addmm, "u @ diag(s) @ vh": literal
    }  # fmt: skip


def gradients(layers: Layers) -> dict[str, Function]:
    """Ways to the gradients of the singular values, W taken for G. The floor is the library's
    products alone, which store G V."""
    every = list(zip(layers.weights, layers.us, layers.vhs, strict=True))
    return {
        "floor": lambda: [grad @ vh.t() for grad, _, vh in every],
        "fastlora": lambda: ops.spectral_dots(layers.weights, layers.us, layers.vhs),
        "torch": lambda: [((grad @ vh.t()) * u).sum(0) for grad, u, vh in every],
    }


CONTENDERS = {"spectral_weights": reconstructions, "spectral_dots": gradients}


# --- benchmarks -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def turns(operator: str, shapes: tuple[tuple[int, int], ...]) -> tuple[dict[str, Turns], int]:
    layers = random_layers(list(shapes), DTYPE)
    runs = {name: [run] for name, run in CONTENDERS[operator](layers).items()}
    return take_turns(runs), layers.operations()


def show(benchmark: Any, operator: str, shapes: list[tuple[int, int]], contender: str) -> None:
    found, operations = turns(operator, tuple(shapes))
    benchmark.extra_info |= {"operations": operations, "dtype": str(DTYPE).removeprefix("torch.")}
    replay.show(benchmark, found[contender])


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("contender", ["floor", "fastlora", "addmm", "u @ diag(s) @ vh"])
@pytest.mark.parametrize("shape", SINGLE, ids=lambda shape: "x".join(map(str, shape)))
def test_spectral_weight(benchmark, shape, contender):
    benchmark.group = f"spectral_weight {shape[0]}x{shape[1]} {DTYPE}".replace("torch.", "")
    show(benchmark, "spectral_weights", [shape], contender)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("contender", ["floor", "fastlora", "torch"])
@pytest.mark.parametrize("shape", SINGLE, ids=lambda shape: "x".join(map(str, shape)))
def test_spectral_dots(benchmark, shape, contender):
    benchmark.group = f"spectral_dots {shape[0]}x{shape[1]} {DTYPE}".replace("torch.", "")
    show(benchmark, "spectral_dots", [shape], contender)


MODEL = weights(MODELS[0], convolutions=DEVICE == "cuda")
if DEVICE == "cpu":
    MODEL = sorted({s for s in MODEL if s[0] * s[1] * min(s) <= FEW})
WHOLE = [
    (operator, contender)
    for operator, names in (
        ("spectral_weights", ["floor", "fastlora", "addmm", "u @ diag(s) @ vh"]),
        ("spectral_dots", ["floor", "fastlora", "torch"]),
    )
    for contender in names
]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(("operator", "contender"), WHOLE)
def test_model(benchmark, operator, contender):
    name = str(DTYPE).removeprefix("torch.")
    some = "" if DEVICE == "cuda" else "some "
    benchmark.group = f"{operator} SD 1.5: {some}{len(MODEL)} layers {name}"
    benchmark.extra_info["spectral"] = operator
    show(benchmark, operator, MODEL, contender)
