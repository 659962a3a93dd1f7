"""Which slot a file's change becomes in a layer, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import AdapterError
from fastlora.adapters.attaching import attach
from fastlora.adapters.base_hash import base_hash
from fastlora.adapters.deltas import DeltaSlot
from fastlora.adapters.fitting import slot_from
from fastlora.adapters.slots import LoRASlot, SpectralSlot
from fastlora.formats.changes import Change, Dense, Hadamard, LowRank, Shift
from fastlora.formats.files import FormatError
from tests.adapters.delta_cases import (
    LAYERS,
    adapt,
    called,
    drawn,
    full,
    loha,
    lokr,
    lora,
    tucker,
    update,
)
from tests.adapters.oracles import lora_delta

F64 = torch.float64


@pytest.mark.parametrize("name", ["linear", "conv", "conv_groups_single"])
def test_low_rank_becomes_lora(name: str) -> None:
    layer: Any = LAYERS[name][0](F64)
    shape, groups = tuple(layer.weight.shape), getattr(layer, "groups", 1)
    part = lora(shape, F64, groups)
    slot = slot_from(layer, Change(part))
    assert isinstance(slot, LoRASlot)
    assert slot.ratio == 3.0 / slot.width**0.5 and slot.spec.dropout == 0.1
    torch.testing.assert_close(lora_delta(layer, slot, slot.ratio), update(part, shape))


def test_a_magnitude_of_the_outputs_is_dora() -> None:
    layer = nn.Linear(12, 8)
    part = LowRank(drawn(2, 12), drawn(8, 2), alpha=1.0)
    slot = slot_from(layer, Change(part, magnitude=drawn(8)))
    assert isinstance(slot, LoRASlot) and slot.kind == "dora"
    over_inputs = slot_from(layer, Change(part, magnitude=drawn(12), axis="in"))
    assert isinstance(over_inputs, DeltaSlot)
    embedding, factors = nn.Embedding(20, 6), LowRank(drawn(2, 20), drawn(6, 2), embedding=True)
    slot = slot_from(embedding, Change(factors, magnitude=drawn(6), axis="in"))
    assert isinstance(slot, LoRASlot) and slot.kind == "dora"
    assert isinstance(
        slot_from(embedding, Change(factors, magnitude=drawn(20))), DeltaSlot
    )  # of its rows


def test_mid_becomes_lora_unless_something_else_needs_the_weight() -> None:
    layer = nn.Conv2d(4, 8, 3).double()
    part = tucker((8, 4, 3, 3), torch.float32)
    slot = slot_from(layer, Change(part))
    assert isinstance(slot, LoRASlot)
    delta = lora_delta(layer, slot, slot.ratio)
    torch.testing.assert_close(delta, update(part, (8, 4, 3, 3)), rtol=1e-5, atol=1e-6)
    for beside in ({"bias": drawn(8)}, {"magnitude": drawn(8)}):
        assert isinstance(slot_from(layer, Change(part, **beside)), DeltaSlot)


def test_factors_of_an_embedding_or_of_its_weight() -> None:
    layer = nn.Embedding(20, 6, dtype=F64)
    down, up = drawn(2, 20), drawn(6, 2)
    for part in (LowRank(down, up, 1.0, embedding=True), LowRank(up.t(), down.t(), 1.0)):
        slot = slot_from(layer, Change(part))
        assert isinstance(slot, LoRASlot)
        torch.testing.assert_close(lora_delta(layer, slot, slot.ratio), (up @ down).t() / 2)
    with pytest.raises(AdapterError, match="expected factors of a Linear, got an Embedding's"):
        slot_from(nn.Linear(6, 20), Change(LowRank(down, up, embedding=True)))


def test_shifts_become_spectral() -> None:
    layer, norm = nn.Linear(6, 4), nn.LayerNorm(5)
    change = Change(Shift(drawn(4, dtype=torch.float32), base_hash=base_hash(layer.weight)))
    slot = slot_from(layer, change)
    assert isinstance(slot, SpectralSlot) and slot.spec == fastlora.Spectral()
    with pytest.raises(AdapterError, match="this is another one"):
        slot_from(nn.Linear(6, 4), change)
    assert isinstance(slot_from(nn.Linear(6, 4), change, any_base=True), SpectralSlot)
    scalar = Change(Shift(drawn(1), norms="scalar", base_hash=base_hash(norm.weight)))
    assert slot_from(norm, scalar).spec == fastlora.Spectral(norms="scalar")


def test_a_matrix_may_stand_for_a_convolution_and_the_reverse() -> None:
    down, up = drawn(2, 4), drawn(8, 2)
    conv, linear = nn.Conv2d(4, 8, 1, dtype=F64), nn.Linear(4, 8, dtype=F64)
    images = LowRank(down[..., None, None], up[..., None, None])
    torch.testing.assert_close(slot_from(linear, Change(images)).down.detach(), down)
    slot = slot_from(conv, Change(LowRank(down, up)))
    torch.testing.assert_close(lora_delta(conv, slot, 1.0).flatten(1), up @ down)


def test_a_grouped_convolution_whose_groups_share_factors() -> None:
    layer = nn.Conv2d(4, 8, 3, groups=2, dtype=F64)
    part = LowRank(drawn(2, 2, 3, 3), drawn(8, 2, 1, 1), 1.0)
    slot = slot_from(layer, Change(part))
    assert isinstance(slot, DeltaSlot)
    wanted = (part.up.flatten(1) @ part.down.flatten(1)).view(8, 2, 3, 3) / 2
    torch.testing.assert_close(slot.change.delta((8, 2, 3, 3), F64).detach(), wanted)


@pytest.mark.parametrize("parts", [lora, loha, lokr, full], ids=lambda f: f.__name__)
def test_rows_of_a_fused_projection(parts: Any) -> None:
    """q, k and v of one update: each has its rows, and memory of its own."""
    part = parts((24, 12), F64)
    whole, x = update(part, (24, 12)), drawn(3, 12)
    found = []
    for first in (0, 8, 16):
        layer = nn.Linear(12, 8, dtype=F64)
        plain = copy.deepcopy(layer)
        slot = slot_from(layer, Change(part, rows=(first, first + 8, 24)))
        attach(layer.eval(), {"": slot}, "d", scale=-0.5)  # without dropout
        weight = plain.weight.detach() - 0.5 * whole[first : first + 8]
        exact = called(plain, {"weight": weight, "bias": plain.bias.detach()}, x)
        torch.testing.assert_close(layer(x).detach(), exact)
        found.append(slot)
    places = [p.data_ptr() for slot in found for p in slot.parameters()]
    assert len(set(places)) == len(places)
    assert not set(places) & {t.data_ptr() for t in part.tensors().values()}


@pytest.mark.parametrize(
    "weight, file, kept",
    [
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_dtypes(weight: torch.dtype, file: torch.dtype, kept: torch.dtype) -> None:
    layer = nn.Linear(12, 8, dtype=weight)
    change = Change(loha((8, 12), file), drawn(8, dtype=file), drawn(8, dtype=file))
    slot = adapt(layer, change)
    assert {p.dtype for p in slot.parameters()} == {kept}
    assert layer(torch.ones(2, 12, dtype=weight)).dtype == weight


def rows_of(change: Change, *rows: int) -> Change:
    return replace(change, rows=rows)  # type: ignore[arg-type]


LINEAR = nn.Linear(12, 8)
REFUSED: dict[str, tuple[nn.Module, Change, str]] = {
    "update": (LINEAR, Change(loha((8, 10), F64)), r"an update of \[8, 12\], got w1_a \[8, 2\]"),
    "inner": (
        LINEAR,
        Change(Hadamard(drawn(8, 2), drawn(3, 12), drawn(8, 2), drawn(2, 12))),
        r"an update of \[8, 12\], got w1_a \[8, 2\], w1_b \[3, 12\]",
    ),
    "down": (LINEAR, Change(LowRank(drawn(2, 11), drawn(8, 2))), r"down: expected \[2, 12\], got"),
    "up": (LINEAR, Change(LowRank(drawn(2, 12), drawn(7, 2))), r"up: expected \[8, 2\], got"),
    "numbers": (LINEAR, Change(LowRank(drawn(), drawn())), r"an update of \[8, 12\], got"),
    "rank 0": (LINEAR, Change(LowRank(drawn(0, 12), drawn(8, 0))), "rank: expected an integer"),
    "rank 0 loha": (
        LINEAR,
        Change(Hadamard(drawn(8, 0), drawn(0, 12), drawn(8, 0), drawn(0, 12), 1.0)),
        "an update of",
    ),
    "alpha": (LINEAR, Change(replace(loha((8, 12), F64), alpha=float("inf"))), "finite number"),
    "bias": (LINEAR, Change(None, drawn(12)), r"bias: expected \[8\], got \[12\]"),
    "magnitude": (
        LINEAR,
        Change(full((8, 12), F64), magnitude=drawn(12)),
        r"magnitude: expected \[8\], got \[12\]",
    ),
    "embedding's bias": (nn.Embedding(8, 12), Change(None, drawn(8)), "bias: expected none for a"),
    "norm's magnitude": (
        nn.LayerNorm(6),
        Change(full((6,), F64), magnitude=drawn(6)),
        "magnitude: expected none for a LayerNorm",
    ),
    "norm's lora": (nn.LayerNorm(6), Change(lora((6, 1), F64)), "LoRA needs a matrix"),
    "norm without": (
        nn.LayerNorm(6, elementwise_affine=False),
        Change(None, drawn(6)),
        "a LayerNorm cannot take it: it has no weight",
    ),
    "transposed lora": (
        nn.ConvTranspose2d(4, 8, 1),
        Change(lora((4, 8, 1, 1), F64)),
        "LoRA of transposed convolutions",
    ),
    "unknown": (nn.Conv1d(4, 8, 1), Change(None, drawn(8)), "this kind of layer is not supported"),
    "max_norm": (
        nn.Embedding(8, 12, max_norm=1.0),
        Change(full((8, 12), F64)),
        "differences of a weight need rows that do not change",
    ),
    "own way": (
        type("Quantised", (nn.Linear,), {})(12, 8),
        Change(full((8, 12), F64)),
        "differences of a weight need the plain weight",
    ),
    "meta": (nn.Linear(12, 8, device="meta"), Change(full((8, 12), F64)), "meta device"),
    "rows": (LINEAR, rows_of(Change(full((24, 12), F64)), 0, 7, 24), "diff: expected 24 rows, 7"),
    "rows of loha": (LINEAR, rows_of(Change(loha((20, 12), F64)), 0, 8, 24), "an update of"),
    "rows over inputs": (
        LINEAR,
        rows_of(Change(lokr((24, 12), F64), None, drawn(12), "in"), 0, 8, 24),
        "a magnitude over inputs is of all 24 rows",
    ),
}


@pytest.mark.parametrize("layer, change, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(layer: nn.Module, change: Change, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        slot_from(layer, change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_that_the_layer_s_dtype_cannot_hold_are_refused(dtype: torch.dtype) -> None:
    """A difference is added in the layer's dtype; of factors only the product is."""
    half = nn.Linear(12, 8, dtype=torch.float16)
    large, most = torch.full((8, 12), -66000.0, dtype=dtype), 65504.0
    for change in (Change(Dense(large)), Change(None, bias=large[:, 0].clone())):
        with pytest.raises(AdapterError, match="at most 65504, which torch.float16 can hold, got"):
            slot_from(half, change)
        assert slot_from(nn.Linear(12, 8), change).kind == change.kind
    if dtype != torch.bfloat16:  # which would round it up
        slot = slot_from(half, Change(Dense(torch.full((8, 12), most, dtype=dtype))))
        assert slot.diff.to(torch.float16).isfinite().all()
    factors = LowRank(torch.full((1, 12), 1e6, dtype=dtype), torch.full((8, 1), 1e-6, dtype=dtype))
    slot = slot_from(half, Change(factors))
    attach(half, {"": slot}, "a")
    assert half(torch.ones(2, 12, dtype=torch.float16)).isfinite().all()


