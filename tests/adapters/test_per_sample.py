"""Strengths per sample, and strengths that are learned."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters import adapted_layers, tiled
from fastlora.adapters.lookup import arenas
from tests.adapters.nets import net
from tests.adapters.oracles import adapted_weight, randomise, spectral_weight


def test_each_row_of_a_batch_equals_its_single_run() -> None:
    model, x = net("a", "b")
    rows = {"a": torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0]), "b": torch.tensor([1.0, 0, 0.3, -1, 2])}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            fastlora.set_scale(model, rows)
            batch = model(x)
            for i in range(5):
                fastlora.set_scale(model, {n: float(r[i]) for n, r in rows.items()})
                torch.testing.assert_close(batch[i : i + 1], model(x[i : i + 1]))


def test_a_number_beside_strengths_per_sample() -> None:
    """Only layers with the per-sample adapter bind the batch, and shifts and DoRA may be there."""
    model, x = net()
    plain = copy.deepcopy(model)
    fastlora.inject(model, fastlora.LoRA(rank=2), where=r"inner\..", name="rows")
    fastlora.inject(model, fastlora.LoRA(rank=4, dora=True), where=["conv", "inner.0"], name="dora")
    fastlora.inject(model, fastlora.Spectral(), where=["inner.0", "norm"], name="shift")
    fastlora.inject(model, fastlora.LoRA(rank=2), where=["embedding", "inner.0"], name="lora")
    randomise(model, size=0.5)
    numbers = {"dora": 0.7, "shift": -0.5, "lora": 0.3}
    rows = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0])
    fastlora.set_scale(model, {**numbers, "rows": rows})
    batch = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), batch)
    for i in range(5):
        single = copy.deepcopy(plain).double()
        weights: dict[str, Tensor] = {}
        for path, layer in adapted_layers(model).items():
            base = copy.deepcopy(plain.get_submodule(path)).double()
            slots = layer.fastlora
            if "shift" in slots:
                with torch.no_grad():
                    base.weight.copy_(spectral_weight(base, slots["shift"].shift, -0.5))
            scales = {"dora": 0.7, "lora": 0.3, "rows": rows[i].item()}
            active = [(slots[n], scales[n]) for n in slots if n in scales]
            weights[f"{path}.weight"] = adapted_weight(base, active)
        exact = torch.func.functional_call(single, weights, (x[i : i + 1],))
        torch.testing.assert_close(batch[i : i + 1].double(), exact, rtol=1e-4, atol=1e-4)
    # the embedding and the convolution do not have the adapter with five strengths
    assert model.embedding(x[:2]).shape == (2, 4, 16)
    assert model.conv(torch.randn(3, 4, 4, 4)).shape == (3, 8, 4, 4)


def test_one_layer_that_needs_one_strength_refuses_before_anything_changes() -> None:
    model, x = net("a")
    fastlora.inject(model.inner, fastlora.Spectral(), where=["0"], name="a2")
    fastlora.inject(model.conv, fastlora.LoRA(rank=2), name="a2")
    fastlora.inject(model, fastlora.LoRA(rank=2), where=["inner.2"], name="b")
    y = model(x)
    with pytest.raises(fastlora.AdapterError, match=r"0: 'a2' \(spectral\) changes the weight"):
        fastlora.set_scale(model, {"b": torch.ones(5), "a": torch.zeros(5), "a2": torch.ones(5)})
    with (
        pytest.raises(fastlora.AdapterError, match="so its strength cannot differ per sample"),
        fastlora.scaled(model, {"a": torch.zeros(5), "a2": torch.ones(5)}),
    ):
        pass
    assert {n: a.scale for n, a in fastlora.adapters(model).items()} == {"a": 1, "a2": 1, "b": 1}
    assert torch.equal(model(x), y)
    fastlora.remove(model.inner, "a2")  # which is what could not
    fastlora.set_scale(model, {"a2": torch.ones(5)})
    with pytest.raises(fastlora.AdapterError, match=r"0: 'a2' \(dora\) has DoRA's norm"):
        fastlora.inject(model.inner, fastlora.LoRA(rank=2, dora=True), where=["0"], name="a2")
    assert model(x).isfinite().all()


@pytest.mark.parametrize("rows", [1, 4, 6, 10])
def test_another_batch_size_is_an_error_in_every_layer(rows: int) -> None:
    layers = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8),
            "conv": nn.Conv2d(8, 8, 1),
            "grouped": nn.Conv2d(8, 8, 1, groups=2),
            "depthwise": nn.Conv2d(8, 8, 1, groups=8),
            "embedding": nn.Embedding(8, 8),
        }
    )
    fastlora.inject(layers, fastlora.LoRA(rank=8), name="a")
    fastlora.set_scale(layers, {"a": torch.ones(5)})
    for grad in (True, False):
        for name, layer in layers.items():
            x = torch.randn(rows, 8)
            x = (
                x.long().clamp(0, 7)
                if name == "embedding"
                else x
                if name == "linear"
                else x[..., None, None]
            )
            message = (
                rf"{name}: .*expected .*(5|{rows}).*, got .*(5|{rows}).* \['a'\] are per sample: "
                rf"expected an input with leading size 5, got \[{rows}"
            )
            with torch.set_grad_enabled(grad), pytest.raises(fastlora.ContractError, match=message):
                layer(x)
    fastlora.set_scale(layers, {"a": torch.ones(1)})  # one strength does not spread over a batch
    for layer in (layers["conv"], layers["grouped"]):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(fastlora.ContractError):
                layer(torch.randn(3, 8, 1, 1))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", ["one", "two", "dropout", "subclass", "conv", "embedding"])
def test_another_batch_size_names_the_layer(kind: str, grad: bool) -> None:
    class Own(nn.Linear):
        pass

    makers = {"subclass": lambda: Own(4, 4), "conv": lambda: nn.Conv2d(4, 4, 1)}
    makers["embedding"] = lambda: nn.Embedding(4, 4)
    model = nn.Sequential()
    model.add_module("mid", nn.Sequential(makers.get(kind, lambda: nn.Linear(4, 4))()))
    spec = fastlora.LoRA(rank=2, dropout=0.5 if kind == "dropout" else 0.0)
    fastlora.inject(model, spec, name="a")
    if kind == "two":
        fastlora.inject(model, fastlora.LoRA(rank=2), name="b")
    fastlora.set_scale(model, {"a": torch.ones(3)})
    good = torch.zeros(6, 4) if kind != "conv" else torch.zeros(6, 4, 2, 2)
    good = good.long() if kind == "embedding" else good
    message = (
        r"mid\.0: .*strengths of \['a'\] are per sample: expected an input with leading size 6"
    )
    with torch.set_grad_enabled(grad), tiled(model, 2):
        for _ in range(2):  # the second time by the shortest way
            assert len(model(good)) == 6
            with pytest.raises(fastlora.ContractError, match=message):
                model(good[:5])


def test_errors_of_another_kind_are_left_as_they_are() -> None:
    layer = nn.Linear(4, 4)
    fastlora.inject(layer, fastlora.LoRA(rank=2), name="a")
    for scale in (1.0, torch.ones(3)):
        fastlora.set_scale(layer, scale)
        with pytest.raises(fastlora.ContractError, match=r"^lora_linear: x: [^;]*$"):
            layer(torch.zeros(3, 5))


def test_two_batch_sizes_are_refused_and_change_nothing() -> None:
    model, _ = net("a", "b")
    fastlora.set_scale(model, {"a": torch.ones(5)})
    with pytest.raises(fastlora.AdapterError, match=r"one batch size, got \[4, 5\]"):
        fastlora.set_scale(model, {"b": torch.ones(4)})
    assert fastlora.adapters(model)["b"].scale == 1.0
    fastlora.set_scale(model, {"a": torch.ones(4), "b": torch.ones(4)})  # both at once


def test_rows_are_copied_from_the_callers_tensor() -> None:
    model, x = net("a", "b")
    rows = torch.tensor([0.5, 1.0, 2.0, 0.0, -1.0])
    fastlora.set_scale(model, {"a": rows})
    y = model(x)
    rows.fill_(100.0)
    fastlora.set_scale(model, {"b": 1.0})  # writes all gates again
    assert torch.equal(model(x), y)


def test_tiled_rows_repeat_as_guidance_concatenates() -> None:
    model, x = net("a")
    rows = torch.tensor([0.5, 1.0, 2.0, 0.0, -1.0])
    fastlora.set_scale(model, {"a": rows})
    single = model(x)
    with tiled(model, 2):
        twice = model(torch.cat([x, x]))
        with pytest.raises(ValueError, match="10"):
            model(x)
        with pytest.raises(KeyError), tiled(model, 3):
            assert model(x.repeat(6, 1)).shape[0] == 30
            raise KeyError
        model(torch.cat([x, x]))
    torch.testing.assert_close(twice, torch.cat([single, single]))
    torch.testing.assert_close(model(x), single)


def test_tiled_blocks_that_overlap_end_where_they_began() -> None:
    model, x = net("a")
    fastlora.set_scale(model, {"a": torch.tensor([0.5, 1.0, 2.0, 0.0, -1.0])})
    single, (arena,) = model(x), arenas(model)
    first, second = tiled(model, 2), tiled(model, 3)
    first.__enter__()
    second.__enter__()
    assert arena.copies == 6
    first.__exit__(None, None, None)
    assert arena.copies == 3 and model(x.repeat(3, 1)).shape[0] == 15
    second.__exit__(None, None, None)
    assert arena.copies == 1 and torch.equal(model(x), single)


def test_tiled_blocks_of_threads_end_where_they_began() -> None:
    model, x = net("a")
    fastlora.set_scale(model, {"a": torch.tensor([0.5, 1.0, 2.0, 0.0, -1.0])})
    single, (arena,) = model(x), arenas(model)
    together = threading.Barrier(4)

    def run(copies: int) -> None:
        together.wait()
        for _ in range(200):
            with tiled(model, copies):
                assert arena.copies % copies == 0

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, [2, 3, 2, 5]))
    assert arena.copies == 1 and torch.equal(model(x), single)


def test_a_tiled_block_that_cannot_be_entered_leaves_things_as_they_were(monkeypatch) -> None:
    model, x = net("a")
    fastlora.set_scale(model, {"a": torch.ones(5)})
    (arena,) = arenas(model)
    write, calls = type(arena).write, []

    def failing(self: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        write(arena)

    monkeypatch.setattr(type(arena), "write", failing)
    with pytest.raises(MemoryError), tiled(model, 2):
        raise AssertionError("the block must not run")
    assert arena.copies == 1 and model(x).shape[0] == 5


@pytest.mark.parametrize("copies", [0, -1, 2.0, True, None], ids=str)
def test_bad_numbers_of_copies(copies: object) -> None:
    model, _ = net("a")
    with pytest.raises(fastlora.AdapterError, match="copies: expected an integer >= 1, got"):
        with tiled(model, copies):  # type: ignore[arg-type]
            pass
    assert arenas(model)[0].copies == 1


def test_back_to_a_number_frees_the_batch() -> None:
    model, x = net("a")
    y = model(x[:2])
    with fastlora.scaled(model, torch.ones(5)):
        torch.testing.assert_close(model(x)[:2], y)
    assert torch.equal(model(x[:2]), y)


# --- learned strengths ------------------------------------------------------------------------


def test_a_tensor_that_requires_a_gradient_gets_it_again_and_again() -> None:
    model, x = net("a")
    model.double()
    scale = torch.tensor([0.3, 1.0, -0.5, 0.0, 2.0], requires_grad=True)
    fastlora.set_scale(model, {"a": scale})

    def loss(s: Tensor) -> Tensor:
        fastlora.set_scale(model, {"a": s})
        with torch.no_grad():
            return model(x).square().sum()

    optimiser = torch.optim.SGD([scale], lr=1e-4)
    for _ in range(3):  # a graph of its own for every forward pass
        fastlora.set_scale(model, {"a": scale})
        value = model(x).square().sum()
        optimiser.zero_grad()
        value.backward()
        for i in range(5):
            step = torch.zeros(5)
            step[i] = 2**-9
            difference = (loss(scale.detach() + step) - loss(scale.detach() - step)) / 2**-8
            assert scale.grad[i].item() == pytest.approx(difference.item(), rel=2e-2, abs=1e-2)
        fastlora.set_scale(model, {"a": scale})
        optimiser.step()
        with torch.no_grad():  # what the step wrote is seen without setting it again
            torch.testing.assert_close(model(x).square().sum(), loss(scale.detach()))


def test_a_learned_strength_needs_no_second_set_scale() -> None:
    model, x = net("a")
    scale = nn.Parameter(torch.full((5,), 0.5))
    fastlora.set_scale(model, {"a": scale})
    for _ in range(2):
        model(x).square().sum().backward()
        with torch.no_grad():
            scale.sub_(0.001 * scale.grad)
    y = model(x).detach()
    fastlora.set_scale(model, {"a": scale.detach()})
    torch.testing.assert_close(model(x).detach(), y)
    model, x = net("a")
    router = nn.Linear(3, 1)
    fastlora.set_scale(model, {"a": router(torch.randn(5, 3))[:, 0]})  # not a leaf
    model(x).sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_an_adapter_that_is_off_binds_no_batch() -> None:
    model, x = net("a", "b")
    fastlora.set_scale(model, {"a": torch.ones(5)})
    assert arenas(model)[0].batch == 5
    fastlora.disable(model, "a")
    assert arenas(model)[0].batch is None
    assert model(x[:3]).shape == (3, 16, 6)
    fastlora.enable(model, "a")
    with pytest.raises(fastlora.ContractError):
        model(x[:3])
