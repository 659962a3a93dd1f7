"""Conv1D of transformers, whose weight is [in, out]: what GPT-2 has for linear layers."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters.attaching import attach
from fastlora.adapters.fitting import slot_from
from fastlora.formats.changes import Change, Dense, Hadamard, LowRank
from tests.adapters.oracles import assert_twofold, assert_unchanged, randomise, same_bits, snapshot

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the imports of others warn about
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

IN, OUT = 12, 20
DORA = fastlora.LoRA(rank=4, alpha=6, dora=True)
SPECS = {"lora": fastlora.LoRA(rank=4, alpha=6), "dora": DORA, "spectral": fastlora.Spectral()}


def layer(inputs: int = IN, outputs: int = OUT) -> Any:
    torch.manual_seed(0)
    made = Conv1D(outputs, inputs)
    with torch.no_grad():
        made.weight.normal_()
        made.bias.normal_()
    return made


def exact_weight(base: Any, slot: Any, strength: float) -> Tensor:
    """W' [in, out] in float64, column by column of the stored weight."""
    weight = base.weight.detach().double()
    if slot.kind == "spectral":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return (u * (s + strength * slot.shift.detach().double()).clamp_min(0)) @ vh
    ratio = slot.spec.alpha / slot.spec.rank
    changed = weight.clone()
    down, up = slot.down.detach().double(), slot.up.detach().double()
    for column in range(weight.shape[1]):
        changed[:, column] += strength * ratio * (up[column] @ down)
        if slot.magnitude is not None:
            changed[:, column] *= slot.magnitude[column].double() / changed[:, column].norm()
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_outputs(spec: Any, dtype: torch.dtype) -> None:
    base, x = layer().to(dtype), torch.randn(3, 5, IN).to(dtype)
    plain = copy.deepcopy(base)
    fastlora.inject(base, spec, name="a")
    near = 0.0 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(base(x), plain(x), atol=1e-5 + near, rtol=1e-5 + near)  # no change
    randomise(base)
    fastlora.set_scale(base, {"a": 0.7})
    weight = exact_weight(plain, base.fastlora["a"], 0.7)
    exact = x.double() @ weight + plain.bias.detach().double()
    low = (x @ weight.to(dtype) + plain.bias).detach()
    assert_twofold(base(x), exact, low, roundings=2)
    with torch.no_grad():
        assert_twofold(base(x), exact, low, roundings=2)
        assert same_bits(base(x=x), base(x))
        assert_twofold(base(x[0, 0]), exact[0, 0], low[0, 0], roundings=2)
        assert_twofold(base(x.mT.contiguous().mT), exact, low, roundings=2)  # strided
        fastlora.fold(base)
        assert base.fastlora.folded_weight.shape == (IN, OUT)
        assert_twofold(base(x), exact, low, roundings=2)
    assert fastlora.verify(base, x)
    fastlora.unfold(base)
    assert fastlora.verify(base, x)
    fastlora.disable(base)
    assert same_bits(base(x), plain(x))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gradients(spec: Any) -> None:
    base = layer().double()
    fastlora.inject(base, spec, name="a")
    randomise(base)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    own = list(fastlora.parameters(base))
    magnitude = base.fastlora["a"]._parameters.get("magnitude")
    if magnitude is None:  # the norm of DoRA carries no gradient, which differences do not know
        names = [f"fastlora.a.{key}" for key in base.fastlora["a"].owned]

        def call(x: Tensor, *values: Tensor) -> Any:
            return torch.func.functional_call(base, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(call, (x, *own))
        return
    (base(x).sum()).backward()
    slot = base.fastlora["a"]
    whole = base.weight.t() + 1.5 * slot.up.detach() @ slot.down.detach()  # alpha / rank
    expected = (x.detach() @ whole.t() / whole.norm(dim=1)).sum(0)
    torch.testing.assert_close(magnitude.grad, expected)


def test_several_adapters_dropout_and_a_reserve() -> None:
    x = torch.randn(2, 5, IN)
    base = nn.Sequential(layer())
    plain = copy.deepcopy(base[0])
    fastlora.reserve(base, rank=8)
    fastlora.inject(base, SPECS["lora"], name="a")
    fastlora.inject(base, fastlora.LoRA(rank=2, dropout=0.5), name="b")
    randomise(base)
    fastlora.set_scale(base, {"a": 0.5, "b": -1.0})
    slots = base[0].fastlora
    weight = exact_weight(plain, slots["a"], 0.5).t()
    weight = weight - slots["b"].up.detach().double() @ slots["b"].down.detach().double()
    expected = (x.double() @ weight.t() + plain.bias.detach().double()).float()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(base.eval()(x).detach(), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(base.train()(x), expected, atol=1e-2)
    fastlora.remove(base, "b")
    fastlora.set_scale(base, {"a": torch.tensor([0.0, 1.0])})
    torch.testing.assert_close(base(x)[0], plain(x)[0])


def change(kind: str) -> Change:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=generator)

    parts: Any = {
        "low rank and bias": LowRank(draw(4, IN), draw(OUT, 4), alpha=2.0),
        "full": Dense(draw(OUT, IN)),
        "loha": Hadamard(draw(OUT, 2), draw(2, IN), draw(OUT, 2), draw(2, IN)),
        "dora of outputs": Dense(draw(OUT, IN)),
        "dora of inputs": Dense(draw(OUT, IN)),
    }[kind]
    if kind == "low rank and bias":
        return Change(parts, bias=draw(OUT))
    if kind == "dora of outputs":
        return Change(parts, magnitude=1 + draw(OUT).abs())
    if kind == "dora of inputs":
        return Change(parts, magnitude=1 + draw(IN).abs(), axis="in")
    return Change(parts)


@pytest.mark.parametrize(
    "kind", ["low rank and bias", "full", "loha", "dora of outputs", "dora of inputs"]
)
def test_updates_of_files_are_out_by_in(kind: str) -> None:
    base, x = nn.Sequential(layer()), torch.randn(3, 5, IN)
    plain, update = copy.deepcopy(base[0]), change(kind)
    attach(base, {"0": slot_from(base[0], update)}, "a", scale=0.5)
    weight = plain.weight.detach().double().t() + 0.5 * update.delta((OUT, IN), torch.float64)
    if update.magnitude is not None:
        dim = 1 if update.axis == "out" else 0
        norm = weight.norm(dim=dim, keepdim=True)
        weight = weight * update.magnitude.double().view(norm.shape) / norm
    bias = plain.bias.detach().double()
    bias = bias if update.bias is None else bias + 0.5 * update.bias.double()
    expected = (x.double() @ weight.t() + bias).float()
    torch.testing.assert_close(base(x).detach(), expected, atol=1e-5, rtol=1e-5)
    assert fastlora.verify(base, x)
    fastlora.fold(base)
    torch.testing.assert_close(base(x).detach(), expected, atol=1e-5, rtol=1e-5)
    assert fastlora.verify(base, x)


def test_an_update_that_is_in_by_out_is_refused() -> None:
    base = layer()
    with pytest.raises(fastlora.AdapterError, match=r"update of \[20, 12\]"):
        slot_from(base, Change(Dense(torch.randn(IN, OUT))))
    with pytest.raises(fastlora.AdapterError, match=r"down: expected \[4, 12\], got \[4, 20\]"):
        slot_from(base, Change(LowRank(torch.randn(4, OUT), torch.randn(IN, 4))))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_copies_pickles_files_and_the_way_back(spec: Any, tmp_path: Path) -> None:
    model, x = nn.Sequential(layer(), layer(OUT, OUT)), torch.randn(3, IN)
    other, before = copy.deepcopy(model), snapshot(model)
    fastlora.inject(model, spec, name="a")
    assert not isinstance(model[0], nn.Linear)
    randomise(model)
    y = model(x).detach()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert same_bits(twin(x), y)
    fastlora.save(model, tmp_path / "a")
    fastlora.load(other, tmp_path / "a", name="a")
    assert same_bits(other(x), y)
    fastlora.fold(other, permanent=True)
    assert type(other[0]) is Conv1D
    torch.testing.assert_close(other(x), y)
    fastlora.remove(model, "a")
    assert_unchanged(model, before)


def test_transformers_is_imported_by_nobody_but_the_user() -> None:
    program = (
        "import sys, torch, fastlora; m = torch.nn.Sequential(torch.nn.Linear(3, 3)); "
        "fastlora.inject(m, fastlora.LoRA(rank=1)); print('transformers' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout.strip() == "False", answer.stderr
