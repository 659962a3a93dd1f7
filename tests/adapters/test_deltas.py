"""Updates that are no low-rank slot, against their formulas in float64."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from fastlora.adapters import changed_weight as module
from fastlora.adapters.attaching import attach
from fastlora.adapters.changed_weight import Recipe, changed_weight
from fastlora.adapters.deltas import DeltaSlot, Update
from fastlora.adapters.fitting import slot_from
from fastlora.formats.changes import Change
from tests.adapters.delta_cases import (
    KINDS,
    LAYERS,
    adapt,
    called,
    change_of,
    changed,
    example,
    fits,
    full,
    loha,
    row_norms,
    set_strength,
    update,
)
from tests.adapters.oracles import (
    adapted_weight,
    assert_twofold,
    randomise,
    same_bits,
    spectral_weight,
    with_weight,
)

PAIRS = [
    pytest.param(layer, kind, id=f"{layer}-{kind}")
    for layer in LAYERS
    for kind in KINDS
    if fits(LAYERS[layer][0](torch.float32), kind)
]
every = pytest.mark.parametrize("layer, kind", PAIRS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_every_kind_in_every_layer(layer: str, kind: str, dtype: torch.dtype) -> None:
    base, x = LAYERS[layer][0](dtype), LAYERS[layer][1](dtype)
    plain, change = copy.deepcopy(base), change_of(base, kind, dtype)
    before = called(plain, dict(plain.named_parameters()), x)
    slot = adapt(base, change)
    assert {p.dtype for p in slot.parameters()} == {dtype}
    for strength in (1.0, 0.5, torch.tensor(0.7).item(), -1.0, 0.0):
        set_strength(base, strength)
        exact = called(plain, changed(plain, change, strength), x)
        low = called(plain, changed(plain, change, strength, dtype), x)
        with torch.no_grad():
            y = base(x)
            assert same_bits(base(x), y)
        assert_twofold(y, exact, low)
        assert same_bits(base(x).detach(), y)  # where gradients are recorded
        fastlora.fold(base)
        for name, wanted in changed(plain, change, strength).items():
            made = getattr(base.fastlora, f"folded_{name}")
            assert_rounded_once(getattr(plain, name) if made is None else made, wanted)
        if strength or change.bias is None or plain.bias is not None:  # else zeros are added
            assert same_bits(base(x), y)
        fastlora.unfold(base)
        assert same_bits(base(x).detach(), y)
        if strength == 0:
            assert same_bits(y, before)


def assert_rounded_once(made: Tensor, exact: Tensor) -> None:
    """Computed in float32 or better, then rounded to the dtype that it has."""
    wide = 16 * torch.finfo(torch.float32 if made.dtype != torch.float64 else made.dtype).eps
    allowed = (torch.finfo(made.dtype).eps / 2 + wide) * exact.abs() + wide
    assert ((made.double() - exact).abs() <= allowed).all()


@every
def test_gradients(layer: str, kind: str) -> None:
    """Of the input, the parts and the strength; those of norms are cut, as DoRA's paper says."""
    base, plain, change, x = example(kind, layer)
    slot: DeltaSlot = base.fastlora["d"]
    set_strength(base, 0.7)
    strength = torch.tensor(0.7).double()  # the strength is a float32
    parts = dict(slot.named_parameters())
    inputs = [x.requires_grad_()] if x.is_floating_point() else []
    y = base(x)
    probe = torch.randn_like(y)
    got = torch.autograd.grad((y * probe).sum(), [*inputs, *parts.values()])

    own = copy.deepcopy(change)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parts.items()}
    weight = plain.weight.detach()
    if own.weight is not None:
        for name in own.weight.tensors():
            object.__setattr__(own.weight, name, leaves[name])
        weight = weight + strength * update(own.weight, tuple(weight.shape))
    if own.magnitude is not None:
        length = row_norms(weight, own.axis).detach()
        weight = weight * leaves["magnitude"].view(length.shape) / length
    new = {"weight": weight}
    if own.bias is not None:
        bias = getattr(plain, "bias", None)
        new["bias"] = strength * leaves["bias"] + (0 if bias is None else bias.detach())
    plain._parameters.setdefault("bias", None)
    z = torch.func.functional_call(plain, new, (x,))
    wanted = torch.autograd.grad((z * probe).sum(), [*inputs, *leaves.values()])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [k for k, (_, _, axis) in KINDS.items() if axis is None])
