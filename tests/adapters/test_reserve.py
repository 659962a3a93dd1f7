"""`reserve`: several adapters as one low-rank product, at addresses that stay."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastlora
from fastlora.adapters import layers as layers_module
from fastlora.adapters.lookup import adapted_layers, arenas
from fastlora.adapters.slots import in_place
from tests.adapters.nets import Net
from tests.adapters.oracles import assert_unchanged, randomise, snapshot

WHERE = ["embedding", "conv", "inner.0", "inner.2"]  # all but the grouped convolution


def twins(rank: int = 12, adapters: tuple[tuple[str, int], ...] = (("a", 4), ("b", 2))) -> Any:
    """The same adapted net with and without a reserve, and an input."""
    torch.manual_seed(0)
    plain = Net().eval()
    reserved = copy.deepcopy(plain)
    fastlora.reserve(reserved, rank)
    for name, width in adapters:
        for model in (plain, reserved):
            fastlora.inject(model, fastlora.LoRA(width, alpha=3.0), WHERE, name, seed=0)
    for model in (plain, reserved):
        randomise(model, size=0.5)
    return reserved, plain, torch.randint(0, 12, (5, 4))


def close(reserved: nn.Module, plain: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(reserved(x), plain(x), rtol=1e-4, atol=1e-5)


def addresses(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Where D, U and the gates of every reserve are."""
    found = {}
    for path, layer in adapted_layers(model).items():
        holder, state = layer.fastlora, layer._state
        if holder.capacity:
            gate = state.arena.gate(holder.reserved_down.device, state.offset, holder.capacity)
            tensors = (holder.reserved_down, holder.reserved_up, gate)
            found[path] = tuple(t.data_ptr() for t in tensors)
    return found


