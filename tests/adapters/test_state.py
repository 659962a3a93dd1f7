"""State dicts, dtypes and devices of adapted models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.adapters import adapted_layers
from fastlora.adapters.lookup import arenas
from tests.adapters.nets import Net, mixed, values
from tests.adapters.oracles import assert_unchanged, randomise, same_bits, snapshot

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
