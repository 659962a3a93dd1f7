"""Quantised layers that no library is needed for: weights that are tensors around others, weights
whose shape or dtype tells nothing, and layers that cannot be adapted."""

from __future__ import annotations

import abc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlora
from fastlora.adapters.fitting import slot_from
from fastlora.formats.changes import Change, LowRank
from tests.adapters.oracles import randomise, snapshot
from tests.integrations.quantised_cases import (
    HIDDEN,
    IN,
    KINDS,
    Int8Weight,
    PackedLinear,
    low_rank,
    plain,
    quantised,
    rounded,
    wrap,
)

# --- weights that are tensors around others -------------------------------------------------------


def test_a_weight_may_be_quantised_after_the_adapter_came() -> None:
    model, x = plain(), torch.randn(3, IN)
    fastlora.inject(model, fastlora.LoRA(4), name="a")
    randomise(model)
    with torch.no_grad():
        model(x)  # by the shortest way
        wrap(model)
        for layer, given in ((model[0], x), (model[2], torch.randn(3, HIDDEN))):
            exact = layer.base(given).double()
            exact = exact + low_rank(layer, {"a": torch.tensor(1.0)}, given, torch.float64)
            torch.testing.assert_close(layer(given).double(), exact, rtol=1e-5, atol=1e-5)
    assert fastlora.verify(model, x)


@pytest.mark.parametrize("spec", [fastlora.LoRA(4, dora=True), fastlora.Spectral()], ids=str)
def test_but_not_under_one_that_needs_it(spec: Any) -> None:
    model, x = plain(), torch.randn(3, IN)
    fastlora.inject(model, spec, where=["0"], name="a")
    randomise(model)
    wrap(model)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with pytest.raises(fastlora.AdapterError, match="0: .*has become of type Int8Weight"):
                model(x)
    fastlora.remove(model, "a")
    assert model(x).isfinite().all()


class Opaque(Int8Weight):
    """Rounds its input as well and gives no gradient to it, as dynamic quantisation does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = (args[0].detach(), *args[1:])
        return super().__torch_function__(func, types, args, kwargs)


def test_a_base_that_stops_gradients_is_named() -> None:
    model, x = plain(), torch.randn(3, IN)
    weight = Opaque(*rounded(model[2].weight), torch.float32)
    model[2].weight = nn.Parameter(weight, requires_grad=False)
    fastlora.inject(model, fastlora.LoRA(4), name="a")
    with pytest.warns(UserWarning, match="2: no gradient passes through its base.*Opaque"):
        model(x)
    model.eval()(x)  # nobody trains
    with torch.no_grad():
        model.train()(x)


# --- shapes and dtypes that a quantised weight does not tell --------------------------------------


def test_rows_of_a_fused_projection_fit_a_packed_layer() -> None:
    layer = PackedLinear(nn.Linear(12, 8))
    down, up = torch.randn(2, 12), torch.randn(24, 2)
    for part in (LowRank(down, up), LowRank(down, up, alpha=1.0)):
        slot = slot_from(layer, Change(part, rows=(8, 16, 24)))
        assert torch.equal(slot.up, up[8:16]) and torch.equal(slot.down, down)
    with pytest.raises(fastlora.AdapterError, match=r"24 rows, 7 of them for \[8, 12\]"):
        slot_from(layer, Change(LowRank(down, up), rows=(0, 7, 24)))


def test_stored_float8_is_refused() -> None:
    """Layerwise casting converts whatever parameters a layer has, at every call."""
    model = nn.Sequential(nn.Linear(8, 8)).to(torch.float8_e4m3fn)
    before = snapshot(model)
    with pytest.raises(
        fastlora.AdapterError, match="0 .*float8_e4m3fn, in which no layer computes"
    ):
        fastlora.inject(model, fastlora.LoRA(2), where=["0"])
    with pytest.raises(fastlora.AdapterError, match="layerwise casting"):
        slot_from(model[0], Change(LowRank(torch.randn(2, 8), torch.randn(8, 2))))
    assert snapshot(model)["classes"] == before["classes"]


class Mixin(abc.ABC):  # noqa: B024 (nothing to implement)
    """It comes first and settles the layout of what is made of it, as quanto's does."""


class Foreign(Mixin, nn.Linear):
    pass


def test_classes_that_cannot_be_exchanged_are_refused() -> None:
    model = nn.Sequential(Foreign(4, 4))
    with pytest.raises(fastlora.AdapterError, match=r"0 \(Foreign\): this kind of layer is not"):
        fastlora.inject(model, fastlora.LoRA(2))
    assert type(model[0]) is Foreign


@pytest.mark.parametrize("stand_in", ["packed", "wrapped"])
def test_adapters_come_and_go_in_one_graph(stand_in: str) -> None:
    torch._dynamo.reset()
    model, x = quantised(KINDS[stand_in]()), torch.randn(3, IN)
    fastlora.reserve(model, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)
        for name in "ab":
            fastlora.inject(model, fastlora.LoRA(4), name=name)
            randomise(model)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
        fastlora.remove(model, "a")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