def test_a_reserve_alone_changes_no_bit() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randint(0, 12, (5, 4))
    before = snapshot(model)
    model.requires_grad_(False)  # torch itself computes in another way where parameters train
    y = model(x)
    model.requires_grad_(True)
    info = fastlora.reserve(model, 8)
    assert info.modules == tuple(WHERE) and info.rank == 8
    sizes = (8 * (12 + 16), 8 * (4 * 9 + 8), 8 * (8 + 10), 8 * (10 + 6))
    assert info.bytes == 4 * sum(sizes)
    assert torch.equal(model(x), y)
    assert not any(p.requires_grad for p in model.parameters())
    fastlora.inject(model, fastlora.LoRA(2), ["conv"], "a")
    fastlora.remove(model, "a")
    assert not any(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == before["keys"] and fastlora.adapters(model) == {}
    for function in (fastlora.fold, lambda m: fastlora.set_scale(m, 1.0)):
        with pytest.raises(fastlora.AdapterError, match="the model has no adapters"):
            function(model)
    fastlora.reserve(model, 0)
    assert_unchanged(model, before)


def test_computes_what_separate_adapters_compute() -> None:
    reserved, plain, x = twins()
    close(reserved, plain, x)
    for scales in ({"a": 0.5, "b": -2.0}, {"a": 0.0}, {"a": 1.0, "b": 0.0}, {"a": 0.0}):
        for model in (reserved, plain):
            fastlora.set_scale(model, scales)
        close(reserved, plain, x)
    for model in (reserved, plain):
        fastlora.set_scale(model, {"b": torch.linspace(-1, 1, 5)})
    close(reserved, plain, x)
    for model in (reserved, plain):
        fastlora.set_scale(model, 0.7)
        fastlora.disable(model, "a")
    close(reserved, plain, x)
    for model in (reserved, plain):
        fastlora.fold(model)
    close(reserved, plain, x)


def test_one_product_however_many_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    fastlora.reserve(model, 12)
    for name in "abc":
        fastlora.inject(model, fastlora.LoRA(2), name=name)
    randomise(model)
    ranks, real = [], layers_module.AdaptedLinear.fused

    def spy(x: Tensor, weight: Tensor, bias: Any, down: Tensor, *rest: Any) -> Tensor:
        ranks.append(len(down))
        return real(x, weight, bias, down, *rest)

    monkeypatch.setattr(layers_module.AdaptedLinear, "fused", staticmethod(spy))
    monkeypatch.setattr(torch, "cat", None)  # nothing is put together at a call
    x = torch.randn(3, 6)
    with torch.no_grad():
        for scales in ({}, {"c": 0.0}, {"b": 0.0}, {"a": 0.0}):
            fastlora.set_scale(model, scales)
            model(x), model(x)
    # up to the last adapter that is on; without any the plain layer
    assert ranks == [6, 4, 2], ranks


def test_addresses_stay_while_adapters_come_and_go(tmp_path: Path) -> None:
    reserved, plain, x = twins()
    fastlora.save(plain, tmp_path / "a.safetensors", "a")
    start, close_to = addresses(reserved), lambda: close(reserved, plain, x)
    assert len(start) == len(WHERE)
    for change in (
        lambda m: fastlora.remove(m, "a"),
        lambda m: fastlora.inject(m, fastlora.LoRA(6), WHERE, "c", seed=1),
        lambda m: randomise(m, seed=7, size=0.3),
        lambda m: fastlora.set_scale(m, {"c": 0.3}),
        lambda m: fastlora.load(m, tmp_path / "a.safetensors", "back", 0.5),
        lambda m: fastlora.remove(m, "b"),
        lambda m: fastlora.remove(m, "c"),
        lambda m: fastlora.remove(m, "back"),
        lambda m: fastlora.inject(m, fastlora.LoRA(12), WHERE, "d", seed=1),
        lambda m: randomise(m, seed=8, size=0.3),
    ):
        for model in (reserved, plain):
            change(model)
        close_to()
        assert addresses(reserved) == start


def test_a_graph_that_was_captured_follows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a captured call reads are addresses: the recorded call runs again on the same tensors,
    as a CUDA graph would, after changes that no Python of the layer sees."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8)).eval()
    eager = copy.deepcopy(model)
    fastlora.reserve(model, 8)
    x, calls = torch.randn(4, 6), []
    real = layers_module.lora_linear
    with monkeypatch.context() as patch, torch.no_grad():
        for module in ("state", "layers"):
            patch.setattr(sys.modules[f"fastlora.adapters.{module}"], "is_capturing", lambda: True)
        patch.setattr(layers_module, "lora_linear", lambda *a: calls.append(a) or real(*a))
        model(x)  # nothing is there yet
    (call,) = calls
    assert call[3].shape == (8, 6) and call[4].shape == (8, 8) and call[5].shape == (8,)

    def check() -> None:
        with torch.no_grad():
            torch.testing.assert_close(real(*call), eager(x), rtol=1e-4, atol=1e-5)

    check()
    for change in (
        lambda m: fastlora.inject(m, fastlora.LoRA(2), name="a", seed=0),
        lambda m: randomise(m),
        lambda m: fastlora.set_scale(m, {"a": 0.0}),
        lambda m: fastlora.set_scale(m, {"a": -0.5}),
        lambda m: fastlora.inject(m, fastlora.LoRA(4), name="b", seed=1),
        lambda m: randomise(m, seed=3),
        lambda m: fastlora.disable(m, "a"),
        lambda m: fastlora.enable(m),
        lambda m: fastlora.remove(m, "a"),
        lambda m: fastlora.inject(m, fastlora.LoRA(4), name="c", seed=2),
        lambda m: randomise(m, seed=4),
        lambda m: fastlora.remove(m, "b"),
        lambda m: fastlora.remove(m, "c"),
    ):
        for m in (model, eager):
            change(m)
        check()


def test_pieces_of_room_are_joined() -> None:
    adapters = (("a", 2), ("b", 4), ("c", 2), ("d", 4))
    reserved, plain, x = twins(12, adapters)
    start = addresses(reserved)
    for model in (reserved, plain):
        fastlora.remove(model, "a")
        fastlora.remove(model, "c")
        fastlora.inject(model, fastlora.LoRA(4), WHERE, "e", seed=3)
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                if "e" in layer.fastlora:
                    layer.fastlora["e"].up.fill_(0.1)
    close(reserved, plain, x)
    assert addresses(reserved) == start
    rows = reserved.conv.fastlora.reserved_rows
    spans = sorted((row, row + 4) for row in rows.values())
    assert spans == [(0, 4), (4, 8), (8, 12)], rows


def test_too_little_room_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    reserved, _, x = twins(8)
    fastlora.save(reserved, tmp_path / "a.safetensors", "a")
    before, y, where = snapshot(reserved), reserved(x), addresses(reserved)
    room = "conv: its reserve of rank 8 has room for 2 more and the adapter has rank 4"
    with pytest.raises(fastlora.AdapterError, match=room):
        fastlora.inject(reserved, fastlora.LoRA(4), ["conv"], "c")
    with pytest.raises(fastlora.AdapterError, match=room):
        fastlora.load(reserved, tmp_path / "a.safetensors", "c")
    with pytest.raises(fastlora.AdapterError, match="adapters of rank 6 together, got 5"):
        fastlora.reserve(reserved, 5)
    for rank in (-1, 2.0, True, "8"):
        with pytest.raises(fastlora.AdapterError, match="rank: expected an integer >= 0"):
            fastlora.reserve(reserved, rank)  # type: ignore[arg-type]
    with pytest.raises(fastlora.AdapterError, match="grouped is a grouped convolution"):
        fastlora.reserve(reserved, 8, ["grouped"])
    with pytest.raises(fastlora.AdapterError, match="reserve: where selects .* cannot be adapted"):
        fastlora.reserve(reserved, 8, ["norm"])
    with pytest.raises(fastlora.AdapterError, match="reserve: embedding: dtype: expected"):
        fastlora.reserve(reserved, 8, dtype=torch.float16)
    assert_unchanged(reserved, before)
    assert addresses(reserved) == where and torch.equal(reserved(x), y)


def test_existing_adapters_enter_and_leave() -> None:
    reserved, plain, x = twins()
    later = copy.deepcopy(plain)
    keys = list(later.state_dict())
    parameters = fastlora.parameters(later)
    fastlora.reserve(later, 8)
    close(later, plain, x)
    assert list(map(id, fastlora.parameters(later))) == list(map(id, parameters))
    fastlora.reserve(later, 20)  # more room
    close(later, plain, x)
    assert later.conv.fastlora.capacity == 20
    fastlora.reserve(later, 0)
    close(later, plain, x)
    assert list(later.state_dict()) == keys and later.conv.fastlora.capacity == 0
    assert all(p.is_contiguous() for p in parameters)
    fastlora.reserve(reserved, 6, ["conv"])
    close(reserved, plain, x)


# --- nothing goes stale ---------------------------------------------------------------------------

WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    "in_place": lambda p: p.mul_(-2),
    "data": lambda p: p.data.copy_(torch.ones_like(p)),
    "other_memory": lambda p: setattr(p, "data", torch.full(p.shape, 0.3)),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_anybody_writes_is_seen(write: str) -> None:
    reserved, plain, x = twins()
    close(reserved, plain, x)
    with torch.no_grad():
        for model in (reserved, plain):
            for parameter in fastlora.parameters(model, "b"):
                WRITES[write](parameter)
    close(reserved, plain, x)
    close(copy.deepcopy(reserved), plain, x)


def test_load_state_dict_with_and_without_assign() -> None:
    reserved, plain, x = twins()
    other = copy.deepcopy(plain)
    randomise(other, seed=11, size=0.4)
    for assign in (False, True):
        target = copy.deepcopy(reserved)
        target.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=assign)
        start = addresses(target)
        close(target, other, x)
        assert addresses(target) == start and in_place(target.conv.fastlora.pins)
        down = target.conv.fastlora["b"].down
        assert down.data_ptr() != target.conv.fastlora.reserved_down.data_ptr()
        assert down.untyped_storage().data_ptr() == start["conv"][0]


