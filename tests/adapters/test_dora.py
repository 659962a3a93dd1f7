"""DoRA against `m (W + sUD) / ‖W + sUD‖` with U D formed in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.adapters.oracles import (
    adapted_weight,
    assert_twofold,
    lora_delta,
    plain_low_rank,
    randomise,
    same_bits,
    spectral_weight,
    with_weight,
)

LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda d: nn.Linear(14, 9, dtype=d), lambda d: torch.randn(2, 5, 14, dtype=d)),
    "linear_no_bias": (
        lambda d: nn.Linear(14, 60, bias=False, dtype=d),
        lambda d: torch.randn(14, dtype=d),
    ),
    "conv": (
        lambda d: nn.Conv2d(6, 8, 3, padding=1, stride=2, dtype=d),
        lambda d: torch.randn(2, 6, 7, 8, dtype=d),
    ),
    "conv_groups": (
        lambda d: nn.Conv2d(6, 8, 3, groups=2, padding=1, padding_mode="reflect", dtype=d),
        lambda d: torch.randn(2, 6, 7, 8, dtype=d),
    ),
    "conv_single": (
        lambda d: nn.Conv2d(6, 8, (1, 3), bias=False, dtype=d),
        lambda d: torch.randn(6, 7, 8, dtype=d),
    ),
    "embedding": (
        lambda d: nn.Embedding(13, 6, dtype=d),
        lambda d: torch.tensor([[1, 12], [0, 5]]),
    ),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@layers
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scale", [1.0, 0.4, -1.5])
def test_dora(layer: Any, dtype: torch.dtype, scale: float) -> None:
    base, x = layer[0](dtype), layer[1](dtype)
    plain = copy.deepcopy(base)
    fastlora.inject(base, fastlora.LoRA(rank=4, alpha=2, dora=True), name="a", seed=0)
    randomise(base)
    fastlora.set_scale(base, {"a": scale})
    slot, strength = base.fastlora["a"], (torch.tensor(scale) * 0.5).item()
    exact = with_weight(plain, adapted_weight(plain, [(slot, strength)]), x)
    reference = plain_low_rank(plain, [(slot, strength)], x)
    with torch.no_grad():
        assert_twofold(base(x), exact, reference, roundings=2)
    y = base(x)
    assert y.requires_grad
    assert_twofold(y, exact, reference, roundings=2)
    fastlora.fold(base)
    assert_twofold(base(x), exact, reference, roundings=2)


@layers
def test_off_means_the_base_and_not_its_magnitude(layer: Any) -> None:
    base, x = layer[0](torch.float32), layer[1](torch.float32)
    before = base(x).detach()
    fastlora.inject(base, fastlora.LoRA(rank=4, dora=True), name="a")
    randomise(base)
    with fastlora.scaled(base, {"a": 0.0}):
        assert same_bits(base(x).detach(), before)
    with fastlora.disable(base):
        assert same_bits(base(x).detach(), before)
    assert (base(x) - before).abs().max() > 0.05


@layers
def test_several_doras_and_loras_add_their_changes(layer: Any) -> None:
    base, x = layer[0](torch.float64), layer[1](torch.float64)
    plain = copy.deepcopy(base)
    specs = {
        "a": fastlora.LoRA(rank=4, alpha=2, dora=True),
        "b": fastlora.LoRA(rank=2),
        "c": fastlora.LoRA(rank=6, alpha=6, dora=True),
    }
    for name, spec in specs.items():
        fastlora.inject(base, spec, name=name)
    randomise(base)
    scales = {"a": 0.5, "b": -1.0, "c": 2.0}
    fastlora.set_scale(base, scales)
    slots = [(base.fastlora[n], scales[n] * specs[n].ratio) for n in specs]
    exact = with_weight(plain, adapted_weight(plain, slots), x)
    torch.testing.assert_close(base(x), exact, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(base(x), exact, rtol=1e-12, atol=1e-12)
    fastlora.fold(base)
    torch.testing.assert_close(base(x), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_norm_is_that_of_the_spectrally_shifted_weight(kind: str) -> None:
    make, data = LAYERS[kind]
    base, x = make(torch.float64), data(torch.float64)
    plain = copy.deepcopy(base)
    fastlora.inject(base, fastlora.Spectral(), name="s")
    fastlora.inject(base, fastlora.LoRA(rank=3, dora=True), name="d")
    randomise(base)
    shifted = copy.deepcopy(plain)
    with torch.no_grad():
        shifted.weight.copy_(spectral_weight(plain, base.fastlora["s"].shift, 1.0))
    exact = with_weight(plain, adapted_weight(shifted, [(base.fastlora["d"], 1.0)]), x)
    for _ in range(2):
        torch.testing.assert_close(base(x), exact, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(base(x), exact, rtol=1e-9, atol=1e-9)
        fastlora.fold(base)
        torch.testing.assert_close(base(x), exact, rtol=1e-9, atol=1e-9)
        fastlora.unfold(base)


@layers
def test_gradients_are_those_of_the_formula_with_a_detached_norm(layer: Any) -> None:
    base, x = layer[0](torch.float64), layer[1](torch.float64)
    plain = copy.deepcopy(base)
    fastlora.inject(base, fastlora.LoRA(rank=4, dora=True), name="a")
    randomise(base)
    fastlora.set_scale(base, {"a": 0.5})
    slot = base.fastlora["a"]
    if x.is_floating_point():
        x.requires_grad_()
    probe = torch.randn_like(base(x))
    wanted = [slot.down, slot.up, slot.magnitude, *([x] if x.is_floating_point() else [])]
    got = torch.autograd.grad((base(x) * probe).sum(), wanted)

    down, up, m = (p.detach().clone().requires_grad_() for p in wanted[:3])
    if isinstance(plain, nn.Embedding):
        delta = 0.5 * (up @ down).t()
    elif isinstance(plain, nn.Conv2d):
        parts = [
            u.flatten(1) @ d.flatten(1)
            for u, d in zip(up.chunk(plain.groups), down.chunk(plain.groups), strict=True)
        ]
        delta = 0.5 * torch.cat(parts).view(plain.weight.shape)
    else:
        delta = 0.5 * up @ down
    torch.testing.assert_close(delta, lora_delta(plain, slot, 0.5))
    whole = plain.weight.detach() + delta
    dim = [0] if isinstance(plain, nn.Embedding) else list(range(1, whole.dim()))
    norm = whole.detach().square().sum(dim, keepdim=True).sqrt()
    weight = m.view(norm.shape) * whole / norm
    y = torch.func.functional_call(plain, {"weight": weight}, (x,))
    inputs = [down, up, m, *([x] if x.is_floating_point() else [])]
    expected = torch.autograd.grad((y * probe).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_strength_per_sample_is_refused_with_words() -> None:
    layer = nn.Linear(4, 4)
    fastlora.inject(layer, fastlora.LoRA(rank=2, dora=True), name="a")
    with pytest.raises(fastlora.AdapterError, match="'a' .dora. has DoRA's norm, which depends on"):
        fastlora.set_scale(layer, {"a": torch.ones(3)})
    layer(torch.randn(3, 4))
    layer._state.arena.set({"a": torch.ones(3)}, {})
    with pytest.raises(fastlora.AdapterError, match="DoRA's norm depends on the strength"):
        layer(torch.randn(3, 4))


def test_the_kept_products_follow_every_change_of_weight_and_adapter() -> None:
    layer = nn.Linear(6, 5)
    fastlora.inject(layer, fastlora.LoRA(rank=3, dora=True), name="a")
    randomise(layer)
    slot, x = layer.fastlora["a"], torch.randn(4, 6)

    def check() -> None:
        plain = nn.Linear(6, 5)
        plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
        exact = with_weight(plain, adapted_weight(plain, [(slot, 1.0)]), x)
        with torch.no_grad():
            torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)

    check()
    with torch.no_grad():
        slot.down.mul_(2)
    check()
    slot.down.data.copy_(torch.randn(3, 6))  # leaves no trace in the version counter
    check()
    slot.down.data = torch.randn(3, 6)
    check()
    with torch.no_grad():
        layer.weight.add_(1)
    check()
    layer.weight.data = torch.randn(5, 6)
    check()
    layer.weight = nn.Parameter(torch.randn(5, 6))
    check()
    with torch.inference_mode():
        slot.up.copy_(torch.randn(5, 3))
        slot.down.copy_(torch.randn(3, 6))
        layer(x)
    check()


def test_a_row_of_zeros_has_no_nan() -> None:
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight[1] = 0
    fastlora.inject(layer, fastlora.LoRA(rank=2, dora=True), name="a")
    y = layer(torch.randn(2, 4))
    assert y.isfinite().all() and y[:, 1].abs().max() == 0
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in fastlora.parameters(layer))


def test_dora_on_an_embedding_with_max_norm_is_refused() -> None:
    with pytest.raises(fastlora.AdapterError, match="max_norm"):
        fastlora.inject(
            nn.Embedding(4, 3, max_norm=1.0), fastlora.LoRA(rank=2, dora=True), where=""
        )