def test_values_beyond_float32_are_refused() -> None:
    large = torch.full((8, 12), 1e39, dtype=F64)
    for layer, change, key in (
        (LINEAR, Change(Dense(large)), "diff"),
        (LINEAR, Change(LowRank(large[:1], large[:, :1])), "down"),
        (nn.LayerNorm(8), Change(Shift(large[:, 0].clone(), "elementwise", None)), "shift"),
    ):
        with pytest.raises(AdapterError, match=rf"{key}: expected values of at most 3.40282e\+38"):
            slot_from(layer, change, any_base=True)


def test_a_reserve_that_cannot_hold_the_values_refuses_them() -> None:
    layer = nn.ModuleDict({"a": nn.Linear(12, 8, dtype=torch.float16)})
    fastlora.reserve(layer, 4)
    slot = slot_from(layer["a"], Change(LowRank(torch.full((1, 12), 1e6), torch.ones(8, 1))))
    with pytest.raises(AdapterError, match="a: down: its reserve is torch.float16, which cannot"):
        attach(layer, {"a": slot}, "x")
    fastlora.reserve(layer, 4, dtype=torch.float32)
    attach(layer, {"a": slot}, "x")
    assert layer["a"].fastlora["x"].down.isfinite().all()


def test_integers_are_no_values() -> None:
    with pytest.raises(FormatError, match=r"diff: expected floating values, got torch\.int64"):
        slot_from(LINEAR, Change(Dense(torch.ones(8, 12, dtype=torch.long))))
