"""Folding: exact both ways, pristine weights, one address, and every refusal leaves things as they
were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters import adapted_layers
from fastlora.adapters.folding import is_folded
from tests.adapters.nets import Net
from tests.adapters.oracles import (
    adapted_weight,
    assert_twofold,
    assert_unchanged,
    lora_delta,
    plain_low_rank,
    randomise,
    same_bits,
    snapshot,
    with_weight,
)


def mixed(dtype: torch.dtype = torch.float32) -> tuple[Net, Net, Tensor]:
    """(plain, adapted with all kinds, tokens)."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    plain = copy.deepcopy(model)
    fastlora.inject(model, fastlora.LoRA(rank=4, alpha=2), name="a", seed=0)
    fastlora.inject(model, fastlora.LoRA(rank=2, dora=True), where=["conv", "inner.2"], name="d")
    fastlora.inject(model, fastlora.Spectral(), where=["conv", "norm", "inner.0"], name="s")
    randomise(model, size=0.5)
    return plain, model, torch.randint(0, 12, (5, 4))


def folded_weights(model: nn.Module) -> dict[str, Tensor]:
    return {p: m.fastlora.folded_weight for p, m in adapted_layers(model).items()}


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_a_hundred_folds_leave_every_bit_and_allocate_nothing(dtype: torch.dtype) -> None:
    _, model, x = mixed(dtype)
    before, y = snapshot(model), model(x).detach()
    fastlora.fold(model)
    folded = model(x)
    addresses = {p: w.data_ptr() for p, w in folded_weights(model).items()}
    for i in range(100):
        fastlora.unfold(model)
        assert not is_folded(model)
        if i % 20 == 0:
            assert same_bits(model(x).detach(), y)
        fastlora.fold(model)
        assert is_folded(model)
        if i % 20 == 0:
            assert same_bits(model(x), folded)
    for i in range(100):
        fastlora.set_scale(model, {"a": i / 7 - 3, "s": 0.1 * i, "d": 1 - i / 50})
    fastlora.set_scale(model, 1.0)
    assert same_bits(model(x), folded)
    assert {p: w.data_ptr() for p, w in folded_weights(model).items()} == addresses
    now = snapshot(model)
    assert now["keys"] == before["keys"] and now["ids"] == before["ids"]
    assert all(same_bits(now["values"][k], v) for k, v in before["values"].items())
    fastlora.unfold(model)
    assert same_bits(model(x).detach(), y)


def test_weight_and_state_dict_are_pristine_while_folded() -> None:
    plain, model, _ = mixed()
    fastlora.fold(model)
    for key, value in plain.state_dict().items():
        assert same_bits(model.state_dict()[key], value)
    assert same_bits(model.conv.weight, plain.conv.weight)
    assert not any("folded" in key or "svd" in key for key in model.state_dict())
    other = Net()
    model.load_state_dict({**other.state_dict()})
    assert same_bits(model.conv.weight, other.conv.weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_folded_weights_round_once(dtype: torch.dtype, scale: float) -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(40, 30),
            "conv": nn.Conv2d(8, 12, 3, groups=2),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "embedding": nn.Embedding(20, 30),
        }
    ).to(dtype)
    fastlora.inject(model, fastlora.LoRA(rank=8), name="a")
    fastlora.inject(model, fastlora.LoRA(rank=16, alpha=4), name="b")
    randomise(model)
    fastlora.set_scale(model, {"a": scale, "b": 2.0})
    fastlora.fold(model)
    strength = torch.tensor(scale).item()
    for path, layer in adapted_layers(model).items():
        slots = layer.fastlora
        exact = layer.weight.detach().double() + lora_delta(layer, slots["a"], strength)
        exact = exact + lora_delta(layer, slots["b"], 0.5)
        got = slots.folded_weight
        assert got.dtype == dtype and got.shape == layer.weight.shape
        error = (got.double() - exact).abs()
        # half a unit in the last place, and float32's accumulation over 24 ranks
        eps = torch.finfo(dtype).eps
        sums = 32 * min(eps, torch.finfo(torch.float32).eps) * (1 + exact.abs().max())
        assert (error <= exact.abs() * eps / 2 + sums).all(), path


def test_twofold_rule_folded_and_not() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = nn.Linear(64, 48, dtype=dtype)
        plain = copy.deepcopy(base)
        fastlora.inject(base, fastlora.LoRA(rank=8), name="a")
        randomise(base)
        x = torch.randn(30, 64, dtype=dtype)
        slots = [(base.fastlora["a"], 1.0)]
        exact = with_weight(plain, adapted_weight(plain, slots), x)
        reference = plain_low_rank(plain, slots, x)
        assert_twofold(base(x).detach(), exact, reference)
        fastlora.fold(base)
        assert_twofold(base(x).detach(), exact, reference)


