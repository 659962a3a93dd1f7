"""`materialize`: what is kept for the backward pass, and that it makes no difference to results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import ops
from fastlora.adapters.lookup import adapted_layers, arenas
from fastlora.training import train
from tests.adapters.nets import Net
from tests.adapters.oracles import randomise, same_bits, spectral_weight

SETTINGS = pytest.mark.parametrize("when", ["forward", "step"])
MANY = 64  # tokens: enough for W' to be what is cheaper


def shifted(dtype: torch.dtype = torch.float32, size: float = 0.3) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net().to(dtype)
    for name in ("s", "t"):
        fastlora.inject(model, fastlora.Spectral(), name=name)
    randomise(model, size=size)
    fastlora.set_scale(model, {"s": 0.75, "t": -0.5})
    return model, torch.randint(0, 12, (MANY, 4))


def explicit(model: Net, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output and the shifts' gradients, by torch alone on weights written out in float64."""
    plain = Net().double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "fastlora" not in k})
    weights, shifts = {}, []
    for path, layer in adapted_layers(model).items():
        own = [layer.fastlora[n].shift.detach().double().requires_grad_() for n in ("s", "t")]
        shifts += own
        total = 0.75 * own[0] - 0.5 * own[1]
        weight = layer.weight.detach().double()
        if weight.dim() == 1:
            weights[f"{path}.weight"] = weight + total
            continue
        u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        weights[f"{path}.weight"] = ((u * (s + total).clamp_min(0)) @ vh).view(weight.shape)
    y = torch.func.functional_call(plain, weights, (x,))
    return y.detach(), list(torch.autograd.grad(y.square().mean(), shifts))


def trained(model: Net, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = model(x)
    shifts = fastlora.parameters(model)
    return y.detach(), list(torch.autograd.grad(y.square().mean(), shifts))


@SETTINGS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_gradients_are_those_of_the_written_out_weights(when: Any, dtype: torch.dtype) -> None:
    model, x = shifted(dtype)
    exact = explicit(model, x)
    with fastlora.materialize(model, when):
        y, grads = trained(model, x)
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y.double(), exact[0], **tolerance)
    for ours, theirs in zip(grads, exact[1], strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_both_settings_have_the_same_bits(dtype: torch.dtype) -> None:
    model, x = shifted(dtype)
    found = []
    for when in ("forward", "step"):
        with fastlora.materialize(model, when):
            found.append(trained(model, x))
    assert same_bits(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert a.any() and same_bits(a, b)


def test_outside_of_a_block_it_is_forward() -> None:
    model, x = shifted()
    with fastlora.materialize(model, "forward"):
        expected = trained(model, x)
    for a, b in zip(trained(model, x)[1], expected[1], strict=True):
        assert same_bits(a, b)


# --- memory ---------------------------------------------------------------------------------------


def stack(layers: int = 6, width: int = 96, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, dtype=dtype) for _ in range(layers)))
    fastlora.inject(model, fastlora.Spectral())
    randomise(model, size=0.1)
    return model


def left_after(run: Callable[[], Any]) -> int:
    """Bytes that torch has allocated in it and not given back while its result lives."""
    run()  # plans and decompositions are made
    with torch.profiler.profile(profile_memory=True) as found:
        result = run()
    left = sum(e.self_cpu_memory_usage for e in found.events())
    del result
    return left


def test_forward_keeps_no_weight_for_the_backward_pass() -> None:
    """What is left after the forward pass is less than a single W'; on plain layers all of them."""
    model, x = stack(), torch.randn(MANY, 96, requires_grad=True)
    activations = (len(model) + 1) * x.nbytes

    def by_hand() -> Tensor:
        y = x
        for layer in model:
            f = layer.fastlora
            shift, one = f["default"].shift, torch.ones(())
            weight = ops.spectral_weight(layer.weight, f.svd_u, f.svd_s, f.svd_vh, shift, one)
            y = nn.functional.linear(y, weight, layer.bias)
        return y

    one = model[0].weight.nbytes
    assert left_after(by_hand) > len(model) * one
    assert left_after(lambda: model(x)) < activations + one / 2


def test_forward_under_autocast_keeps_none_either() -> None:
    model, x = stack(), torch.randn(MANY, 96, requires_grad=True)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return model(x)

    one = model[0].weight.nbytes // 2
    assert left_after(run) < (len(model) + 2) * x.nbytes + one
    expected = copy.deepcopy(model)
    with fastlora.materialize(expected, "step"), torch.autocast("cpu", torch.bfloat16):
        other = expected(x)
    ours = run()
    assert ours.dtype == torch.bfloat16 and same_bits(ours.detach(), other.detach())
    for a, b in zip(*(grads_of(m, y) for m, y in ((model, ours), (expected, other))), strict=True):
        assert same_bits(a, b)


def grads_of(model: nn.Module, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.float().square().mean(), fastlora.parameters(model))


