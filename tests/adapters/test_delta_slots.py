"""What a model with DeltaSlots does as one with any other adapters."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import AdapterError
from fastlora.adapters.attaching import attach
from fastlora.adapters.fitting import slot_from
from fastlora.formats.changes import Change
from tests.adapters.delta_cases import (
    KINDS,
    LAYERS,
    called,
    change_of,
    changed,
    drawn,
    example,
    fits,
    set_strength,
)
from tests.adapters.oracles import assert_unchanged, same_bits, snapshot

F64 = torch.float64


def model_of(*kinds: str) -> tuple[nn.Sequential, nn.Sequential, list[Change], Tensor]:
    """(adapted, plain, changes, input): linear layers and a norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 8)).double()
    plain, changes = copy.deepcopy(model), []
    slots = {}
    for i, kind in enumerate(kinds):
        changes.append(change_of(model[i], kind, F64))
        slots[str(i)] = slot_from(model[i], copy.deepcopy(changes[-1]))
    attach(model, slots, "d")
    return model, plain, changes, drawn(5, 12)


def expected(plain: Any, changes: list[Change], x: Tensor, strength: float = 1.0) -> Tensor:
    for layer, change in zip(plain, changes, strict=True):
        x = called(layer, changed(layer, change, strength), x)
    return x


ALL = ("loha", "full_bias", "lokr_dora_in")


def test_a_model() -> None:
    model, plain, changes, x = model_of(*ALL)
    info = fastlora.adapters(model)["d"]
    assert (info.kind, info.modules, info.rank) == ("loha+full+lokr (dora)", ("0", "1", "2"), 2)
    assert info.parameters == sum(p.numel() for p in fastlora.parameters(model, "d"))
    torch.testing.assert_close(model(x).detach(), expected(plain, changes, x))
    with fastlora.scaled(model, {"d": -0.5}):
        torch.testing.assert_close(model(x).detach(), expected(plain, changes, x, -0.5))
        fastlora.fold(model)
        torch.testing.assert_close(model(x), expected(plain, changes, x, -0.5))
    torch.testing.assert_close(model(x), expected(plain, changes, x))  # folded again
    fastlora.unfold(model)
    with fastlora.disable(model):
        assert same_bits(model(x).detach(), plain(x).detach())
    assert fastlora.verify(model, x)
    assert "kind=lokr" in repr(model)


@pytest.mark.parametrize("name", LAYERS)
def test_removal_brings_everything_back(name: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(LAYERS[name][0](F64)), LAYERS[name][1](F64)
    before = snapshot(model)
    for kind in [k for k in KINDS if fits(model[0], k)]:
        attach(model, {"0": slot_from(model[0], change_of(model[0], kind, F64))}, "d")
        model(x)
        fastlora.fold(model)
        model(x)
        fastlora.unfold(model)
        fastlora.remove(model, "d")
        assert_unchanged(model, before)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch], ids=lambda f: f.__name__)
@pytest.mark.parametrize("folded", [False, True])
def test_copies(copied: Any, folded: bool) -> None:
    model, plain, changes, x = model_of(*ALL)
    if folded:
        fastlora.fold(model)
    other = copied(model)
    fastlora.set_scale(other, {"d": 0.25})
    torch.testing.assert_close(other(x).detach(), expected(plain, changes, x, 0.25))
    with torch.no_grad():
        for p in fastlora.parameters(other):
            p.zero_()
    torch.testing.assert_close(model(x).detach(), expected(plain, changes, x))


def test_state_dicts() -> None:
    model, plain, changes, x = model_of(*ALL)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert {"0.fastlora.d.w1_a", "1.fastlora.d.bias", "2.fastlora.d.magnitude"} <= set(state)
    fastlora.fold(model)
    assert set(model.state_dict()) == set(state)
    with torch.no_grad():
        for p in fastlora.parameters(model):
            p.mul_(3)
    model.load_state_dict(state)
    torch.testing.assert_close(model(x).detach(), expected(plain, changes, x))
    model.load_state_dict(plain.state_dict())  # a plain checkpoint leaves adapters as they are
    torch.testing.assert_close(model(x).detach(), expected(plain, changes, x))