def test_a_folded_layer_is_the_plain_layer_on_the_folded_weight() -> None:
    plain, model, x = mixed()
    fastlora.fold(model)
    plain.requires_grad_(False)
    weights = {f"{p}.weight": w for p, w in folded_weights(model).items()}
    assert same_bits(model(x), torch.func.functional_call(plain, weights, (x,)))
    assert not model(x).requires_grad


@pytest.mark.parametrize("change", ["set_scale", "disable", "scaled", "inject", "remove"])
def test_changes_of_a_folded_model_fold_again(change: str) -> None:
    _, model, x = mixed()
    twin = copy.deepcopy(model)
    fastlora.fold(model)
    addresses = {p: w.data_ptr() for p, w in folded_weights(model).items()}

    def act(m: nn.Module) -> Tensor:
        if change == "set_scale":
            fastlora.set_scale(m, {"a": -0.5, "s": 0.25})
        elif change == "disable":
            fastlora.disable(m, "a")
        elif change == "scaled":
            y = m(x)
            with fastlora.scaled(m, 0.125):
                inside = m(x)
                with fastlora.disable(m, "s", "d"):
                    inside = inside + m(x)
            torch.testing.assert_close(m(x), y)
            return inside
        elif change == "inject":
            fastlora.inject(m, fastlora.LoRA(rank=4), name="new", seed=4)
            with torch.no_grad():
                for p in fastlora.parameters(m, "new"):
                    p.fill_(0.1)
            fastlora.set_scale(m, {"new": 0.5})
        else:
            fastlora.remove(m, "s")
        return m(x)

    expected = act(twin)
    torch.testing.assert_close(act(model), expected, rtol=1e-4, atol=1e-4)
    assert is_folded(model)
    now = {p: w.data_ptr() for p, w in folded_weights(model).items()}
    assert {p: a for p, a in addresses.items() if p in now}.items() <= now.items()


def test_scale_zero_folds_to_the_base_bit_for_bit() -> None:
    plain, model, x = mixed()
    plain.requires_grad_(False)
    fastlora.fold(model)
    fastlora.set_scale(model, 0.0)
    assert same_bits(model(x), plain(x))
    for path, weight in folded_weights(model).items():
        assert same_bits(weight, plain.get_submodule(path).weight)


def test_strengths_per_sample_are_refused_while_folded_and_nothing_changes() -> None:
    _, model, x = mixed()
    fastlora.set_scale(model, {"a": 0.5})
    fastlora.fold(model)
    y = model(x)
    for call in (
        lambda: fastlora.set_scale(model, {"d": 2.0, "a": torch.ones(5)}),
        lambda: fastlora.scaled(model, {"a": torch.ones(5)}).__enter__(),
    ):
        with pytest.raises(fastlora.AdapterError, match="differs per sample"):
            call()
        assert is_folded(model) and same_bits(model(x), y)
        assert [i.scale for i in fastlora.adapters(model).values()] == [0.5, 1.0, 1.0]
    fastlora.unfold(model)
    fastlora.set_scale(model, {"a": torch.ones(5)})
    before = model(x)
    with pytest.raises(fastlora.AdapterError, match="'a' differs per sample"):
        fastlora.fold(model)
    assert not is_folded(model) and torch.equal(model(x), before)
    fastlora.disable(model, "a")  # off, it has one strength for all
    fastlora.fold(model)
    y = model(x)
    with pytest.raises(fastlora.AdapterError, match="'a' differs per sample"):
        fastlora.enable(model, "a")
    assert is_folded(model) and same_bits(model(x), y)
    assert not fastlora.adapters(model)["a"].enabled


def test_a_block_that_folds_within_strengths_per_sample() -> None:
    _, model, x = mixed()
    fastlora.set_scale(model, {"a": torch.ones(5)})
    y = model(x).detach()
    with fastlora.scaled(model, {"a": 1.0}):
        fastlora.fold(model)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    assert not is_folded(model)  # no single weight can have the strengths that are back
    assert same_bits(model(x).detach(), y)


def test_permanent_writes_the_weights_and_leaves_a_plain_model() -> None:
    plain, model, x = mixed()
    expected = model(x).detach()
    ids = {k: id(p) for k, p in plain.named_parameters()}
    mine = {k: id(p) for k, p in model.named_parameters() if ".fastlora." not in k}
    fastlora.fold(model, permanent=True)
    assert adapted_layers(model) == {} and type(model.conv) is nn.Conv2d
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {k: id(p) for k, p in model.named_parameters()} == mine and mine.keys() == ids.keys()
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert not same_bits(model.conv.weight, plain.conv.weight)


