"""Copies and pickles of adapted models, and what is seen after inference, writes and in threads."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters import adapted_layers
from fastlora.adapters.lookup import arenas
from tests.adapters.nets import Net, mixed
from tests.adapters.oracles import (
    adapted_weight,
    randomise,
    same_bits,
    snapshot,
    spectral_weight,
)

# --- copies -----------------------------------------------------------------------------------


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": by_pickle, "torch_save": by_torch_save}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "used"])
def test_copies_compute_the_same_and_are_independent(make: Any, warm: bool) -> None:
    model, x = mixed()
    fastlora.disable(model, "b")
    if warm:
        with torch.no_grad():
            model(x)
        model(x)
    other = make(model)
    y = model(x).detach()
    assert same_bits(other(x).detach(), y)
    assert fastlora.adapters(other) == fastlora.adapters(model)
    assert type(other.conv) is type(model.conv) and isinstance(other.conv, nn.Conv2d)
    assert list(other.state_dict()) == list(model.state_dict())

    # strengths, parameters, structure: nothing reaches the original, nor the other way round
    fastlora.set_scale(other, {"a": 3.0})
    fastlora.enable(other)
    assert same_bits(model(x).detach(), y)
    changed = other(x).detach()
    fastlora.set_scale(model, {"a": -1.0})
    assert same_bits(other(x).detach(), changed)
    fastlora.set_scale(model, {"a": 0.5})
    fastlora.fold(other)
    fastlora.unfold(other)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert same_bits(model(x).detach(), y)
    fastlora.inject(other, fastlora.LoRA(rank=2), name="c")
    fastlora.remove(other, "a")
    assert "c" not in fastlora.adapters(model) and same_bits(model(x).detach(), y)
    for name in ("b", "c", "s"):
        fastlora.remove(other, name)
    assert_plain = snapshot(Net())
    assert snapshot(other)["keys"] == assert_plain["keys"]
    assert snapshot(other)["grad"] == assert_plain["grad"]
    assert same_bits(model(x).detach(), y)


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
def test_a_copy_trains_and_remembers_what_was_frozen(make: Any) -> None:
    model, x = mixed()
    other = make(model)
    optimiser = torch.optim.SGD(fastlora.parameters(other), lr=1e-2)
    before = other(x).square().mean()
    before.backward()
    optimiser.step()
    assert other(x).square().mean() < before
    assert all(p.grad is None for p in model.parameters())
    for name in ("a", "b", "s"):
        fastlora.remove(other, name)
    assert all(p.requires_grad for p in other.parameters())
    assert not model.conv.weight.requires_grad


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
def test_a_copy_remembers_which_adapters_froze(make: Any) -> None:
    model, _ = mixed()
    fastlora.inject(model, fastlora.LoRA(rank=2), where=["conv"], name="later", freeze=False)
    other = make(model)
    for name in ("a", "b"):
        fastlora.remove(other, name)
    assert not other.conv.weight.requires_grad  # "s" asked for it too
    fastlora.remove(other, "s")
    assert other.conv.weight.requires_grad and "later" in fastlora.adapters(other)
    assert not model.conv.weight.requires_grad


def test_copies_keep_strengths_per_sample_and_learned_ones() -> None:
    model, x = mixed()
    fastlora.set_scale(model, {"b": torch.tensor([0.0, 1, 2, 3, 4])})
    assert same_bits(copy.deepcopy(model)(x), model(x))
    fastlora.set_scale(model, {"b": nn.Parameter(torch.ones(5))})
    other = copy.deepcopy(model)
    assert same_bits(other(x), model(x))
    other(x).sum().backward()
    mine, its = (arenas(m)[0].scales["b"] for m in (model, other))
    assert its is not mine and its.grad is not None and mine.grad is None
    fastlora.set_scale(model, {"b": (torch.ones(5, requires_grad=True) * 2)})  # not a leaf
    assert same_bits(copy.deepcopy(model)(x), model(x))


def test_a_copy_of_a_part_takes_no_other_parameters_along() -> None:
    model, _ = mixed()
    whole = len(pickle.dumps(model.state_dict()))
    part = copy.deepcopy(model.inner)
    h = torch.randn(2, 8)
    assert same_bits(part(h), model.inner(h))
    fastlora.set_scale(part, {"a": 2.0})
    assert not same_bits(part(h), model.inner(h))
    assert fastlora.adapters(model)["a"].scale == 0.5
    assert fastlora.adapters(part).keys() == {"a", "b", "s"}
    only_inner = len(pickle.dumps(model.inner.state_dict()))
    # frozen parameters of the rest of the model must not travel with the arena
    assert len(pickle.dumps(model.inner)) < only_inner + 20_000 < whole + 20_000
    big = nn.Sequential(nn.Linear(4, 4), nn.Linear(1000, 1000))
    fastlora.inject(big, fastlora.LoRA(rank=1))
    assert len(pickle.dumps(big[0])) < 100_000
    for name in ("a", "b", "s"):
        fastlora.remove(part, name)
    assert adapted_layers(part) == {} and len(adapted_layers(model)) == 6


def test_shallow_copies_of_containers_share_their_layers() -> None:
    model, x = mixed()
    other = copy.copy(model)
    fastlora.set_scale(other, 0.0)
    assert fastlora.adapters(model)["a"].scale == 0.0


def test_nothing_keeps_a_removed_model_alive() -> None:
    model, x = mixed()
    model(x)
    with torch.no_grad():
        model(x)
    watch = weakref.ref(model.conv)
    fastlora.fold(model)
    del model
    gc.collect()
    assert watch() is None


def test_a_replaced_layer_leaves_its_arena() -> None:
    model, x = mixed()
    model.conv = nn.Conv2d(4, 8, 3, padding=1)
    gc.collect()
    fastlora.inject(model, fastlora.LoRA(rank=4), name="new")
    randomise(model)
    assert model(x).isfinite().all()
    total = sum(s.width for m in adapted_layers(model).values() for s in m.fastlora.values())
    assert arenas(model)[0]._total == total


def test_functional_call_and_state_swapping_see_other_values() -> None:
    model, x = mixed()
    other, _ = mixed()
    randomise(other, seed=5)
    torch.testing.assert_close(
        torch.func.functional_call(model, dict(other.named_parameters()), (x,)), other(x)
    )
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.functional_call(model, dict(other.named_parameters()), (x,)), other(x)
        )
    assert not torch.allclose(model(x), other(x))


# --- modes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["inference_mode", "no_grad"])
@pytest.mark.parametrize("inject_inside", [False, True], ids=["inject_before", "inject_inside"])
def test_training_works_after_inference(first: str, inject_inside: bool) -> None:
    torch.manual_seed(0)
    mode = getattr(torch, first)
    model, x = Net(), torch.randint(0, 12, (5, 4))

    def inject() -> None:
        fastlora.inject(model, fastlora.LoRA(rank=4), name="a", seed=0)
        fastlora.inject(model, fastlora.LoRA(rank=4, dora=True), name="b", seed=0)
        fastlora.inject(model, fastlora.Spectral(), where=["inner.0", "norm"], name="s")

    if not inject_inside:
        inject()
    with mode():
        if inject_inside:
            inject()
        model(x)
        fastlora.set_scale(model, {"a": 0.5})
        model(x)
        fastlora.set_scale(model, {"a": torch.ones(5)})
        fastlora.disable(model, "b", "s")
        model(x)
        fastlora.set_scale(model, {"a": 2.0})
        fastlora.enable(model)
        model(x)
        fastlora.set_scale(model, {"a": torch.ones(5)})
        fastlora.disable(model, "b", "s")
        model(x)
    fastlora.set_scale(model, {"a": torch.full((5,), 0.5)})  # writes what was made inside
    fastlora.set_scale(model, {"a": 2.0})
    fastlora.enable(model)
    randomise(model, size=0.3)
    optimiser = torch.optim.Adam(fastlora.parameters(model), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(x).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in fastlora.parameters(model))
        optimiser.step()
        with mode():  # what sampling between steps does
            sampled = model(x).square().mean().item()
        assert sampled == pytest.approx(model(x).square().mean().item(), rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]


WRITES = {
    "optimiser": lambda p: torch.optim.SGD([p], lr=1.0).step(),
    "no_grad": lambda p: p.add_(0.5),
    "data_copy": lambda p: p.data.copy_(torch.randn_like(p)),
    "data_assign": lambda p: setattr(p, "data", torch.randn_like(p)),
    "set": lambda p: p.set_(torch.randn_like(p)),
    "foreach": lambda p: torch._foreach_mul_([p], 0.5),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("kind", ["one", "two", "dora", "spectral", "rows"])
def test_no_write_to_a_parameter_goes_unseen_without_gradients(write: Any, kind: str) -> None:
    model = nn.ModuleList([nn.Linear(6, 5), nn.Conv2d(6, 5, 1), nn.Embedding(6, 5)])
    spec = fastlora.Spectral() if kind == "spectral" else fastlora.LoRA(rank=3, dora=kind == "dora")
    fastlora.inject(model, spec, name="a")
    if kind in ("two", "rows"):
        fastlora.inject(model, fastlora.LoRA(rank=2), name="b")
    randomise(model)
    if kind == "rows":
        fastlora.set_scale(model, torch.tensor([0.5, 1.0, 2.0]))
    inputs = [torch.randn(3, 6), torch.randn(3, 6, 2, 2), torch.tensor([1, 3, 5])]

    def run(m: nn.ModuleList) -> list[Tensor]:
        with torch.no_grad():
            return [layer(x) for layer, x in zip(m, inputs, strict=True)]

    for _ in range(2):
        before = run(model)
    for p in fastlora.parameters(model):
        p.grad = torch.randn_like(p)
        with torch.no_grad():
            write(p)
        now, fresh = run(model), run(copy.deepcopy(model))  # a copy has nothing kept
        for a, b in zip(now, fresh, strict=True):
            torch.testing.assert_close(a, b)
    assert all(not torch.allclose(a, b) for a, b in zip(before, now, strict=True))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", ["dora", "spectral"])
def test_a_write_to_the_base_that_leaves_no_trace_is_seen(kind: str, grad: bool) -> None:
    layer, x = nn.Linear(6, 5, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    first = layer.weight.detach().clone()
    spec = fastlora.Spectral() if kind == "spectral" else fastlora.LoRA(rank=3, dora=True)
    fastlora.inject(layer, spec, name="a")
    randomise(layer)
    slot, bias = layer.fastlora["a"], layer.bias.detach()

    def check() -> None:
        if kind == "dora":
            weight = adapted_weight(layer, [(slot, 1.0)])
        else:  # in residual form: the shifted part is that of the weight at injection
            weight = layer.weight.detach() - first + spectral_weight(plain, slot.shift, 1.0)
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                torch.testing.assert_close(layer(x).detach(), x @ weight.T + bias)

    plain = nn.Linear(6, 5, dtype=torch.float64)
    plain.load_state_dict({"weight": first, "bias": bias})
    check()
    version = layer.weight._version
    for fold in (False, True):
        layer.weight.data.mul_(3)
        if fold:
            fastlora.fold(layer)
        check()
        fastlora.unfold(layer)
        check()
    assert layer.weight._version == version


def test_a_new_parameter_object_is_seen() -> None:
    layer = nn.Linear(4, 3)
    fastlora.inject(layer, fastlora.LoRA(rank=2))
    randomise(layer)
    x = torch.randn(2, 4)
    with torch.no_grad():
        layer(x)
        slot = layer.fastlora["default"]
        slot.up = nn.Parameter(slot.up * 2)
        layer.weight = nn.Parameter(layer.weight + 1)
        layer.bias = nn.Parameter(layer.bias - 1)
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x))


def test_threads_share_a_model() -> None:
    model, x = mixed()
    with torch.no_grad():
        y = model(x)

    def run(m: Net) -> list[Tensor]:
        with torch.no_grad():
            return [m(x) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            fresh = copy.deepcopy(model)  # nothing is prepared: the threads do it together
            for results in pool.map(run, [fresh] * 4):
                for result in results:
                    torch.testing.assert_close(result, y)
            fastlora.set_scale(fresh, {"a": 0.25, "b": -1.0})
            with torch.no_grad():
                torch.testing.assert_close(fresh(x), copy.deepcopy(fresh)(x))