def test_other_dtypes() -> None:
    model, plain, changes, x = model_of(*ALL)
    fastlora.fold(model)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        model.to(dtype)
        for _ in range(2):
            y = model(x.to(dtype))
            torch.testing.assert_close(
                y.double().detach(), expected(plain, changes, x), rtol=tolerance, atol=tolerance
            )
            fastlora.unfold(model)
        fastlora.fold(model)


# --- biases ---------------------------------------------------------------------------------------


def test_a_bias_where_the_layer_has_none() -> None:
    base, plain, change, x = example("full_bias", "linear_no_bias")
    exact = called(plain, changed(plain, change, 1.0), x)
    fastlora.fold(base)
    torch.testing.assert_close(base(x), exact)
    address = base.fastlora.folded_bias.data_ptr()
    set_strength(base, 0.0)
    torch.testing.assert_close(base(x), called(plain, {"weight": plain.weight.detach()}, x))
    set_strength(base, 1.0)
    assert base.fastlora.folded_bias.data_ptr() == address  # which graphs have in them
    torch.testing.assert_close(base(x), exact)
    fastlora.unfold(base)
    with pytest.raises(AdapterError, match="fold: : 'd' adds a bias, and the layer has none"):
        fastlora.fold(base, permanent=True)
    assert base.bias is None and not base._state.merged
    set_strength(base, 0.0)
    fastlora.fold(base, permanent=True)
    assert type(base) is nn.Linear and base.bias is None
    assert same_bits(base.weight, plain.weight)


def test_folding_for_good() -> None:
    model, plain, changes, x = model_of(*ALL)
    fastlora.set_scale(model, {"d": 0.5})
    y = model(x).detach()
    fastlora.fold(model, permanent=True)
    assert [type(m) for m in model] == [nn.Linear, nn.LayerNorm, nn.Linear]
    assert same_bits(model(x).detach(), y)
    new = changed(plain[1], changes[1], 0.5)
    torch.testing.assert_close(model[1].bias.detach(), new["bias"])


def test_folding_for_good_does_not_write_a_shared_bias() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    attach(model, {"0": slot_from(model[0], Change(None, drawn(8)))}, "d")
    before = model[0].bias.clone()
    with pytest.raises(AdapterError, match="0.bias and 1.bias are one parameter"):
        fastlora.fold(model, permanent=True)
    assert same_bits(model[0].bias, before)


# --- refusals -------------------------------------------------------------------------------------


def test_strengths_per_sample_are_refused() -> None:
    model, _, _, x = model_of(*ALL)
    y, message = model(x), r"0: 'd' \(loha\) changes the weight itself, so its strength cannot"
    with pytest.raises(AdapterError, match=message):
        fastlora.set_scale(model, {"d": torch.ones(5)})
    assert same_bits(model(x), y) and fastlora.adapters(model)["d"].scale == 1.0
    model[0]._state.arena.set({"d": torch.ones(5)}, {})
    with pytest.raises(AdapterError, match=message):
        model(x)
    with pytest.raises(AdapterError, match="differs per sample"):
        fastlora.fold(model)


def test_saving_names_the_formats_that_can_hold_it(tmp_path: Path) -> None:
    for kinds, message in (
        (ALL, "got (full|loha|lokr).*; a lycoris file can hold it"),
        (("lora_bias",), "got lora with a bias; a peft file can hold it"),
    ):
        model, *_ = model_of(*kinds)
        with pytest.raises(fastlora.FormatError, match=message):
            fastlora.save(model, tmp_path / "file.safetensors")
    assert not list(tmp_path.iterdir())


def test_combining_is_refused() -> None:
    layer, *_ = example("lora_bias")  # whose kind is "lora"
    with pytest.raises(AdapterError, match="combine: : expected spectral shifts or LoRA"):
        fastlora.combine(layer, {"d": 1.0})