def test_who_exchanges_values_for_a_while_gets_the_old_ones_back() -> None:
    reserved, plain, x = twins()
    shadow = copy.deepcopy(plain)
    randomise(shadow, seed=11, size=0.4)
    shadows = {k: v.clone() for k, v in shadow.state_dict().items()}
    # memory, as averages of weights do
    theirs = [p.detach().clone() for p in fastlora.parameters(shadow)]
    backup = [p.data for p in fastlora.parameters(reserved)]
    for parameter, other in zip(fastlora.parameters(reserved), theirs, strict=True):
        parameter.data = other
    close(reserved, shadow, x)
    for parameter, other in zip(fastlora.parameters(reserved), backup, strict=True):
        parameter.data = other
    close(reserved, plain, x)
    # parameters
    with torch.no_grad():
        y = torch.func.functional_call(reserved, shadows, (x,))
        torch.testing.assert_close(y, shadow(x), rtol=1e-4, atol=1e-5)
    close(reserved, plain, x)
    # a state, of which the backup is no copy
    state = reserved.state_dict()
    reserved.load_state_dict(shadows, assign=True)
    close(reserved, shadow, x)
    reserved.load_state_dict(state, assign=True)
    close(reserved, plain, x)


def test_a_backup_of_exchanged_memory_survives_adapters_that_come_and_go() -> None:
    reserved, plain, x = twins()
    parameters = fastlora.parameters(reserved)
    backup = [p.data for p in parameters]
    for parameter in parameters:
        parameter.data = parameter.data * 0.5
    fastlora.inject(reserved, fastlora.LoRA(2), WHERE, "c")
    fastlora.remove(reserved, "c")
    for parameter, other in zip(parameters, backup, strict=True):
        parameter.data = other
    close(reserved, plain, x)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_learned_strength_of_odd_ranks(grad: bool) -> None:
    """Gates are made in blocks of equal neighbours; a layer's part may begin at any number."""
    results = []
    for rank in (0, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        if rank:
            fastlora.reserve(model, rank)
        fastlora.inject(model, fastlora.LoRA(2), ["1"], "b", seed=1)
        randomise(model)
        fastlora.set_scale(model, {"b": torch.tensor([0.5, 2.0], requires_grad=True)})
        with torch.set_grad_enabled(grad):
            results.append(model(torch.ones(2, 8)).detach())
    torch.testing.assert_close(*results)


def test_a_replaced_parameter_is_seen() -> None:
    reserved, plain, x = twins()
    for model in (reserved, plain):
        model.inner[0].fastlora["a"].down = nn.Parameter(torch.full((4, 8), 0.2))
    close(reserved, plain, x)


def test_copies_have_reserves_of_their_own() -> None:
    reserved, plain, x = twins()
    buffer = io.BytesIO()
    torch.save(reserved, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(reserved), torch.load(buffer, weights_only=False)):
        assert not set(addresses(twin).values()) & set(addresses(reserved).values())
        close(twin, plain, x)
        with torch.no_grad():
            for parameter in fastlora.parameters(twin):
                parameter.zero_()
        close(reserved, plain, x)
        fastlora.inject(twin, fastlora.LoRA(6), WHERE, "more")
        start = addresses(twin)
        fastlora.remove(twin, "more")
        assert addresses(twin) == start


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_follow_the_model(dtype: torch.dtype) -> None:
    reserved, plain, x = twins()
    reserved.to(dtype), plain.to(dtype)
    assert reserved.conv.fastlora.reserved_up.dtype == dtype
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}
    with torch.no_grad():
        torch.testing.assert_close(reserved(x), plain(x), **tolerance)
    fastlora.inject(reserved, fastlora.LoRA(6), WHERE, "more")  # float32 beside 16 bits
    assert all(p.dtype == dtype for p in fastlora.parameters(reserved, "more"))
    fastlora.remove(reserved, "more")
    reserved.float(), plain.float()
    close(reserved, plain, x)