def test_permanent_folding_of_a_shared_weight_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x))

    for where in (["head"], ["embedding"], None):
        model = Tied()
        fastlora.inject(model, fastlora.LoRA(rank=2), where=where)
        randomise(model)
        x = torch.tensor([1, 5])
        y, before = model(x).detach(), snapshot(model)
        with pytest.raises(fastlora.AdapterError, match="embedding.weight and head.weight are one"):
            fastlora.fold(model, permanent=True)
        assert_unchanged(model, before)
        fastlora.fold(model)  # beside the pristine weights there is no such trouble
        torch.testing.assert_close(model(x), y)


def test_folding_a_part_and_changing_the_whole() -> None:
    _, model, x = mixed()
    twin = copy.deepcopy(model)
    fastlora.fold(model.inner)
    for scale in (0.5, -1.0):
        fastlora.set_scale(model, scale)
        fastlora.set_scale(twin, scale)
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)
    # the gates are the whole model's, so a change through another part reaches the folded one
    fastlora.set_scale(model.conv, {"a": 2.0})
    fastlora.set_scale(twin, {"a": 2.0})
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(fastlora.AdapterError, match="differs per sample"):
        fastlora.set_scale(model.conv, {"a": torch.ones(5)})


def test_loading_a_state_dict_into_a_folded_model() -> None:
    _, model, x = mixed()
    other = copy.deepcopy(model)
    for p in other.parameters():
        with torch.no_grad():
            p.add_(0.05 * torch.randn_like(p))
    expected = copy.deepcopy(model)
    expected.load_state_dict(other.state_dict())
    expected = expected(x)
    fastlora.fold(model)
    model(x)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert is_folded(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:])
def test_converting_a_folded_model_folds_the_converted_weights(dtype: torch.dtype) -> None:
    _, model, x = mixed()
    twin = copy.deepcopy(model).to(dtype)
    fastlora.fold(twin)
    fastlora.fold(model)
    model.to(dtype)
    assert same_bits(model(x), twin(x))
    address = model.conv.fastlora.folded_weight.data_ptr()
    model.to(dtype)  # nothing to do
    assert model.conv.fastlora.folded_weight.data_ptr() == address


def test_a_folded_model_is_copied_folded_and_independent() -> None:
    _, model, x = mixed()
    fastlora.fold(model)
    y = model(x)
    other = copy.deepcopy(model)
    assert is_folded(other) and same_bits(other(x), y)
    fastlora.set_scale(other, 0.0)
    assert same_bits(model(x), y) and not same_bits(other(x), y)
    fastlora.unfold(model)
    assert is_folded(other)


def test_folding_in_inference_mode_serves_gradients_of_the_input_later() -> None:
    layer = nn.Linear(4, 4)
    fastlora.inject(layer, fastlora.LoRA(rank=2))
    randomise(layer)
    with torch.inference_mode():
        fastlora.fold(layer)
        layer(torch.randn(2, 4))
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.fastlora.folded_weight.sum(0).expand(2, 4))


def test_folding_under_autocast_keeps_full_precision() -> None:
    _, model, _ = mixed()
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        fastlora.fold(model)
    fastlora.fold(twin)
    for a, b in zip(folded_weights(model).values(), folded_weights(twin).values(), strict=True):
        assert same_bits(a, b)


def test_layers_with_a_weight_of_their_own_kind_are_refused() -> None:
    class Mine(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = nn.Sequential(nn.Linear(3, 3), Mine(3, 3))
    fastlora.inject(model, fastlora.LoRA(rank=1), where=["0"], name="a")
    fastlora.fold(model)
    before, x = snapshot(model), torch.randn(2, 3)
    with pytest.raises(fastlora.AdapterError, match="fold: 1: a Mine computes with its weight"):
        fastlora.inject(model, fastlora.LoRA(rank=1), name="b")  # it would have to be folded
    assert_unchanged(model, before)
    fastlora.unfold(model)
    fastlora.inject(model, fastlora.LoRA(rank=1), name="b")
    y = model(x)
    with pytest.raises(fastlora.AdapterError, match="fold: 1: a Mine"):
        fastlora.fold(model)
    assert not is_folded(model) and torch.equal(model(x), y)


def test_fold_and_unfold_of_nothing() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(fastlora.AdapterError, match="no adapters"):
        fastlora.fold(model)
    fastlora.unfold(model)
    fastlora.inject(model, fastlora.LoRA(rank=1))
    fastlora.unfold(model)
    assert not is_folded(model)


def test_remove_from_a_folded_model_gives_the_plain_one_back() -> None:
    plain, model, x = mixed()
    before: dict[str, Any] = snapshot(plain)
    fastlora.fold(model)
    for name in list(fastlora.adapters(model)):
        fastlora.remove(model, name)
    now = snapshot(model)
    assert now["keys"] == before["keys"] and now["classes"] == before["classes"]
    assert all(same_bits(now["values"][k], v) for k, v in before["values"].items())
    assert now["own"] == before["own"] and now["buffers"] == before["buffers"]
    assert torch.equal(model(x), plain(x))