def test_gradcheck(kind: str) -> None:
    layer = "conv" if "tucker" in kind else "linear"
    base, _, _, x = example(kind, layer)
    x = x[:1, :, :3, :3] if layer == "conv" else x[:2]
    names = [f"fastlora.d.{name}" for name in base.fastlora["d"].owned]
    values = [p.detach().clone().requires_grad_() for p in base.fastlora["d"].parameters()]

    def call(x: Tensor, *parts: Tensor) -> Tensor:
        own = dict(zip(names, parts, strict=True))
        return torch.func.functional_call(base, own, (x,))

    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values))


def test_gradients_of_the_strength() -> None:
    base, _, change, _ = example("loha")

    def weight(strength: Tensor) -> Tensor:
        return changed_weight(base, Recipe(None, (Update(change, strength),)))

    assert torch.autograd.gradcheck(weight, torch.tensor(0.7, dtype=torch.float64).requires_grad_())


def test_the_backward_pass_keeps_no_changed_weight() -> None:
    layer = nn.Linear(64, 64)
    adapt(layer, Change(full((64, 64), torch.float32)))
    x = torch.randn(2, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = (layer.weight.data_ptr(), layer.fastlora["d"].diff.data_ptr())
    assert kept
    assert not [
        t for t in kept if isinstance(t, Tensor) and t.numel() > 128 and t.data_ptr() not in own
    ]


# --- beside other adapters ------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 64])
@pytest.mark.parametrize("kind", ["loha", "lokr_dora_in", "full_bias"])
@pytest.mark.parametrize("dora", [False, True])
def test_shifts_then_updates_then_low_rank(tokens: int, kind: str, dora: bool) -> None:
    base, plain, change, _ = example(kind)
    fastlora.inject(base, fastlora.Spectral(), name="s")
    fastlora.inject(base, fastlora.LoRA(rank=3, dora=dora), name="l", seed=0)
    with torch.no_grad():
        base.fastlora["s"].shift.normal_()
        base.fastlora["l"].up.normal_()
    strengths = {"d": 0.5, "s": -0.75, "l": 2.0}
    fastlora.set_scale(base, strengths)
    x = torch.randn(tokens, 12, dtype=torch.float64)

    def expected() -> Tensor:
        middle = copy.deepcopy(plain)
        with torch.no_grad():
            middle.weight.copy_(spectral_weight(plain, base.fastlora["s"].shift, -0.75))
            new = changed(middle, change, 0.5)
            middle.weight.copy_(new["weight"])
            middle.bias.copy_(new["bias"])
        return with_weight(middle, adapted_weight(middle, [(base.fastlora["l"], 2.0)]), x)

    for when in ("forward", "step"):
        with fastlora.materialize(base, when):  # type: ignore[arg-type]
            torch.testing.assert_close(base(x).detach(), expected())
            with torch.no_grad():
                torch.testing.assert_close(base(x), expected())
    with torch.no_grad(), fastlora.steady(base):
        for _ in range(2):
            torch.testing.assert_close(base(x), expected())
    fastlora.fold(base)
    torch.testing.assert_close(base(x), expected())
    fastlora.unfold(base)
    fastlora.remove(base, "s")
    with torch.no_grad():
        middle = copy.deepcopy(plain)
        for name, value in changed(plain, change, 0.5).items():
            getattr(middle, name).copy_(value)
    exact = with_weight(middle, adapted_weight(middle, [(base.fastlora["l"], 2.0)]), x)
    torch.testing.assert_close(base(x).detach(), exact)


def test_weights_of_a_step_are_made_where_shifts_are_all() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    plain = copy.deepcopy(model)
    fastlora.inject(model, fastlora.Spectral(), name="s")
    change = change_of(plain[1], "full", torch.float32)
    attach(model, {"1": slot_from(model[1], change)}, "d")
    x = torch.randn(2, 6)
    with fastlora.materialize(model, "step"):
        y = model(x)
        assert [layer._state.step is None for layer in model] == [False, True]
    new = changed(plain[1], change, 1.0, torch.float32)
    torch.testing.assert_close(y.detach(), called(plain[1], new, plain[0](x)))


def test_a_changed_weight_is_rounded_once() -> None:
    layer = nn.Linear(32, 24, dtype=torch.bfloat16)
    plain, change = copy.deepcopy(layer), Change(loha((24, 32), torch.bfloat16))
    adapt(layer, change)
    fastlora.inject(layer, fastlora.Spectral(), name="s")
    shift = torch.randn(24, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.fastlora["s"].shift.copy_(shift)
    fastlora.fold(layer)
    holder = layer.fastlora
    c = (holder.svd_s + shift.float()).clamp_min(0) - holder.svd_s
    exact = plain.weight.double() + (holder.svd_u.double() * c.double()) @ holder.svd_vh.double()
    exact = exact + update(change.weight, (24, 32))
    assert_rounded_once(holder.folded_weight, exact)


def test_several_updates_add_up_and_a_magnitude_is_its_own() -> None:
    """As DoRA beside LoRA: `W + Δ₁ + (ρ (W + Δ₂) - W)`, in any order."""
    base, plain, change, x = example("loha")
    other = change_of(plain, "full_dora", torch.float64)
    adapt(base, other, "e")
    fastlora.set_scale(base, {"d": -0.5, "e": 0.75})
    weight = plain.weight.detach()
    total = changed(plain, change, -0.5)["weight"] + changed(plain, other, 0.75)["weight"] - weight
    exact = called(plain, {"weight": total, "bias": changed(plain, other, 0.75)["bias"]}, x)
    torch.testing.assert_close(base(x).detach(), exact)
    fastlora.fold(base)
    torch.testing.assert_close(base(x), exact)


def test_beside_a_reserve() -> None:
    model, x = nn.Sequential(nn.Linear(12, 8)), torch.randn(3, 12)
    plain = copy.deepcopy(model[0])
    fastlora.reserve(model, 4)
    fastlora.inject(model, fastlora.LoRA(rank=3), name="l")
    change = change_of(model[0], "full_bias", torch.float32)
    attach(model, {"0": slot_from(model[0], change)}, "d", scale=0.5)
    randomise(model)
    assert [name for name, _ in model[0].fastlora.outside()] == ["d"]
    new = changed(plain, model[0].fastlora["d"].change, 0.5)
    weight = new["weight"] + adapted_weight(plain, [(model[0].fastlora["l"], 1.0)])
    new["weight"] = weight - plain.weight.double()
    exact = called(plain, new, x).float()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x).detach(), exact)