def test_factors_stay_in_the_weight_s_dtype_and_shifts_wide() -> None:
    model = stack(dtype=torch.bfloat16)
    for when in ("forward", "step"):
        with fastlora.materialize(model, when):
            model(torch.randn(MANY, 96, dtype=torch.bfloat16)).sum().backward()
        for layer in model:
            held = layer.fastlora
            assert held.svd_u.dtype == held.svd_vh.dtype == torch.bfloat16
            assert held.svd_s.dtype == held["default"].shift.dtype == torch.float32
            assert held["default"].shift.grad.dtype == torch.float32


# --- what autograd would have noticed -------------------------------------------------------------


@SETTINGS
@pytest.mark.parametrize("what", ["shift", "weight", "x"])
def test_what_is_changed_before_the_backward_pass_is_an_error(what: str, when: Any) -> None:
    layer, x = stack(1)[0], torch.randn(MANY, 96)
    inside = x * torch.ones((), requires_grad=True)
    with fastlora.materialize(layer, when):
        y = layer(inside)
    if what == "weight" and when == "step":  # kept: the backward pass reads W' alone
        return
    changed = {"shift": layer.fastlora["default"].shift, "weight": layer.weight, "x": inside}[what]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_strengths_may_change_before_the_backward_pass() -> None:
    for when in ("forward", "step"):
        model, x = shifted(torch.float64)
        exact = explicit(model, x)[1]
        with fastlora.materialize(model, when):
            y = model(x)
            fastlora.set_scale(model, {"s": 3.0, "t": 4.0})
            grads = torch.autograd.grad(y.square().mean(), fastlora.parameters(model))
        for ours, theirs in zip(grads, exact, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_checkpointing_drops_the_activations_of_adapted_layers() -> None:
    model, x = shifted(torch.float64)
    exact = explicit(model, x)[1]
    for when in ("forward", "step"):
        with fastlora.materialize(model, when):
            y = checkpoint(model, x, use_reentrant=False)
            grads = torch.autograd.grad(y.square().mean(), fastlora.parameters(model))
        for ours, theirs in zip(grads, exact, strict=True):
            torch.testing.assert_close(ours, theirs)
    deep, x = stack(), torch.randn(MANY, 96, requires_grad=True)
    left = left_after(lambda: checkpoint(deep, x, use_reentrant=False))
    assert left < 2 * x.nbytes  # of the result, not of six layers


def test_hooks_around_it_see_what_is_saved_beside_the_weight() -> None:
    layer, x = stack(1)[0], torch.randn(MANY, 96, requires_grad=True)
    seen: list[Any] = []

    def pack(t: Tensor) -> Tensor:
        seen.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    expected = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), expected)
    assert x.shape in seen


def test_twice_differentiable_in_the_input() -> None:
    model, _ = stack(2, 8, torch.float64), None
    x = torch.randn(MANY, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    fastlora.fold(plain, permanent=True)
    found = []
    for one in (model, plain):
        inside = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(one(inside).pow(3).sum(), inside, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), inside))
    torch.testing.assert_close(*found)


