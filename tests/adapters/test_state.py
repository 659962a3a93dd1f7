"""State dicts, copies, pickles, dtypes and devices of adapted models, and who sees whose memory."""

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
from fastlora.adapters.control import arenas
from tests.adapters.oracles import assert_unchanged, randomise, same_bits, snapshot
from tests.adapters.test_control import Net


def mixed() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net()
    fastlora.inject(model, fastlora.LoRA(rank=4, alpha=2, dora=True), name="a", seed=0)
    fastlora.inject(model, fastlora.LoRA(rank=2), where=["conv", "inner.2"], name="b")
    fastlora.inject(model, fastlora.Spectral(), where=["norm", "inner.0"], name="s")
    randomise(model, size=0.5)
    fastlora.set_scale(model, {"a": 0.5, "b": -2.0})
    return model, torch.randint(0, 12, (5, 4))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


# --- state dicts ------------------------------------------------------------------------------


def test_keys_of_the_base_stay_and_adapters_have_their_own() -> None:
    keys = list(Net().state_dict())
    model, _ = mixed()
    adapted = list(model.state_dict())
    assert [k for k in adapted if ".fastlora." not in k] == keys
    assert "conv.fastlora.a.magnitude" in adapted and "norm.fastlora.s.shift" in adapted


def test_a_base_checkpoint_loads_strictly_and_leaves_adapters_alone() -> None:
    model, x = mixed()
    model(x)
    other, mine = Net(), values(model)
    result = model.load_state_dict(other.state_dict(), strict=True)
    assert result.missing_keys == [] and result.unexpected_keys == []
    for key, value in model.state_dict().items():
        assert same_bits(value, mine[key] if ".fastlora." in key else other.state_dict()[key])
    fastlora.disable(model)
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_an_adapted_checkpoint_loads_strictly(assign: bool) -> None:
    source, x = mixed()
    target, _ = mixed()
    randomise(target, seed=9)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert not torch.allclose(target(x), source(x))
    result = target.load_state_dict(values(source), strict=True, assign=assign)
    assert result.missing_keys == [] and result.unexpected_keys == []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(target(x), source(x))


def test_incomplete_or_foreign_adapter_keys_are_errors_under_strict() -> None:
    model, _ = mixed()
    state = values(model)
    del state["conv.fastlora.a.up"]
    with pytest.raises(RuntimeError, match="Missing key.*conv.fastlora.a.up"):
        model.load_state_dict(state)
    state = values(model)
    state["conv.fastlora.other.up"] = torch.ones(1)
    with pytest.raises(RuntimeError, match="Unexpected key.*conv.fastlora.other.up"):
        model.load_state_dict(state)


def test_the_plain_model_loads_what_is_left_after_remove() -> None:
    torch.manual_seed(0)
    model = Net()
    before, keys = snapshot(model), list(model.state_dict())
    x = torch.randint(0, 12, (5, 4))
    y = model(x).detach()
    model.norm.weight.requires_grad_(False)
    before["grad"]["norm.weight"] = False
    fastlora.inject(model, fastlora.LoRA(rank=4, dora=True), name="a")
    fastlora.inject(model, fastlora.Spectral(), name="s")
    assert not any(p.requires_grad for k, p in model.named_parameters() if "fastlora" not in k)
    randomise(model)
    fastlora.remove(model, "a")
    assert not model.conv.weight.requires_grad
    fastlora.remove(model, "s")
    assert_unchanged(model, before)
    assert list(model.state_dict()) == keys
    assert same_bits(model(x).detach(), y)
    Net().load_state_dict(model.state_dict(), strict=True)


def test_freezing_can_be_left_to_the_caller() -> None:
    model = Net()
    fastlora.inject(model, fastlora.LoRA(rank=4), freeze=False)
    assert all(p.requires_grad for p in model.parameters())
    model(torch.randint(0, 12, (5, 4))).sum().backward()
    assert model.conv.weight.grad is not None
    fastlora.remove(model, "default")
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_does_not_freeze_the_first() -> None:
    model = Net()
    fastlora.inject(model, fastlora.LoRA(rank=4), name="a")
    fastlora.inject(model, fastlora.LoRA(rank=4), name="b")
    assert all(p.requires_grad for p in fastlora.parameters(model))
    model.conv.weight.requires_grad_(True)  # the caller's own choice
    fastlora.remove(model, "b")
    assert model.conv.weight.requires_grad and not model.grouped.weight.requires_grad


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
    assert len(arenas(model)[0]._owners) == total


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