def test_rows_that_are_left_hold_nothing() -> None:
    """A gate of zero is no protection from infinity."""
    reserved, plain, x = twins()
    for model in (reserved, plain):
        with torch.no_grad():
            for parameter in fastlora.parameters(model, "a"):
                parameter.fill_(float("inf"))
        fastlora.remove(model, "a")
    close(reserved, plain, x)
    for layer in adapted_layers(reserved).values():
        if layer.fastlora.capacity:
            assert layer.fastlora.reserved_down.isfinite().all()
            assert layer.fastlora.reserved_up.isfinite().all()


def test_a_removed_adapter_keeps_its_values() -> None:
    reserved, plain, _ = twins()
    held, expected = (fastlora.parameters(m, "a") for m in (reserved, plain))
    fastlora.remove(reserved, "a")
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))


# --- beside other things --------------------------------------------------------------------------


def test_training_is_as_without_a_reserve() -> None:
    reserved, plain, x = twins()
    for model in (reserved, plain):
        optimizer = torch.optim.AdamW(fastlora.parameters(model), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    close(reserved, plain, x)
    with torch.no_grad():
        randomise(reserved, seed=5), randomise(plain, seed=5)
    scale = torch.linspace(0.1, 1, 5, requires_grad=True)
    grads = []
    for model in (reserved, plain):
        fastlora.set_scale(model, {"b": scale})
        grads.append(torch.autograd.grad(model(x).square().sum(), scale)[0])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_dropout_dora_and_spectral_shifts_stay_right() -> None:
    reserved, plain, x = twins(12, (("a", 4),))
    for model in (reserved, plain):
        fastlora.inject(model, fastlora.LoRA(2, dora=True), ["conv", "inner.2"], "d", seed=1)
        fastlora.inject(model, fastlora.Spectral(), ["norm", "inner.0"], "s", seed=1)
        randomise(model, seed=2, size=0.4)
    assert set(reserved.conv.fastlora.reserved_rows) == {"a"}
    close(reserved, plain, x)
    report = fastlora.verify(reserved, x)
    assert report.passed, str(report)
    reserved, plain, x = twins(12, ())
    for model in (reserved, plain):
        fastlora.inject(model, fastlora.LoRA(4, dropout=0.5), WHERE, "a", seed=1)
        randomise(model)
    close(reserved, plain, x)
    results = []
    for model in (reserved, plain):
        model.train()
        torch.manual_seed(5)
        with torch.no_grad():
            results.append(model(x))
    torch.testing.assert_close(*results)


def test_layers_that_compute_in_a_way_of_their_own() -> None:
    class Mine(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).tanh()

    torch.manual_seed(0)
    plain = nn.Sequential(Mine(6, 8), nn.Linear(8, 4))
    reserved, x = copy.deepcopy(plain), torch.randn(3, 6)
    fastlora.reserve(reserved, 8)
    for model in (reserved, plain):
        for name in "ab":
            fastlora.inject(model, fastlora.LoRA(2), name=name, seed=0)
        randomise(model)
    close(reserved, plain, x)
    alone = nn.Sequential(Mine(6, 8), nn.Linear(8, 4))
    fastlora.reserve(alone, 8)
    fastlora.inject(alone, fastlora.LoRA(2), ["1"], "a")  # nothing of the other is to be folded
    fastlora.fold(alone)
    fastlora.inject(alone, fastlora.LoRA(2), ["1"], "b")
    assert not alone[0]._state.merged and alone[1]._state.merged


def test_saved_files_and_state_dicts_are_those_of_separate_adapters(tmp_path: Path) -> None:
    reserved, plain, x = twins()
    files = []
    for model in (reserved, plain):
        fastlora.save(model, tmp_path / "b.safetensors", "b")
        files.append(load_file(tmp_path / "b.safetensors"))
    assert list(files[0]) == list(files[1])
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())
    state = plain.state_dict()
    assert list(reserved.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in reserved.state_dict().items())
    fastlora.fold(reserved, permanent=True)
    with torch.no_grad():
        torch.testing.assert_close(reserved(x), plain(x), rtol=1e-4, atol=1e-5)
    assert adapted_layers(reserved) == {} and fastlora.adapters(reserved) == {}


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_allocates_its_output_and_h(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96)).to(dtype)
    fastlora.reserve(model, 16)
    for name in "ab":
        fastlora.inject(model, fastlora.LoRA(8), name=name, seed=0)
    x = torch.randn(2, 40, 64, dtype=dtype)
    with fastlora.emulated(runs=1), torch.no_grad():
        model(x)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            y = model(x)
    sizes = [e.self_cpu_memory_usage for e in seen.events() if e.self_cpu_memory_usage > 0]
    h = 2 * 40 * 16 * dtype.itemsize
    assert sum(sizes) in (y.nbytes, y.nbytes + h), sizes


