"""Spectral shifts against `U diag(relu(σ + strength δ)) Vᵀ` in float64."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.adapters.oracles import (
    as_weight,
    assert_twofold,
    assert_unchanged,
    randomise,
    same_bits,
    snapshot,
    spectral_weight,
    with_weight,
)

LAYERS: dict[str, tuple[Any, Any]] = {
    "linear_wide": (lambda d: nn.Linear(14, 9, dtype=d), lambda d: torch.randn(3, 14, dtype=d)),
    "linear_tall": (
        lambda d: nn.Linear(5, 12, bias=False, dtype=d),
        lambda d: torch.randn(2, 3, 5, dtype=d),
    ),
    "conv": (
        lambda d: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", dtype=d),
        lambda d: torch.randn(2, 4, 5, 6, dtype=d),
    ),
    "conv_groups_single": (
        lambda d: nn.Conv2d(4, 8, 3, groups=2, stride=2, dtype=d),
        lambda d: torch.randn(4, 5, 6, dtype=d),
    ),
    "conv_transpose": (
        lambda d: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dtype=d),
        lambda d: torch.randn(2, 4, 5, 6, dtype=d),
    ),
    "conv_transpose_groups_single": (
        lambda d: nn.ConvTranspose2d(6, 4, (2, 3), groups=2, dilation=2, bias=False, dtype=d),
        lambda d: torch.randn(6, 5, 4, dtype=d),
    ),
    "embedding": (
        lambda d: nn.Embedding(13, 6, dtype=d),
        lambda d: torch.tensor([[1, 12], [0, 5]]),
    ),
    "layer_norm": (lambda d: nn.LayerNorm(6, dtype=d), lambda d: torch.randn(2, 3, 6, dtype=d)),
    "layer_norm_2d_no_bias": (
        lambda d: nn.LayerNorm((6,), bias=False, eps=1e-3, dtype=d),
        lambda d: torch.randn(2, 6, dtype=d),
    ),
    "group_norm": (lambda d: nn.GroupNorm(2, 6, dtype=d), lambda d: torch.randn(2, 6, 3, dtype=d)),
    "rms_norm": (lambda d: nn.RMSNorm(6, eps=1e-5, dtype=d), lambda d: torch.randn(4, 6, dtype=d)),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def shift_of(base: nn.Module, size: float = 0.5) -> torch.Tensor:
    shift = base.fastlora["s"].shift
    with torch.no_grad():
        shift.copy_(size * torch.randn(shift.shape))
        shift[-1] = -50.0  # kills the smallest singular value: the relu has work to do
    return shift


@layers
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.7])
def test_spectral(layer: Any, dtype: torch.dtype, scale: float) -> None:
    base, x = layer[0](dtype), layer[1](dtype)
    plain = copy.deepcopy(base)
    with torch.no_grad():
        before = plain(x)
    fastlora.inject(base, fastlora.Spectral(), name="s")
    assert same_bits(base(x).detach(), before)  # in residual form zero shifts are exact
    shift = shift_of(base)
    fastlora.set_scale(base, {"s": scale})
    strength = torch.tensor(scale).item()
    weight = spectral_weight(plain, shift, strength)
    exact = with_weight(plain, weight, x)
    low = torch.func.functional_call(plain, {"weight": weight.to(dtype)}, (x,)).detach()
    # Factors in 16 bits carry a rounding of their own: the plain expression from such factors.
    if weight.dim() > 1:
        f = base.fastlora
        c = ((f.svd_s + strength * shift.detach()).clamp_min(0) - f.svd_s).to(dtype)
        rounded = plain.weight + as_weight(plain, (f.svd_u * c) @ f.svd_vh)
        other = torch.func.functional_call(plain, {"weight": rounded}, (x,)).detach()
        low = max((low, other), key=lambda y: (y.double() - exact).abs().max())
    for _ in range(2):
        with torch.no_grad():
            assert_twofold(base(x), exact, low)
    y = base(x)
    assert y.requires_grad
    assert_twofold(y, exact, low)
    fastlora.fold(base)
    assert_twofold(base(x), exact, low)
    fastlora.unfold(base)
    with fastlora.scaled(base, 0.0):
        assert same_bits(base(x).detach(), before)


@pytest.mark.parametrize("kind", ["layer_norm", "group_norm", "rms_norm"])
def test_scalar_shifts_of_norms(kind: str) -> None:
    make, data = LAYERS[kind]
    base, x = make(torch.float64), data(torch.float64)
    plain = copy.deepcopy(base)
    info = fastlora.inject(base, fastlora.Spectral(norms="scalar"), name="s")
    assert info.parameters == 1
    with torch.no_grad():
        base.fastlora["s"].shift.fill_(0.25)
    fastlora.set_scale(base, {"s": -2.0})
    exact = with_weight(plain, plain.weight.detach() - 0.5, x)
    torch.testing.assert_close(base(x), exact)
    fastlora.fold(base)
    torch.testing.assert_close(base(x), exact)


def test_norms_are_skipped_when_asked_whatever_where_says() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)
    )
    for where in (None, r"\d"):
        info = fastlora.inject(model, fastlora.Spectral(norms="skip"), where=where, name="s")
        assert info.modules == ("0",)
        fastlora.remove(model, "s")
    # a norm without a weight has nothing to shift
    assert fastlora.inject(model, fastlora.Spectral(), where=r"\d", name="s").modules == ("0", "1")


@layers
def test_gradients_against_finite_differences(layer: Any) -> None:
    base, x = layer[0](torch.float64), layer[1](torch.float64)
    fastlora.inject(base, fastlora.Spectral(), name="s")
    shift = base.fastlora["s"].shift
    with torch.no_grad():
        shift.copy_(0.1 * torch.randn(shift.shape))
    fastlora.set_scale(base, {"s": 0.75})
    probe = torch.randn_like(base(x))
    (grad,) = torch.autograd.grad((base(x) * probe).sum(), shift)
    for i in range(len(shift)):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                shift[i] += step
                values.append((base(x) * probe).sum())
                shift[i] -= step
        difference = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(grad[i], difference, rtol=1e-5, atol=1e-6)


def test_several_shifts_add_up_under_one_relu() -> None:
    base, x = nn.Linear(6, 5, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    plain = copy.deepcopy(base)
    for name in ("s", "t"):
        fastlora.inject(base, fastlora.Spectral(), name=name)
    randomise(base, size=3.0)
    fastlora.set_scale(base, {"s": 0.5, "t": -1.5})
    shifts = [base.fastlora[n].shift.detach() for n in ("s", "t")]
    exact = with_weight(plain, spectral_weight(plain, 0.5 * shifts[0] - 1.5 * shifts[1], 1.0), x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(base(x), exact)
    fastlora.fold(base)
    torch.testing.assert_close(base(x), exact)


def test_a_very_negative_shift_removes_its_rank_one_part() -> None:
    base = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(base.weight.detach(), full_matrices=False)
    fastlora.inject(base, fastlora.Spectral())
    with torch.no_grad():
        base.fastlora["default"].shift[1] = -1e9
    removed = base.weight.detach() - s[1] * u[:, 1:2] @ vh[1:2]
    torch.testing.assert_close(base(torch.eye(6, dtype=torch.float64)), removed.t())


def test_the_kept_weight_follows_every_change() -> None:
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    plain = copy.deepcopy(base)
    fastlora.inject(base, fastlora.Spectral(), name="s")
    slot = base.fastlora["s"]

    def check(scale: float = 1.0) -> None:
        exact = with_weight(plain, spectral_weight(plain, slot.shift, scale), x)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(base(x).double(), exact, rtol=1e-5, atol=1e-5)

    check()
    with torch.no_grad():
        slot.shift.add_(0.3)
    check()
    slot.shift.data.copy_(torch.randn(5))  # leaves no trace in the version counter
    check()
    slot.shift.data = torch.randn(5)
    check()
    with torch.inference_mode():
        slot.shift.copy_(torch.randn(5))
        base(x)
    check()
    with torch.inference_mode():
        fastlora.set_scale(base, {"s": 0.5})
    check(0.5)
    fastlora.set_scale(base, {"s": -2.0})
    check(-2.0)


def test_another_base_checkpoint_gets_a_decomposition_of_its_own() -> None:
    model, other = nn.Sequential(nn.Linear(6, 5)), nn.Sequential(nn.Linear(6, 5))
    fastlora.inject(model, fastlora.Spectral(), name="s")
    shift = shift_of(model[0])
    model.load_state_dict(other.state_dict())
    x = torch.randn(3, 6)
    exact = with_weight(other[0], spectral_weight(other[0], shift, 1.0), x)
    torch.testing.assert_close(model(x).double(), exact, rtol=1e-5, atol=1e-5)
    fastlora.fold(model)
    model.load_state_dict(nn.Sequential(nn.Linear(6, 5)).state_dict())
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_singular_values_stay_float32_beside_16_bit_weights() -> None:
    layer = nn.Linear(6, 5)
    fastlora.inject(layer, fastlora.Spectral())
    before = layer.fastlora.svd_s.clone()
    layer.half()
    assert layer.fastlora.svd_u.dtype == torch.float16
    assert same_bits(layer.fastlora.svd_s, before)
    layer.double()
    assert layer.fastlora.svd_s.dtype == torch.float64
    assert torch.equal(layer.fastlora.svd_s, before.double())
    layer.float()
    assert same_bits(layer.fastlora.svd_s, before)
    layer(torch.randn(2, 6))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("route", ["loop", "product"])
def test_autocast_does_not_reach_into_the_weight(dtype, route: str, monkeypatch) -> None:
    if route == "product":  # as for large weights
        module = sys.modules["fastlora.ops.spectral_weight"]
        monkeypatch.setattr(module, "LOOP", dict.fromkeys(module.LOOP, 0))
    fastlora.ops.spectral_weight.clear()  # the routes that it remembers
    base = nn.Linear(40, 30, dtype=dtype)
    fastlora.inject(base, fastlora.Spectral(), name="s")
    shift_of(base)
    fastlora.fold(base)
    folded = base.fastlora.folded_weight.clone()
    base.fastlora.folded_weight.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        fastlora.fold(base)
    assert same_bits(base.fastlora.folded_weight, folded)
    fastlora.ops.spectral_weight.clear()


def test_a_weight_without_a_decomposition_leaves_the_model_unchanged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(fastlora.AdapterError, match="inject: 1: its weight has no decomposition"):
        fastlora.inject(model, fastlora.Spectral())
    assert_unchanged(model, before)


def test_a_strength_per_sample_is_refused_with_words() -> None:
    layer = nn.Linear(4, 4)
    fastlora.inject(layer, fastlora.Spectral(), name="s")
    with pytest.raises(fastlora.AdapterError, match="changes the weight itself"):
        fastlora.set_scale(layer, {"s": torch.ones(2)})
    layer(torch.randn(2, 4))


def test_parameter_count_is_the_sum_of_the_smaller_sides() -> None:
    model = nn.ModuleList(
        [
            nn.Linear(14, 9),
            nn.Conv2d(4, 30, 3),
            nn.Conv2d(4, 40, 3),
            nn.Embedding(13, 6),
            nn.LayerNorm(8),
        ]
    )
    assert fastlora.inject(model, fastlora.Spectral()).parameters == 9 + 30 + 36 + 6 + 8
    assert len(fastlora.parameters(model)) == 5


def test_a_sparse_embedding_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(20, 6, sparse=True))
    with pytest.raises(fastlora.AdapterError, match="dense gradients"):
        fastlora.inject(model, fastlora.Spectral(), where=["0"], name="s")
    fastlora.inject(model, fastlora.LoRA(rank=2), name="l")
