"""LoRA on Linear, Embedding and Conv2d against dense float64 weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from tests.adapters.oracles import (
    LOW,
    adapted_weight,
    assert_twofold,
    plain_low_rank,
    randomise,
    same_bits,
    with_weight,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def adapted(base: nn.Module, spec: Any, scale: float) -> tuple[nn.Module, nn.Module, list[Any]]:
    """(adapted layer, its plain twin, [(slot, scale · α/r)])."""
    plain = copy.deepcopy(base)
    fastlora.inject(base, spec, name="a", seed=0)
    randomise(base)
    fastlora.set_scale(base, {"a": scale})
    rank = spec.rank
    alpha = rank if spec.alpha is None else spec.alpha
    ratio = alpha / (rank**0.5 if spec.rank_stabilized else rank)
    # gates are float32 by contract
    strength = (torch.tensor(scale) * torch.tensor(ratio)).item()
    return base, plain, [(base.fastlora["a"], strength)]


def check(base: nn.Module, spec: Any, x: Tensor, scale: float = 0.7) -> None:
    layer, plain, slots = adapted(base, spec, scale)
    exact = with_weight(plain, adapted_weight(plain, slots), x)
    reference = plain_low_rank(plain, slots, x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = layer(x)
        assert y.requires_grad == grad
        assert_twofold(y, exact, reference)
    # the adapter matters: without it the result is far outside the rule
    assert (plain(x).detach().double() - exact).abs().max() > 0.05 * exact.abs().max()


# --- Linear ---------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 3, 4)], ids=["1d", "2d", "3d", "4d"])
def test_linear(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    base = nn.Linear(33, 21, bias=bias, dtype=dtype)
    check(base, fastlora.LoRA(rank=5, alpha=3), torch.randn(*shape, 33, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 300], ids=["tiny", "large"])
@pytest.mark.parametrize("features", [(8, 8), (256, 320)], ids=["8x8", "256x320"])
def test_linear_of_every_size_that_has_a_route_of_its_own(tokens, features) -> None:
    check(nn.Linear(*features), fastlora.LoRA(rank=16), torch.randn(tokens, features[0]))


def test_linear_on_a_batch_of_nothing() -> None:
    layer = nn.Linear(6, 4)
    fastlora.inject(layer, fastlora.LoRA(rank=2))
    for shape in [(0, 6), (0, 3, 6), (3, 0, 6)]:
        y = layer(torch.zeros(shape))
        assert y.shape == (*shape[:-1], 4)
        y.sum().backward()
    assert layer.fastlora["default"].down.grad.abs().sum() == 0


def test_linear_reads_a_strided_input() -> None:
    base = nn.Linear(6, 9)
    check(base, fastlora.LoRA(rank=2), torch.randn(6, 8, 3).permute(2, 1, 0))


def test_rank_above_both_sizes() -> None:
    check(nn.Linear(5, 3), fastlora.LoRA(rank=40), torch.randn(9, 5))


@pytest.mark.parametrize("stabilized", [False, True], ids=["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("alpha", [None, 1.0, 24.0, -3.0])
def test_the_gate_is_scale_times_alpha_over_rank(alpha, stabilized) -> None:
    spec = fastlora.LoRA(rank=9, alpha=alpha, rank_stabilized=stabilized)
    check(nn.Linear(12, 10), spec, torch.randn(4, 12), scale=-1.3)


def test_keyword_call_as_the_plain_layers_allow() -> None:
    for base, x in [
        (nn.Linear(4, 3), torch.randn(2, 4)),
        (nn.Conv2d(4, 3, 1), torch.randn(2, 4, 2, 2)),
        (nn.Embedding(4, 3), torch.tensor([1, 2])),
    ]:
        fastlora.inject(base, fastlora.LoRA(rank=2))
        randomise(base)
        assert torch.equal(base(input=x), base(x))


@pytest.mark.parametrize("dtype", LOW, ids=lambda d: str(d)[6:])
def test_parameters_of_16_bit_bases_are_float32_and_the_result_is_the_bases(dtype) -> None:
    layers = nn.ModuleList(
        [
            nn.Linear(6, 4, dtype=dtype),
            nn.Conv2d(6, 4, 3, dtype=dtype),
            nn.Embedding(6, 4, dtype=dtype),
        ]
    )
    fastlora.inject(layers, fastlora.LoRA(rank=2, dora=True))
    assert {p.dtype for p in fastlora.parameters(layers)} == {torch.float32}
    inputs = [
        torch.randn(2, 6, dtype=dtype),
        torch.randn(2, 6, 5, 5, dtype=dtype),
        torch.tensor([3]),
    ]
    for layer, x in zip(layers, inputs, strict=True):
        y = layer(x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("dtype", LOW, ids=lambda d: str(d)[6:])
def test_parameters_may_have_the_16_bit_dtype_of_the_base(dtype) -> None:
    base = nn.Linear(16, 12, dtype=dtype)
    plain = copy.deepcopy(base)
    fastlora.inject(base, fastlora.LoRA(rank=4), name="a", seed=0, dtype=dtype)
    randomise(base)
    slot = base.fastlora["a"]
    assert slot.down.dtype == dtype
    x = torch.randn(5, 16, dtype=dtype)
    exact = with_weight(plain, adapted_weight(plain, [(slot, 1.0)]), x)
    assert_twofold(base(x), exact, plain_low_rank(plain, [(slot, 1.0)], x))


def test_a_dtype_that_the_operators_do_not_take_is_refused_before_the_first_call() -> None:
    for weight, dtype in [
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.int8),
    ]:
        with pytest.raises(fastlora.AdapterError, match="dtype: expected"):
            fastlora.inject(nn.Linear(3, 3, dtype=weight), fastlora.LoRA(rank=1), dtype=dtype)


def test_an_input_of_another_dtype_is_an_error_as_it_is_for_the_plain_layer() -> None:
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    fastlora.inject(layer, fastlora.LoRA(rank=2))
    with pytest.raises(fastlora.ContractError, match="expected"):
        layer(torch.randn(2, 4))


# --- Embedding ------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (2, 3, 4)], ids=["0d", "1d", "2d", "3d"])
def test_embedding(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 11, shape)
    check(nn.Embedding(11, 6, dtype=dtype), fastlora.LoRA(rank=3, alpha=2), x)


def test_the_padding_row_gets_no_gradient() -> None:
    layer = nn.Embedding(5, 4, padding_idx=2)
    fastlora.inject(layer, fastlora.LoRA(rank=3))
    layer(torch.tensor([[0, 2], [2, 4]])).sum().backward()
    grad = layer.fastlora["default"].down.grad
    assert grad[:, 2].abs().sum() == 0
    assert grad[:, [0, 4]].abs().sum() > 0 and grad[:, [1, 3]].abs().sum() == 0


def test_gradients_are_scaled_by_frequency_where_the_base_asks_for_it() -> None:
    layer = nn.Embedding(4, 3, scale_grad_by_freq=True)
    fastlora.inject(layer, fastlora.LoRA(rank=2))
    layer(torch.tensor([1, 1, 1, 2])).sum().backward()
    grad = layer.fastlora["default"].down.grad
    torch.testing.assert_close(grad[:, 1], grad[:, 2])  # three times a third


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_max_norm_limits_the_rows_of_the_base_and_the_adapter_adds_to_them(norm_type) -> None:
    layer = nn.Embedding(6, 5, max_norm=0.8, norm_type=norm_type, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[3] *= 0.01  # below the limit
    rows = layer.weight.detach().clone()
    length = rows.norm(p=norm_type, dim=1, keepdim=True)
    rows = torch.where(length > 0.8, rows * 0.8 / (length + 1e-7), rows)
    fastlora.inject(layer, fastlora.LoRA(rank=2), name="a")
    randomise(layer)
    slot = layer.fastlora["a"]
    expected = rows + (slot.up @ slot.down).t().detach()
    x = torch.tensor([[3, 1], [1, 5]])
    pristine = layer.weight.detach().clone()
    fastlora.fold(layer)
    torch.testing.assert_close(layer(x), expected[x])
    assert same_bits(layer.weight, pristine)  # folded, a look-up writes nowhere
    fastlora.unfold(layer)
    torch.testing.assert_close(layer(x), expected[x])
    fastlora.fold(layer)  # after a look-up has shortened rows of the base, as torch does
    torch.testing.assert_close(layer(x), expected[x])


def test_sparse_embedding_still_computes_and_trains_its_adapter() -> None:
    layer = nn.Embedding(6, 4, sparse=True)
    fastlora.inject(layer, fastlora.LoRA(rank=2))
    layer(torch.tensor([1, 2])).square().sum().backward()
    assert layer.fastlora["default"].down.grad.layout == torch.strided


# --- Conv2d ---------------------------------------------------------------------------------

CONVS = {
    "1x1": dict(kernel_size=1),
    "3x3": dict(kernel_size=3),
    "no_bias": dict(kernel_size=3, bias=False),
    "5x2_stride": dict(kernel_size=(5, 2), stride=(2, 3)),
    "padding": dict(kernel_size=3, padding=(2, 1)),
    "same": dict(kernel_size=(5, 3), padding="same", dilation=(1, 2)),
    "valid": dict(kernel_size=3, padding="valid"),
    "reflect": dict(kernel_size=3, padding=2, padding_mode="reflect"),
    "replicate": dict(kernel_size=3, padding=(1, 2), padding_mode="replicate"),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
    "same_circular": dict(kernel_size=3, padding="same", padding_mode="circular"),
    "dilation": dict(kernel_size=3, dilation=(2, 1), padding=2, stride=2),
    "groups": dict(kernel_size=3, groups=2, padding=1),
    "depthwise": dict(kernel_size=3, groups=8, padding=1),
    "groups_reflect_dilated": dict(
        kernel_size=3, groups=4, padding=2, dilation=2, padding_mode="reflect", stride=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS.keys())
@pytest.mark.parametrize("batch", [(3,), ()], ids=["batch", "single"])
def test_conv(conv: dict[str, Any], batch: tuple[int, ...]) -> None:
    check(nn.Conv2d(8, 16, **conv), fastlora.LoRA(rank=8, alpha=4), torch.randn(*batch, 8, 11, 9))


@dtypes
@pytest.mark.parametrize("groups", [1, 4])
def test_conv_dtypes(dtype: torch.dtype, groups: int) -> None:
    base = nn.Conv2d(8, 12, 3, padding=1, groups=groups, dtype=dtype)
    check(base, fastlora.LoRA(rank=4), torch.randn(2, 8, 7, 6, dtype=dtype))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels_last", ["input", "model", "both"])
def test_conv_channels_last(groups: int, channels_last: str) -> None:
    base = nn.Conv2d(8, 12, 3, padding=1, groups=groups)
    x = torch.randn(2, 8, 6, 5)
    layer, plain, slots = adapted(base, fastlora.LoRA(rank=4), 0.5)
    exact = with_weight(plain, adapted_weight(plain, slots), x)
    reference = plain_low_rank(plain, slots, x)
    if channels_last in ("model", "both"):
        layer.to(memory_format=torch.channels_last)
    if channels_last in ("input", "both"):
        x = x.to(memory_format=torch.channels_last)
    assert_twofold(layer(x), exact, reference)
    fastlora.fold(layer)
    assert_twofold(layer(x), exact, reference)
    layer.to(memory_format=torch.channels_last)  # while folded
    assert_twofold(layer(x), exact, reference)


def test_a_rank_that_the_groups_do_not_divide_is_refused() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=4)
    with pytest.raises(fastlora.AdapterError, match="rank 6 is not divisible by .* 4 groups"):
        fastlora.inject(layer, fastlora.LoRA(rank=6))
    assert type(layer) is nn.Conv2d


# --- the start --------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_new_adapter_changes_nothing(dtype: torch.dtype, dora: bool) -> None:
    model = nn.ModuleList(
        [
            nn.Linear(7, 5, dtype=dtype),
            nn.Conv2d(4, 6, 3, groups=2, padding_mode="reflect", padding=1, dtype=dtype),
            nn.Embedding(9, 5, dtype=dtype),
        ]
    )
    inputs = [torch.randn(3, 7, dtype=dtype), torch.randn(2, 4, 5, 5, dtype=dtype)]
    inputs.append(torch.tensor([1, 8]))
    before = [m(x) for m, x in zip(model, inputs, strict=True)]
    fastlora.inject(model, fastlora.LoRA(rank=4, dora=dora), seed=3)
    for m, x, y in zip(model, inputs, before, strict=True):
        # the base product plus an exact zero; DoRA's m / ‖W‖ is one up to a rounding
        torch.testing.assert_close(m(x), y, atol=4 * torch.finfo(dtype).eps, rtol=4e-7 * dora)


def test_initial_values_are_kaiming_uniform_and_zero() -> None:
    model = nn.ModuleList([nn.Linear(400, 300), nn.Conv2d(40, 30, 3), nn.Embedding(300, 200)])
    fastlora.inject(model, fastlora.LoRA(rank=30), seed=0)
    for layer, fan_in in [(model[0], 400), (model[1], 360)]:
        slot = layer.fastlora["default"]
        bound = fan_in**-0.5
        assert slot.up.abs().sum() == 0
        assert 0.99 * bound < slot.down.abs().max() <= bound
        # a uniform variable has variance bound²/3
        assert slot.down.var().item() == pytest.approx(bound**2 / 3, rel=0.05)
    slot = model[2].fastlora["default"]
    assert slot.down.abs().sum() == 0 and slot.up.std().item() == pytest.approx(1, rel=0.05)


def test_seeds() -> None:
    def values(seed: int | None, manual: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        torch.manual_seed(manual)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
        torch.manual_seed(manual)
        state = torch.get_rng_state()
        fastlora.inject(model, fastlora.LoRA(rank=2), seed=seed)
        assert torch.equal(torch.get_rng_state(), state) == (seed is not None)
        return torch.cat([p.flatten() for p in fastlora.parameters(model)])

    assert torch.equal(values(1), values(1, manual=5))
    assert not torch.equal(values(1), values(2))
    # without a seed torch's own generator decides, as for every other new layer
    assert torch.equal(values(None, manual=3), values(None, manual=3))
    assert not torch.equal(values(None, manual=3), values(None, manual=4))
    assert torch.equal(values(1, dtype=torch.bfloat16), values(1))


# --- dropout ----------------------------------------------------------------------------------

DROPPED = {
    "linear": (lambda: nn.Linear(12, 6), (9, 12)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
}


@pytest.mark.parametrize(("make", "shape"), DROPPED.values(), ids=DROPPED.keys())
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_acts_on_the_adapters_input_in_training_only(make, shape, dora) -> None:
    base = make()
    plain = copy.deepcopy(base)
    fastlora.inject(base, fastlora.LoRA(rank=4, dropout=0.5, dora=dora), name="a")
    randomise(base)
    x = torch.randn(shape)
    slot = base.fastlora["a"]
    base.eval()
    exact = with_weight(plain, adapted_weight(plain, [(slot, 1.0)]), x)
    torch.testing.assert_close(base(x).double(), exact, atol=2e-6, rtol=2e-6)
    base.train()
    for seed in (0, 1):
        torch.manual_seed(seed)
        y = base(x)
        torch.manual_seed(seed)
        dropped = torch.nn.functional.dropout(x, 0.5)
        low = adapted_weight(plain, [(slot, 1.0)])
        rows = 1.0
        if dora:  # ρ W x + ρ Δ dropped(x)
            delta = low_rank_dense(plain, slot)
            whole = (plain.weight.detach().double() + delta).flatten(1).norm(dim=1)
            rows = slot.magnitude.detach().double() / whole
            rows = rows.view(-1, *[1] * (plain.weight.dim() - 1))
        delta = low_rank_dense(plain, slot) * rows
        no_bias = copy.deepcopy(plain)
        no_bias.bias = None
        expected = with_weight(plain, plain.weight.detach().double() * rows, x)
        expected = expected + with_weight(no_bias, delta, dropped)
        torch.testing.assert_close(y.double(), expected, atol=5e-6, rtol=5e-6)
        assert low is not None
    torch.manual_seed(0)
    first = base(x)
    assert not torch.equal(first, base(x))


def low_rank_dense(base: nn.Module, slot: Any) -> Tensor:
    from tests.adapters.oracles import lora_delta

    return lora_delta(base, slot, 1.0)


def test_dropout_draws_a_mask_of_its_own_for_every_adapter() -> None:
    layer = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    for name in ("a", "b"):
        fastlora.inject(layer, fastlora.LoRA(rank=8, dropout=0.5), name=name)
        with torch.no_grad():
            layer.fastlora[name].down.copy_(torch.eye(8, 64))
            layer.fastlora[name].up.copy_(torch.eye(8) * (1 if name == "a" else 10))
    y = layer(torch.ones(50, 64))
    values = set(y.detach().round().flatten().tolist())
    assert values == {0.0, 2.0, 20.0, 22.0}  # each part kept or dropped independently