# --- finding what a strength belongs to -----------------------------------------------------------


def test_a_model_that_was_rebuilt_is_walked_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))
    other = copy.deepcopy(model[1])
    for m in (model, other):
        fastlora.inject(m, fastlora.LoRA(2), name="a")
    fastlora.set_scale(model, {"a": 0.5})
    (old,) = arenas(model)
    model[1]._modules["0"] = other[0]  # as replacing tools do
    fastlora.set_scale(model, {"a": 0.25})
    assert [a.scales["a"] for a in arenas(model)] == [0.25, 0.25]
    model[1] = nn.Sequential(nn.Linear(4, 4))
    fastlora.set_scale(model, {"a": 0.75})
    assert arenas(model) == [old] and arenas(other)[0].scales["a"] == 0.25
    twin = copy.deepcopy(model)
    fastlora.set_scale(twin, {"a": 2.0})
    assert old.scales["a"] == 0.75
    fastlora.remove(model, "a")
    assert not any("_fastlora_walk" in vars(m) for m in model.modules())
    with pytest.raises(fastlora.AdapterError, match="no adapter named 'a'; this model has none"):
        fastlora.set_scale(model, {"a": 1.0})


def test_shallow_copies_and_layers_in_layers() -> None:
    class Outer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.inner = nn.Linear(4, 4)

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + self.inner(input)

    torch.manual_seed(0)
    model, x = nn.Sequential(Outer()), torch.randn(3, 4)
    plain = model(x).detach()
    fastlora.inject(model, fastlora.LoRA(2), ["0"], "a")
    fastlora.inject(model, fastlora.LoRA(2), ["0.inner"], "b")
    randomise(model)
    assert sorted(fastlora.adapters(model)) == ["a", "b"]
    fastlora.set_scale(model, {"b": 0.0})
    fastlora.set_scale(model, {"a": 0.0})
    torch.testing.assert_close(model(x), plain)
    fastlora.set_scale(model, 1.0)
    shallow = copy.copy(model)
    shallow._modules = {"0": copy.deepcopy(model[0])}
    y = model(x)
    fastlora.set_scale(shallow, 0.0)
    torch.testing.assert_close(shallow(x), plain)
    torch.testing.assert_close(model(x), y)
    for name in "ab":
        fastlora.remove(model, name)
    torch.testing.assert_close(model(x), plain)


def test_gradients_and_loads_follow_into_the_buffers() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    fastlora.inject(model, fastlora.LoRA(2), name="a", seed=0)
    randomise(model)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in fastlora.parameters(model)]
    model.bfloat16()
    for parameter in fastlora.parameters(model):
        parameter.grad = parameter.grad.bfloat16()
    fastlora.reserve(model, 4, dtype=torch.float32)
    for parameter, grad in zip(fastlora.parameters(model), expected, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-2, atol=1e-2)
    model.float()
    with torch.no_grad():
        model(x)
        slots = model[0].fastlora
        slots.load_state_dict({k: 2 * v for k, v in slots.state_dict().items()}, assign=True)
        packed = model(x)
    torch.testing.assert_close(packed, model(x).detach())  # with gradients: from the parameters
    with pytest.raises(fastlora.AdapterError, match="dtype: expected a torch.dtype, got 'float32'"):
        fastlora.reserve(model, 8, dtype="float32")  # type: ignore[arg-type]