# --- what is kept, compiled, cast -----------------------------------------------------------------


def test_the_kept_weight_follows_every_change() -> None:
    base, plain, change, x = example("full_dora")
    slot = base.fastlora["d"]

    def check(strength: float = 1.0) -> None:
        now = copy.deepcopy(change)
        for part, name in ((now.weight, "diff"), (now, "bias"), (now, "magnitude")):
            object.__setattr__(part, name, getattr(slot, name).detach().clone())
        exact = called(plain, changed(plain, now, strength), x)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(base(x), exact)

    check()
    with torch.no_grad():
        slot.diff.add_(0.3)
    check()
    slot.magnitude.data.mul_(2)  # leaves no trace in the version counter
    check()
    slot.bias.data = torch.randn(8, dtype=torch.float64)
    check()
    set_strength(base, -0.5)
    check(-0.5)
    with torch.no_grad():
        base.weight.data.mul_(0.5)
        plain.weight.mul_(0.5)
    check(-0.5)


def test_steady_blocks_make_the_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, plain, change, x = example("loha")
    made: list[Any] = []
    real = module.changed_weight
    monkeypatch.setattr(module, "changed_weight", lambda *a: made.append(1) or real(*a))
    with torch.no_grad(), fastlora.steady(base):
        for strength, count in ((1.0, 1), (-0.5, 2)):
            set_strength(base, strength)
            for _ in range(3):
                exact = called(plain, changed(plain, change, strength), x)
                torch.testing.assert_close(base(x), exact)
            assert len(made) == count


@pytest.mark.parametrize("kind", ["loha_dora", "lokr_factors", "full_bias", "tucker_dora"])
def test_compiles_once_for_all_strengths(kind: str) -> None:
    base, plain, change, x = example(kind, "conv", torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
        compiled = torch.compile(base, fullgraph=True, backend=counter)
        with torch.no_grad():
            for strength in (1.0, 0.5, 0.0, -1.0):
                set_strength(base, strength)
                exact = called(plain, changed(plain, change, strength), x)
                torch.testing.assert_close(compiled(x).double(), exact, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_autocast_does_not_reach_into_the_weight() -> None:
    base, *_ = example("loha", "linear", torch.float32)
    fastlora.fold(base)
    folded = base.fastlora.folded_weight.clone()
    base.fastlora.folded_weight.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        fastlora.fold(base)
    assert same_bits(base.fastlora.folded_weight, folded)


@pytest.mark.parametrize("layer, kind", [p for p in PAIRS if "conv" in p.id or "linear-" in p.id])
def test_verify(layer: str, kind: str) -> None:
    base, _, _, x = example(kind, layer, torch.bfloat16)
    set_strength(base, 0.75)
    report = fastlora.verify(base, x)
    assert report, str(report)
    fastlora.fold(base)
    assert fastlora.verify(base, x)
    if KINDS[kind][0] is not None:
        base.fastlora.folded_weight.mul_(1.5)
        assert not fastlora.verify(base, x)
