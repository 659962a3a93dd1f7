"""CUDA graphs of adapted models: replays follow strengths and adapters; nothing waits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastlora
from tests.adapters.oracles import randomise
from tests.devices import no_gpu

pytestmark = [pytest.mark.gpu, no_gpu]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def network(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 320), nn.SiLU(), nn.Linear(320, 128)).cuda().to(dtype)
    return model.requires_grad_(False).eval(), torch.randn(2, 200, 256, device="cuda", dtype=dtype)


def captured(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The model as a CUDA graph."""
    static = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        model(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = model(static)

    def replay(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return y.clone()

    return replay


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def close(a: Tensor, b: Tensor) -> None:
    rough = a.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=3e-2 if rough else 1e-4, atol=3e-2 if rough else 1e-4)


@DTYPES
def test_replays_follow_adapters_and_strengths(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = network(dtype)
    eager = copy.deepcopy(model)
    fastlora.reserve(model, 24)
    replay = captured(model, x)
    close(replay(x), eager(x))
    for change in (
        lambda m: fastlora.inject(m, fastlora.LoRA(8), name="a", seed=0),
        lambda m: randomise(m, size=0.1),
        lambda m: fastlora.set_scale(m, {"a": -0.5}),
        lambda m: fastlora.set_scale(m, {"a": 0.0}),
        lambda m: fastlora.inject(m, fastlora.LoRA(16), name="b", seed=1),
        lambda m: randomise(m, seed=2, size=0.1),
        lambda m: fastlora.set_scale(m, {"a": 1.5, "b": 0.25}),
        lambda m: fastlora.save(m, tmp_path / f"{id(m)}.safetensors", "a"),
        lambda m: fastlora.remove(m, "a"),
        lambda m: fastlora.load(m, tmp_path / f"{id(m)}.safetensors", "again", 0.5),
        lambda m: fastlora.disable(m),
        lambda m: fastlora.enable(m, "again"),
    ):
        for m in (model, eager):
            change(m)
        with torch.no_grad():
            expected = eager(x)
        close(replay(x), expected)


@DTYPES
def test_replays_follow_strengths_without_a_reserve(dtype: torch.dtype) -> None:
    model, x = network(dtype)
    for name in "ab":
        fastlora.inject(model, fastlora.LoRA(8), name=name, seed=0)
    randomise(model, size=0.1)
    fastlora.set_scale(model, {"a": 0.0})
    replay = captured(model, x)
    for scales in ({"a": 1.0}, {"b": 0.0}, {"a": 0.5, "b": -1.0}, {"a": 0.0, "b": 0.0}):
        fastlora.set_scale(model, scales)
        with torch.no_grad():
            close(replay(x), model(x))


@DTYPES
@pytest.mark.parametrize("reserve", [False, True], ids=["separate", "reserve"])
def test_calls_and_new_strengths_wait_for_nothing(dtype: torch.dtype, reserve: bool) -> None:
    model, x = network(dtype)
    if reserve:
        fastlora.reserve(model, 24)
    for name in "abc":
        fastlora.inject(model, fastlora.LoRA(8), name=name, seed=0)
    randomise(model, size=0.1)
    fastlora.set_scale(model, {"a": 0.1, "b": 0.2, "c": 0.3})  # pinned memory is there from now on
    with torch.no_grad():
        model(x)
        with no_waiting():
            fastlora.set_scale(model, {"a": 0.5, "b": -2.0, "c": 1.0})
            model(x)
            fastlora.set_scale(model, {"a": 0.0})
            model(x)
            fastlora.disable(model, "b")
            model(x)
            fastlora.fold(model)
            model(x)
            fastlora.unfold(model)


def test_strengths_written_while_the_device_is_behind() -> None:
    """The host is far ahead: every call has to see the strength that was set before it."""
    model, x = network(torch.float32)
    fastlora.inject(model, fastlora.LoRA(8), name="a", seed=0)
    randomise(model, size=0.1)
    scales = [0.1 * i for i in range(1, 40)]
    with torch.no_grad():
        model(x)
        torch.cuda._sleep(int(0.05 * 1.5e9))
        results = []
        for scale in scales:
            fastlora.set_scale(model, {"a": scale})
            results.append(model(x))
        torch.cuda.synchronize()
        for scale, result in zip(scales, results, strict=True):
            fastlora.set_scale(model, {"a": scale})
            torch.cuda.synchronize()
            assert torch.equal(model(x), result)


def test_a_call_in_a_reserve_allocates_its_output_and_h() -> None:
    model, x = network(torch.bfloat16)
    layer = nn.Sequential(model[0])
    fastlora.reserve(layer, 64)
    for name in "ab":
        fastlora.inject(layer, fastlora.LoRA(8), name=name, seed=0)
    with torch.no_grad():
        y = layer(x)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        y = layer(x)
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert y.shape == (2, 200, 320) and after - before <= 2


@DTYPES
def test_replays_follow_swaps_which_wait_for_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = network(dtype)
    eager = copy.deepcopy(model)
    for name, rank in (("one", 8), ("same", 8), ("more", 16)):
        donor = copy.deepcopy(eager)
        fastlora.inject(donor, fastlora.LoRA(rank), name=name, seed=len(name))
        randomise(donor, seed=rank, size=0.1)
        fastlora.save(donor, tmp_path / f"{name}.safetensors", name)
    fastlora.reserve(model, 16)
    names = ("one", "same", "more")
    ready = {n: fastlora.prepare(model, tmp_path / f"{n}.safetensors") for n in names}
    replay = captured(model, x)

    def check(name: str) -> None:
        fastlora.load(eager, tmp_path / f"{name}.safetensors", name)
        with torch.no_grad():
            close(replay(x), eager(x))
        fastlora.remove(eager, name)

    for name in ("one", "more", "one"):
        fastlora.swap(model, "x", ready[name])
        check(name)
    with no_waiting():
        fastlora.swap(model, "x", ready["same"])
    check("same")
