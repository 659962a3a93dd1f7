"""Adapters that come and go in a reserve, under graphs: what is one graph, and what is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from fastlora.adapters import CapturedStrengths
from tests.adapters.nets import Net
from tests.adapters.oracles import randomise

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).tanh())


def counted() -> CompileCounterWithBackend:
    torch._dynamo.reset()
    return CompileCounterWithBackend("eager")


@pytest.mark.parametrize("rank", [0, 8], ids=["no_reserve", "reserve"])
def test_blocks_that_are_compiled_by_themselves_share_one_graph(rank: int) -> None:
    """As diffusers' compile_repeated_blocks does it: where a layer's gates are in the arena is no
    number in the graph."""
    counter = counted()
    model = nn.Sequential(*[Block() for _ in range(10)])  # more graphs than dynamo would make
    x = torch.randn(3, 6)
    if rank:
        fastlora.reserve(model, rank)
    for name in "ab":
        fastlora.inject(model, fastlora.LoRA(2), name=name, seed=0)
    randomise(model, size=0.5)
    twin = copy.deepcopy(model)
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        for scales in ({"a": 0.5, "b": -1.0}, {"a": 0.0}):
            for m in (model, twin):
                fastlora.set_scale(m, scales)
            torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def reserved(rank: int = 8) -> tuple[nn.Module, nn.Module, Tensor]:
    """A net with a reserve, the same without, and an input."""
    torch.manual_seed(0)
    model = Net().eval()
    twin = copy.deepcopy(model)
    fastlora.reserve(model, rank)
    return model, twin, torch.randint(0, 12, (5, 4))


def put(model: nn.Module, name: str, rank: int, where: list[str]) -> None:
    fastlora.inject(model, fastlora.LoRA(rank), where, name, seed=rank)
    randomise(model, seed=rank, size=0.5)


def test_numbers_and_strengths_per_sample_are_two_graphs() -> None:
    counter = counted()
    model, twin, x = reserved()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        for m in (model, twin):
            put(m, "a", 4, ["conv", "inner.0"])
        for scale in (0.5, torch.arange(5.0), -1.0, torch.ones(5)):
            for m in (model, twin):
                fastlora.set_scale(m, {"a": scale})
            torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2


def test_with_gradients_adapters_that_come_are_compiled_and_right() -> None:
    """Parameters are inputs of the graph then: their number is another one."""
    counter = counted()
    model, twin, x = reserved()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x)
    for graphs, name in enumerate("ab", start=2):
        for m in (model, twin):
            put(m, name, 2, ["conv", "inner.0"])
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)
        assert counter.frame_count == graphs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, within inductor
def test_the_default_backend_follows_a_swap() -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 8)), torch.randn(5, 16)
    twin = copy.deepcopy(model)
    fastlora.reserve(model, 8)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for name, rank, where in (("a", 4, ["0"]), ("b", 6, ["0", "2"])):
                for m in (model, twin):
                    put(m, name, rank, where)
                torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)
                for m in (model, twin):
                    fastlora.remove(m, name)


def test_a_captured_sampling_fits_what_comes_and_goes_in_the_reserve(tmp_path: Path) -> None:
    """Into layers with an adapter and into those without, from files, of any rank."""
    donor = Net()
    put(donor, "b", 5, ["embedding", "inner.0", "inner.2"])
    fastlora.save(donor, tmp_path / "b.safetensors", "b")
    fastlora.remove(donor, "b")
    fastlora.inject(donor, fastlora.LoRA(2, dora=True), ["conv"], "dora")
    fastlora.save(donor, tmp_path / "dora.safetensors", "dora")
    model, _, _ = reserved()
    put(model, "a", 3, ["conv", "inner.0"])
    strengths = CapturedStrengths(model, CPU, steps=4, copies=2)

    def load(file: str, **options: Any) -> Callable[[], Any]:
        return lambda: fastlora.load(model, tmp_path / f"{file}.safetensors", file, **options)

    inside: list[Callable[[], Any]] = [
        load("b", scale=0.5),
        lambda: fastlora.set_scale(model, {"a": 0.0, "b": 2.0}),
        lambda: fastlora.remove(model, "a"),
        lambda: fastlora.remove(model, "b"),
        load("b"),
        lambda: put(model, "c", 3, ["conv", "inner.2"]),
    ]
    for change in inside:
        change()
        assert strengths.fits()
    load("dora")()  # outside of it
    assert not strengths.fits()
    fastlora.remove(model, "dora")
    assert strengths.fits()