@SETTINGS
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_functorch_differentiates_the_formula(when: Any) -> None:
    model = stack(2, 8, torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    fastlora.fold(plain, permanent=True)
    with fastlora.materialize(model, when):
        ours = torch.func.grad(lambda x: model(x).square().sum())(x)
        rows = torch.func.vmap(model)(x)
        _, forward = torch.func.jvp(model, (x,), (x,))
    torch.testing.assert_close(ours, torch.func.grad(lambda x: plain(x).square().sum())(x))
    torch.testing.assert_close(rows, plain(x))
    torch.testing.assert_close(forward, torch.func.jvp(plain, (x,), (x,))[1])


# --- "step" ---------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of layers in each grouped call."""
    calls: list[int] = []
    grouped = ops.spectral_weights

    def counted(weights: list[Tensor], *rest: Any) -> None:
        calls.append(len(weights))
        grouped(weights, *rest)

    monkeypatch.setattr(ops, "spectral_weights", counted)
    yield calls


def test_step_makes_all_weights_in_one_call_for_each_step(made: list[int]) -> None:
    model, x = shifted()
    shifts = fastlora.parameters(model)
    optimiser = torch.optim.AdamW(shifts, lr=1e-2)
    with fastlora.materialize(model, "step"):
        for step in range(3):
            for _ in range(2):  # gradients add up over two passes
                model(x).square().mean().backward()
            assert made == [5] * (step + 1)  # of all but the norm
            optimiser.step()
            optimiser.zero_grad()
        with torch.no_grad():  # looking at the result meanwhile
            model(x), model(x)
        assert len(made) == 4


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_step_sees_every_optimiser_s_steps(kind: Any, options: dict[str, bool]) -> None:
    """Fused ones leave the version counters of what they write alone."""
    layer, x = nn.Linear(12, 9, dtype=torch.float64), torch.randn(MANY, 12, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    fastlora.inject(layer, fastlora.Spectral(), name="s")
    optimiser = kind(fastlora.parameters(layer), lr=0.1, **options)
    with fastlora.materialize(layer, "step"):
        for _ in range(2):
            optimiser.zero_grad()
            layer(x).square().mean().backward()
            optimiser.step()
            weight = spectral_weight(plain, layer.fastlora["s"].shift, 1.0)
            torch.testing.assert_close(layer(x), x @ weight.T + plain.bias.detach())


def test_step_follows_what_changes(made: list[int]) -> None:
    layer, x = nn.Linear(12, 9, dtype=torch.float64), torch.randn(MANY, 12, dtype=torch.float64)
    plain = copy.deepcopy(layer)
    fastlora.inject(layer, fastlora.Spectral(), name="s")
    randomise(layer)
    slot = layer.fastlora["s"]

    def check(scale: float, calls: int) -> None:
        weight = spectral_weight(plain, slot.shift, scale)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(layer(x), x @ weight.T + plain.bias.detach())
        assert len(made) == calls

    with fastlora.materialize(layer, "step"):
        check(1.0, 1)
        with torch.no_grad():
            slot.shift.add_(0.25)
        check(1.0, 2)
        with torch.inference_mode():
            slot.shift.mul_(0.5)
        check(1.0, 3)
        fastlora.set_scale(layer, {"s": -0.5})
        check(-0.5, 4)
        with fastlora.scaled(layer, {"s": 0.0}):
            torch.testing.assert_close(layer(x), plain(x))
        check(-0.5, 5)
        slot.shift.data = torch.randn(9, dtype=torch.float64)
        check(-0.5, 6)
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
        check(-0.5, 7)
        with fastlora.materialize(layer, "forward"):
            check(-0.5, 7)
        check(-0.5, 7)
    assert layer._state.step is None
    check(-0.5, 7)


def test_step_is_no_part_of_copies_and_ends_with_an_error() -> None:
    model, x = shifted()
    with pytest.raises(KeyError), fastlora.materialize(model, "step"):
        model(x)
        other = copy.deepcopy(model)
        raise KeyError
    for one in (model, other):
        assert all(a.materialize == "forward" for a in arenas(one))
        assert all(m._state.step is None for m in adapted_layers(one).values())


@SETTINGS
def test_beside_a_learned_strength(when: Any) -> None:
    """A LoRA in the same layer whose strengths per sample are learned: gradients of the strengths
    and of the shifts are those of the formula."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6).double()
    fastlora.inject(layer, fastlora.Spectral(), name="shifts")
    fastlora.inject(layer, fastlora.LoRA(2), name="low", seed=0)
    randomise(layer, size=0.2)
    scale = torch.randn(3, dtype=torch.float64, requires_grad=True)
    fastlora.set_scale(layer, {"low": scale})
    x, dy = torch.randn(3, 40, 8).double(), torch.randn(3, 40, 6).double()
    (shift,) = fastlora.parameters(layer, "shifts")
    down, up = fastlora.parameters(layer, "low")
    with fastlora.materialize(layer, when):
        got = torch.autograd.grad((layer(x) * dy).sum(), [shift, scale])

    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    # Signs of singular vectors do not matter: they come in pairs.
    weight = u @ torch.diag((s + shift).relu()) @ vh
    low = scale[:, None, None] * (x @ down.detach().t() @ up.detach().t())
    y = x @ weight.t() + layer.bias + low
    for mine, theirs in zip(got, torch.autograd.grad((y * dy).sum(), [shift, scale]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)  # strengths are float32


def test_another_word_is_an_error() -> None:
    with pytest.raises(fastlora.AdapterError, match="materialize: expected 'forward' or 'step'"):
        with fastlora.materialize(nn.Linear(2, 2), "never"):  # type: ignore[arg-type]
            pass


def test_without_adapters_it_is_an_error() -> None:
    with pytest.raises(fastlora.AdapterError, match="the model has no adapters; inject them first"):
        with fastlora.materialize(nn.Linear(2, 2), "step"):
            pass


@SETTINGS
def test_train_passes_it_on(when: Any) -> None:
    """And the shifts that come out are the same in either."""
    model, seen = stack(2, 8), []
    schedule = fastlora.Schedule.cosine()

    def loss(model: nn.Module, batch: Any, *_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        seen.extend(a.materialize for a in arenas(model))
        value = model(batch["x0"]).square().mean()
        return value, {"loss": value.detach()}

    def run(setting: Any) -> list[Tensor]:
        one = copy.deepcopy(model)
        train(
            one,
            loss,
            lambda generator: {"x0": torch.randn(MANY, 8, generator=generator)},
            schedule,
            steps=3,
            lr=1e-2,
            materialize=setting,
            progress=False,
        )
        return fastlora.parameters(one)

    expected = run(None)
    assert seen == ["forward"] * 3
    for a, b in zip(run(when), expected, strict=True):
        assert same_bits(a, b)
    assert seen[3:] == [when] * 3