# --- dtypes and devices -----------------------------------------------------------------------


CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "half_and_back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "used"])
def test_gates_stay_float32_when_the_model_is_converted(convert: Any, warm: bool) -> None:
    model, x = mixed()
    fastlora.set_scale(model, {"a": 0.1})  # not a number of 16 bits
    if warm:
        model(x)
    twin = Net()
    (buffer,) = arenas(model)[0]._values.values()
    before, address = buffer.clone(), buffer.data_ptr()
    result = convert(model)
    assert result is model
    (after,) = arenas(model)[0]._values.values()
    assert after.dtype == torch.float32 and same_bits(after, before)
    assert after.data_ptr() == address
    dtype = model.conv.weight.dtype
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert model(x).dtype == dtype
    # against the same parameters in float64
    exact = copy.deepcopy(model).double()(x)
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(model(x).double(), exact, rtol=tolerance, atol=tolerance)
    for name in ("a", "b", "s"):
        fastlora.remove(model, name)
    assert list(model.state_dict()) == list(twin.state_dict())


def test_the_meta_device_and_back() -> None:
    model, x = mixed()
    state = values(model)
    fastlora.fold(model)
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())
    assert model(x.to("meta")).is_meta
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.load_state_dict(state)
    fresh, _ = mixed()
    fastlora.disable(model, "s")  # shifts need their factors, which do not come back by themselves
    fastlora.disable(fresh, "s")
    fastlora.unfold(model)
    torch.testing.assert_close(model(x), fresh(x))


def test_shared_memory() -> None:
    model, x = mixed()
    y = model(x)
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters())
    assert same_bits(model(x), y)


def test_data_parallel_is_refused_in_words() -> None:
    model, _ = mixed()
    with pytest.raises(fastlora.AdapterError, match="DistributedDataParallel"):
        model.conv._replicate_for_data_parallel()  # what torch.nn.DataParallel calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_offloading_works_with_preloading_and_is_refused_without() -> None:
    accelerate = pytest.importorskip("accelerate")
    cpu = torch.device("cpu")
    for warm in (True, False):
        model, x = mixed()
        with torch.no_grad():
            y = copy.deepcopy(model)(x)
            if warm:
                model(x)
            offloaded = accelerate.cpu_offload(copy.deepcopy(model), cpu)
            with pytest.raises(ValueError, match="meta"):
                offloaded(x)
            names = sorted({type(m).__name__ for m in adapted_layers(model).values()})
            whole = accelerate.cpu_offload(model, cpu, preload_module_classes=names)
            torch.testing.assert_close(whole(x), y)
            fastlora.set_scale(model, {"a": 0.125})
            assert not torch.allclose(whole(x), y)
            fastlora.set_scale(model, {"a": 0.5})
            torch.testing.assert_close(whole(x), y)


def test_parameters_on_the_meta_device_beside_real_ones_are_never_computed_with() -> None:
    layer = nn.Linear(4, 4)
    fastlora.inject(layer, fastlora.LoRA(rank=2))
    x = torch.randn(2, 4)
    with torch.no_grad():
        layer(x)
        layer.fastlora["default"].to("meta")
        with pytest.raises(fastlora.ContractError, match="expected one device, got cpu and meta"):
            layer(x)


def test_wrapped_models_are_adapted_inside() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    before = snapshot(model)
    assert fastlora.inject(compiled, fastlora.LoRA(rank=4)).modules[:2] == ("embedding", "conv")
    fastlora.set_scale(compiled, 0.5)
    assert fastlora.adapters(compiled) == fastlora.adapters(model)
    fastlora.remove(compiled, "default")
    assert_unchanged(model, before)


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
