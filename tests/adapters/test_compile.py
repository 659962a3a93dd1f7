"""torch.compile(fullgraph=True) of adapted models: right results, one graph for all strengths."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from tests.adapters.nets import Net
from tests.adapters.oracles import randomise


def mixed() -> tuple[Net, Tensor]:
    torch._dynamo.reset()
    model = Net()
    fastlora.inject(model, fastlora.LoRA(rank=4), name="a", seed=0)
    fastlora.inject(model, fastlora.LoRA(rank=2), name="b", where=["inner.0", "embedding"])
    fastlora.inject(model, fastlora.LoRA(rank=4, dora=True), name="d", where=["conv", "inner.2"])
    fastlora.inject(model, fastlora.Spectral(), name="s", where=["conv", "norm", "inner.0"])
    randomise(model, size=0.5)
    return model, torch.randint(0, 12, (5, 4))


def test_strengths_change_without_compiling_again() -> None:
    model, x = mixed()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), backend=counter, fullgraph=True)
    eager, own = model, compiled._orig_mod

    def check() -> None:
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)

    for graphs, grad in enumerate((False, True), start=1):
        with torch.set_grad_enabled(grad):
            check()
            for scale in (0.5, -1.0, 2.0, 0.0, 0.75):
                for m in (own, eager):
                    fastlora.set_scale(m, {"a": scale, "s": 0.5 * scale})
                check()
            for change in (fastlora.disable, fastlora.enable):
                for m in (own, eager):
                    change(m, "d", "b")
                check()
            assert counter.frame_count == graphs
            own(x)  # an eager call in between leaves the graphs valid
            check()
            assert counter.frame_count == graphs
    # parameters are inputs of the graph: an optimiser's step and a write through .data are seen
    for m in (own, eager):
        with torch.no_grad():
            for p in fastlora.parameters(m):
                p.data.mul_(1.25)
    with torch.no_grad():
        check()
    got = torch.autograd.grad(compiled(x).square().sum(), fastlora.parameters(own))
    expected = torch.autograd.grad(eager(x).square().sum(), fastlora.parameters(eager))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert counter.frame_count == 2


def test_rows_folding_and_new_adapters_compile_and_stay_right() -> None:
    model, x = mixed()
    for name in ("s", "d"):
        fastlora.remove(model, name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def check(graphs: int) -> None:
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        assert counter.frame_count <= graphs, counter.frame_count

    with torch.no_grad():
        check(1)
        for rows in (torch.arange(5.0), torch.ones(5)):
            fastlora.set_scale(model, {"a": rows})
            check(2)
        fastlora.set_scale(model, 0.3)
        fastlora.fold(model)
        for scale in (0.3, -1.0, 0.0):
            fastlora.set_scale(model, scale)
            check(3)
        model.double()  # folds the converted weights, outside of any graph
        check(4)
        model.float()
        fastlora.unfold(model)
        check(5)
        fastlora.inject(model, fastlora.LoRA(rank=2), name="new")
        randomise(model, seed=5)
        check(6)
        for name in ("a", "b", "new"):
            fastlora.remove(model, name)
        check(7)


def test_a_learned_strength_under_compilation() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 4))
    fastlora.inject(model, fastlora.LoRA(rank=2), name="a")
    randomise(model)
    scale, x = torch.tensor([0.5, -1.0, 2.0], requires_grad=True), torch.randn(3, 6)
    fastlora.set_scale(model, {"a": scale})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        got = torch.autograd.grad(compiled(x).square().sum(), scale)[0]
        torch.testing.assert_close(got, torch.autograd.grad(model(x).square().sum(), scale)[0])
        with torch.no_grad():
            scale.mul_(0.5)


def test_subclasses_of_linear_and_export() -> None:
    class Mine(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).tanh()

    torch._dynamo.reset()
    model = nn.Sequential(Mine(6, 8), nn.Linear(8, 4))
    fastlora.inject(model, fastlora.LoRA(rank=2), name="a")
    randomise(model)
    x = torch.randn(3, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, within inductor
def test_the_default_backend() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 8))
    fastlora.inject(model, fastlora.LoRA(rank=4), name="a")
    randomise(model)
    x = torch.randn(5, 16)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for scale in (1.0, -0.5, 0.0):
            fastlora.set_scale(model, scale)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_adapters_come_and_go_in_one_graph() -> None:
    """With a reserve: from no adapter to several and back, other ranks, other layers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randint(0, 12, (5, 4))
    fastlora.reserve(model, 8)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    where = ["embedding", "conv", "inner.0", "inner.2"]

    def swap(m: nn.Module, old: str, rank: int, layers: list[str], new: str) -> None:
        if old:
            fastlora.remove(m, old)
        fastlora.inject(m, fastlora.LoRA(rank), layers, new, seed=rank)
        randomise(m, seed=rank, size=0.5)

    with torch.no_grad():
        plain = compiled(x)
        torch.testing.assert_close(plain, twin(x), rtol=1e-4, atol=1e-5)
        seen = [plain]
        for change in (
            lambda m: swap(m, "", 2, where, "a"),
            lambda m: swap(m, "", 4, ["conv", "inner.0"], "b"),
            lambda m: fastlora.set_scale(m, {"a": 0.5, "b": -2.0}),
            lambda m: fastlora.set_scale(m, {"a": 0.0}),
            lambda m: fastlora.disable(m),
            lambda m: fastlora.enable(m, "b"),
            lambda m: swap(m, "a", 6, ["embedding", "inner.2"], "c"),
            lambda m: swap(m, "b", 2, where, "d"),
            lambda m: (fastlora.remove(m, "c"), fastlora.remove(m, "d")),
            lambda m: swap(m, "", 8, where, "e"),
        ):
            for m in (model, twin):
                change(m)
            seen.append(compiled(x))
            torch.testing.assert_close(seen[-1], twin(x), rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1, counter.frame_count
        fastlora.reserve(model, 0)  # and without one another
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 2
    assert torch.equal(seen[5], plain)  # disabled
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))
