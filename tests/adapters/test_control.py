"""Strengths: numbers, per sample, learned; blocks of code; several adapters in one model."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters import adapted_layers
from tests.adapters.nets import net
from tests.adapters.oracles import (
    adapted_weight,
    assert_unchanged,
    randomise,
    same_bits,
    snapshot,
    spectral_weight,
    with_weight,
)

# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["scale", "negative_zero", "disable"])
def test_off_is_the_base_bit_for_bit(how: str) -> None:
    plain, x = net()
    plain.requires_grad_(False)  # torch itself takes other routes for weights that are trained
    model, _ = net("a", "b")
    assert (model(x) - plain(x)).abs().max() > 0.1
    if how == "disable":
        fastlora.disable(model)
    else:
        fastlora.set_scale(model, -0.0 if how == "negative_zero" else 0)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert same_bits(model(x).detach(), plain(x))


def test_a_small_scale_is_linear_to_first_order() -> None:
    model, x = net("a")
    model.double()
    fastlora.set_scale(model, 0.0)
    y0 = model(x)
    changes = []
    for scale in (2**-10, 2**-11):
        fastlora.set_scale(model, {"a": scale})
        changes.append(model(x) - y0)
    ratio = changes[0].norm() / changes[1].norm()
    assert ratio.item() == pytest.approx(2, abs=5e-3)


def test_gates_are_written_in_place() -> None:
    """What a captured graph has recorded stays true: one buffer for all layers, at one address."""
    model, x = net("a", "b")
    fastlora.set_scale(model, {"a": 0.5})
    model(x)
    with torch.no_grad():
        gates = [m.gate(n) for m in adapted_layers(model).values() for n in ("a", "b")]
        addresses = [g.data_ptr() for g in gates]
        assert [b - a for a, b in itertools.pairwise(addresses)] == [4 * 4] * 9
        assert all(g.dtype == torch.float32 for g in gates)
        for scales in ({"a": 2.0}, {"a": 0.0, "b": -1.0}):
            fastlora.set_scale(model, scales)
            now = [m.gate(n) for m in adapted_layers(model).values() for n in ("a", "b")]
            assert [g.data_ptr() for g in now] == addresses
        assert all((g == 0).all() for g in gates[::2]) and all((g == -1).all() for g in gates[1::2])


def test_set_scale_takes_names_or_all() -> None:
    model, _ = net("a", "b")
    fastlora.set_scale(model, {"a": 0.25})
    assert [i.scale for i in fastlora.adapters(model).values()] == [0.25, 1.0]
    fastlora.set_scale(model, 3)
    assert [i.scale for i in fastlora.adapters(model).values()] == [3.0, 3.0]
    fastlora.set_scale(model, {"b": torch.tensor(0.5)})  # a 0-d tensor is a number
    assert fastlora.adapters(model)["b"].scale == 0.5


@pytest.mark.parametrize(
    "scale",
    [
        "a lot", None, [1.0], float("nan"), float("inf"), torch.ones(2, 2), torch.ones(0),
        torch.ones(2, dtype=torch.int64), torch.tensor(0.5, requires_grad=True),
        torch.tensor(float("nan")), 1e39, -1e39, 10**400, torch.tensor([1.0, float("nan")]),
        torch.tensor([float("inf"), 1.0]), torch.tensor([1.0, 1e39], dtype=torch.float64),
        torch.tensor([1.0, float("-inf")], requires_grad=True),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_scale_is_refused_and_changes_nothing(scale: Any) -> None:
    model, x = net("a", "b")
    before = model(x).detach()
    with pytest.raises(fastlora.AdapterError, match="scale of 'a': expected"):
        fastlora.set_scale(model, {"b": 0.0, "a": scale})
    assert same_bits(model(x).detach(), before)
    with pytest.raises(fastlora.AdapterError), fastlora.scaled(model, {"a": scale}):
        raise AssertionError("the block must not run")
    assert same_bits(model(x).detach(), before)


@pytest.mark.parametrize("scale", [1e30, -1e30, torch.tensor([1.0, 1e30])], ids=str)
def test_a_scale_whose_gates_are_not_finite_is_refused(scale: Any) -> None:
    """Finite by itself, and infinite in float32 times alpha / rank."""
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    fastlora.inject(layer, fastlora.LoRA(rank=2), name="small")
    fastlora.inject(layer, fastlora.LoRA(rank=2, alpha=-2e10), name="large")
    before = layer(x).detach()
    with pytest.raises(fastlora.AdapterError, match="'large': .*, also times alpha / rank = 1e"):
        fastlora.set_scale(layer, scale)
    assert [i.scale for i in fastlora.adapters(layer).values()] == [1.0, 1.0]
    assert same_bits(layer(x).detach(), before)
    fastlora.set_scale(layer, {"small": scale})
    fastlora.set_scale(layer, {"large": 1e28})
    assert layer.gate("large").isfinite().all()


def test_unknown_names() -> None:
    model, _ = net("a")
    for call in (
        lambda: fastlora.set_scale(model, {"a": 0.5, "b": 1.0}),
        lambda: fastlora.enable(model, "b"),
        lambda: fastlora.disable(model, "a", "b"),
        lambda: fastlora.parameters(model, "b"),
        lambda: fastlora.remove(model, "b"),
        lambda: fastlora.save(model, "b.safetensors", name="b"),
    ):
        with pytest.raises(fastlora.AdapterError, match=r"no adapter named 'b'; .* \['a'\]"):
            call()
    assert fastlora.adapters(model)["a"].scale == 1.0 and fastlora.adapters(model)["a"].enabled


def test_a_model_without_adapters_is_told() -> None:
    model = nn.Linear(2, 2)
    assert fastlora.adapters(model) == {} and fastlora.parameters(model) == []
    for call in (
        lambda: fastlora.set_scale(model, 0.5),
        lambda: fastlora.disable(model),
        lambda: fastlora.enable(model),
        lambda: fastlora.fold(model),
        lambda: fastlora.verify(model, torch.ones(2)),
        lambda: fastlora.save(model, "x.safetensors"),
    ):
        with pytest.raises(fastlora.AdapterError, match="the model has no adapters|no adapter"):
            call()


# --- blocks of code ---------------------------------------------------------------------------


def test_blocks_restore_scales_and_switches_nested_and_after_exceptions() -> None:
    model, x = net("a", "b")
    fastlora.set_scale(model, {"a": 0.5})
    fastlora.disable(model, "b")
    before = model(x).detach()

    def state() -> list[Any]:
        return [(i.scale, i.enabled) for i in fastlora.adapters(model).values()]

    start = state()
    with pytest.raises(KeyError), fastlora.scaled(model, {"a": 2.0}) as same:
        assert same is model and state() == [(2.0, True), (1.0, False)]
        with fastlora.enable(model, "b"), fastlora.scaled(model, torch.full((5,), 0.25)):
            assert all(e for _, e in state())
            model(x)
            with fastlora.disable(model):
                assert not any(e for _, e in state())
            assert all(e for _, e in state())
        assert state() == [(2.0, True), (1.0, False)]
        raise KeyError
    assert state() == start
    assert same_bits(model(x).detach(), before)


def test_enable_and_disable_stay_without_a_block() -> None:
    model, x = net("a")
    on = model(x)
    fastlora.disable(model, "a")
    assert not fastlora.adapters(model)["a"].enabled
    off = model(x)
    fastlora.enable(model, "a")
    assert torch.equal(model(x), on) and not torch.equal(off, on)


def test_a_scale_survives_being_switched_off_and_on() -> None:
    model, x = net("a")
    fastlora.set_scale(model, {"a": 0.3})
    y = model(x)
    fastlora.disable(model)
    fastlora.set_scale(model, {"a": 0.6})  # while off
    fastlora.enable(model)
    assert fastlora.adapters(model)["a"].scale == 0.6
    fastlora.set_scale(model, {"a": 0.3})
    assert torch.equal(model(x), y)


def test_parts_that_become_one_within_a_block_keep_what_they_had() -> None:
    model, x = net()
    fastlora.inject(model.inner, fastlora.LoRA(rank=2), name="a")
    fastlora.inject(model.conv, fastlora.LoRA(rank=2), name="b")
    fastlora.set_scale(model, {"a": 0.5, "b": -0.5})
    with fastlora.scaled(model, 2.0), fastlora.disable(model, "b"):
        fastlora.inject(model, fastlora.LoRA(rank=2), name="c")
    assert {n: (i.scale, i.enabled) for n, i in fastlora.adapters(model).items()} == {
        "a": (0.5, True),
        "b": (-0.5, True),
        "c": (1.0, True),
    }


def test_an_adapter_removed_within_a_block_stays_removed() -> None:
    model, x = net("a", "b")
    with fastlora.scaled(model, {"a": 0.5, "b": 0.5}):
        fastlora.remove(model, "a")
    assert list(fastlora.adapters(model)) == ["b"]
    assert fastlora.adapters(model)["b"].scale == 1.0
    with fastlora.scaled(model, 0.5):
        fastlora.remove(model, "b")
    assert fastlora.adapters(model) == {}


def test_a_new_adapter_within_a_block_keeps_its_scale() -> None:
    model, _ = net("a")
    with fastlora.scaled(model, {"a": 0.5}):
        fastlora.inject(model, fastlora.LoRA(rank=2), where=["conv"], name="b")
        fastlora.set_scale(model, {"b": 0.125})
    assert fastlora.adapters(model)["a"].scale == 1.0
    assert fastlora.adapters(model)["b"].scale == 0.125


@pytest.mark.parametrize("inner", ["scaled", "disable", "set_scale"])
def test_strengths_may_change_between_forward_and_backward(inner: str) -> None:
    """The order of a text slider: prediction with the adapter, targets without it, backward."""

    def gradients(disturb: bool) -> list[Tensor]:
        model, x = net("a")
        for _ in range(2):  # the second time by the shortest way
            y = model(x)
        if disturb:
            with torch.no_grad():
                if inner == "set_scale":
                    fastlora.set_scale(model, -2.0)
                    model(x)
                else:
                    block = fastlora.disable(model) if inner == "disable" else None
                    with block or fastlora.scaled(model, {"a": -2.0}):
                        model(x)
        y.square().sum().backward()
        return [p.grad for p in fastlora.parameters(model)]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


# --- what is reported -------------------------------------------------------------------------


def test_adapters_reports_what_there_is() -> None:
    model, _ = net()
    info = fastlora.inject(
        model, fastlora.LoRA(rank=4, alphas={"conv": 2.0}, ranks={"inner.2": 7}), name="a"
    )
    assert info == fastlora.adapters(model)["a"]
    assert info.kind == "lora" and info.rank == 7 and info.scale == 1.0 and info.enabled
    assert info.modules == ("embedding", "conv", "grouped", "inner.0", "inner.2")
    assert info.parameters == sum(p.numel() for p in fastlora.parameters(model, "a"))
    fastlora.inject(model, fastlora.LoRA(rank=2, dora=True), where=["conv"], name="d")
    fastlora.inject(model, fastlora.Spectral(), where=["norm"], name="s")
    kinds = {n: (i.kind, i.rank) for n, i in fastlora.adapters(model).items()}
    assert kinds == {"a": ("lora", 7), "d": ("dora", 2), "s": ("spectral", None)}
    assert len(fastlora.parameters(model)) == 10 + 3 + 1


def test_ranks_and_alphas_of_single_modules() -> None:
    model, x = net()
    plain = copy.deepcopy(model).double()
    spec = fastlora.LoRA(
        rank=4, alpha=2, ranks={"inner.0": 3, "conv": 1}, alphas={"conv": 5.0}, rank_stabilized=True
    )
    fastlora.inject(model, spec, where=["conv", "inner.0", "inner.2"], name="a")
    randomise(model, size=0.5)
    ratios = {"conv": 5.0, "inner.0": 2 / 3**0.5, "inner.2": 2 / 4**0.5}
    weights = {
        f"{p}.weight": adapted_weight(
            plain.get_submodule(p), [(model.get_submodule(p).fastlora["a"], ratio)]
        )
        for p, ratio in ratios.items()
    }
    exact = torch.func.functional_call(plain, weights, (x,))
    torch.testing.assert_close(model(x).double(), exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        fastlora.AdapterError, match=r"expected paths of adapted layers, got \['in'\]"
    ):
        fastlora.inject(model, fastlora.LoRA(ranks={"in": 3}), name="b")


def test_removing_one_of_several_leaves_the_others_as_they_were() -> None:
    model, x = net("a")
    fastlora.set_scale(model, {"a": 0.5})
    with_a, before = model(x).detach(), snapshot(net()[0])
    for spec in (fastlora.LoRA(rank=8, dora=True), fastlora.Spectral()):
        fastlora.inject(model, spec, name="b")
        randomise(model.get_submodule("conv").fastlora, seed=3)
        with torch.no_grad():
            for p in fastlora.parameters(model, "b"):
                p.add_(0.1)
        assert not torch.allclose(model(x), with_a)
        fastlora.remove(model, "b")
        torch.testing.assert_close(model(x).detach(), with_a)
        assert fastlora.adapters(model)["a"].scale == 0.5
    fastlora.remove(model, "a")
    assert snapshot(model)["keys"] == before["keys"]
    model2, _ = net()
    before = snapshot(model2)
    for name in ("a", "b"):
        fastlora.inject(model2, fastlora.LoRA(rank=2), name=name)
    for name in ("a", "b"):
        fastlora.remove(model2, name)
    assert_unchanged(model2, before)


def test_mixed_kinds_on_one_layer_against_the_dense_weight() -> None:
    base = nn.Linear(12, 10, dtype=torch.float64)
    plain = copy.deepcopy(base)
    specs = {
        "l": fastlora.LoRA(rank=3, alpha=2),
        "d": fastlora.LoRA(rank=5, dora=True),
        "s": fastlora.Spectral(),
        "r": fastlora.LoRA(rank=2, alpha=1, rank_stabilized=True),
    }
    for name, spec in specs.items():
        fastlora.inject(base, spec, name=name)
    randomise(base)
    x = torch.randn(7, 12, dtype=torch.float64)
    shifted = copy.deepcopy(plain)
    for scales in (
        {"l": 0.5, "d": 0.25, "s": -1.0, "r": 2.0},
        {"l": 0.5, "d": 0, "s": 1.0, "r": 0},
    ):
        fastlora.set_scale(base, scales)
        with torch.no_grad():
            shifted.weight.copy_(spectral_weight(plain, base.fastlora["s"].shift, scales["s"]))
        slots = [
            (base.fastlora[n], (torch.tensor(scales[n]) * torch.tensor(specs[n].ratio)).item())
            for n in "ldr"
        ]
        exact = with_weight(plain, adapted_weight(shifted, slots), x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(base(x), exact, rtol=1e-9, atol=1e-9)
        fastlora.fold(base)
        torch.testing.assert_close(base(x), exact, rtol=1e-9, atol=1e-9)
        fastlora.unfold(base)
