"""Adapters beside quantised layers: the library's own product, then the low-rank part.

What runs depends on what is installed; the stand-ins "packed" and "wrapped" always do.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora.adapters import beside
from fastlora.adapters.fitting import slot_from
from fastlora.formats.changes import Change, Dense
from tests.adapters.oracles import assert_twofold, randomise, same_bits
from tests.integrations.quantised_cases import (
    HIDDEN,
    IN,
    KINDS,
    LIBRARIES,
    MISSING,
    Kind,
    low_rank,
    plain,
    quantised,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDED = ("bitsandbytes int8",)  # rounds what comes in as well


@pytest.fixture(params=[name for name in KINDS if not name.startswith(MISSING)])
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]()


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_was_run(library: str) -> None:
    """Says once, and not for every test, what is not installed."""
    pytest.importorskip(library)


def rounds_inputs(request: pytest.FixtureRequest) -> bool:
    return request.node.callspec.params["kind"] in ROUNDED


def base_exact(kind: Kind, layer: Any, x: Tensor, whole: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b` in float64 with the dequantised W; `whole` where x is rounded as well."""
    if whole is not None:
        return whole.double()
    return F.linear(x.double(), kind.dense(layer).detach().double(), layer.bias.detach().double())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", ["one", "two", "per sample", "16-bit adapter", "reserve"])
def test_the_base_plus_the_low_rank_part(
    kind: Kind, dtype: torch.dtype, case: str, request: pytest.FixtureRequest
) -> None:
    model = quantised(kind, dtype)
    x = torch.randn(5, 3, IN).to(dtype)
    bare = model[0](x)
    names = {"a": torch.tensor(1.0)} if case == "one" else dict.fromkeys("ab", torch.tensor(1.0))
    for name in names:
        fastlora.inject(model, fastlora.LoRA(4, alpha=6), name=name)
    randomise(model)
    if case == "per sample":
        names |= {"a": torch.linspace(-1, 2, 5)}
    elif case == "16-bit adapter":  # of either dtype, whatever the layer computes in
        for layer in (model[0], model[2]):
            layer.fastlora["a"].half()
            layer.fastlora["b"].bfloat16()
    elif case == "reserve":
        fastlora.reserve(model, 16, dtype=torch.float32)
        assert model[0].fastlora.reserved_down.dtype == torch.float32
    fastlora.set_scale(model, {n: s if s.dim() else float(s) for n, s in names.items()})
    layer, shaped = model[0], {n: s[:, None, None] if s.dim() else s for n, s in names.items()}
    base = base_exact(kind, layer, x, bare if rounds_inputs(request) else None)
    exact = base + low_rank(layer, shaped, x, torch.float64)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = layer(x)
        assert y.dtype == bare.dtype
        assert_twofold(y, exact, bare + low_rank(layer, shaped, x, dtype).detach())
    fastlora.disable(model)
    assert same_bits(layer(x), bare)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_reach_every_adapter(kind: Kind, dtype: torch.dtype) -> None:
    """Against autograd of the layers' own products plus the formula, in float64 as far as the
    library's product allows."""
    model = quantised(kind, dtype)
    twin = (
        copy.deepcopy(model) if type(model[0]).__name__ != "GGUFLinear" else quantised(kind, dtype)
    )
    fastlora.inject(model, fastlora.LoRA(4), name="a")
    randomise(model)
    x = torch.randn(6, IN).to(dtype)
    model(x).float().square().mean().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "fastlora" not in n)

    def gradients(wide: torch.dtype) -> list[Tensor]:
        factors, h = [], x.to(wide)
        for layer, own in ((model[0], twin[0]), (None, F.silu), (model[2], twin[2])):
            if layer is None:
                h = own(h)
                continue
            slot = layer.fastlora["a"]
            down, up = (t.detach().to(wide).requires_grad_() for t in (slot.down, slot.up))
            factors += [down, up]
            h = own(h.to(dtype)).to(wide) + F.linear(F.linear(h, down), up)
        loss = (h.double() if wide == torch.float64 else h.float()).square().mean()
        return list(torch.autograd.grad(loss, factors))

    found = [p.grad for p in fastlora.parameters(model, "a")]
    for got, exact, low in zip(found, gradients(torch.float64), gradients(dtype), strict=True):
        assert got is not None and got.dtype == torch.float32
        assert_twofold(got, exact.double(), low.float(), roundings=2**3)


def test_dropout_is_each_adapter_s_own(kind: Kind) -> None:
    model = quantised(kind)
    fastlora.inject(model, fastlora.LoRA(4, dropout=0.5), where=["0"], name="a")
    fastlora.inject(model, fastlora.LoRA(4), where=["0"], name="b")
    randomise(model)
    layer, x = model[0], torch.randn(6, IN)
    with torch.no_grad():
        one = {name: torch.tensor(1.0) for name in "ab"}
        torch.manual_seed(3)
        trained = layer(x)
        torch.manual_seed(3)
        kept = F.dropout(x, 0.5, True)
        expected = layer.base(x) + low_rank(layer, {"a": one["a"]}, kept, torch.float64)
        expected = expected + low_rank(layer, {"b": one["b"]}, x, torch.float64)
        torch.testing.assert_close(trained.double(), expected, rtol=1e-5, atol=1e-5)


def test_everything_goes_back(kind: Kind) -> None:
    model = quantised(kind)
    x = torch.randn(4, IN)
    bare, before = model(x), layers_of(model)
    fastlora.inject(model, fastlora.LoRA(4), name="a")
    randomise(model)
    assert layers_of(model) == {"classes": layers_of(model)["classes"], **without_classes(before)}
    assert not torch.equal(model(x), bare)
    fastlora.remove(model, "a")
    assert layers_of(model) == before and same_bits(model(x), bare)


def test_state_dicts_stay_the_base_s(kind: Kind) -> None:
    """A quantised base goes into a file and comes back as the library has it, adapters beside."""
    model, other = quantised(kind), quantised(kind)
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    fastlora.inject(model, fastlora.LoRA(4), name="a")
    state = model.state_dict()
    assert [k for k in state if "fastlora" not in k] == list(bare)
    owned = [k for k in state if "fastlora" in k]
    assert owned == [f"{i}.fastlora.a.{key}" for i in (0, 2) for key in ("down", "up")]
    try:
        other.load_state_dict(bare)
    except (RuntimeError, NotImplementedError, KeyError) as error:
        # Not into a quantised model: then neither with adapters, with the library's own message.
        with pytest.raises(type(error), match=re.escape(str(error)[:60])):
            model.load_state_dict(bare)
    else:
        model.load_state_dict(bare)  # before the first call: bitsandbytes takes nothing after it
    randomise(model)
    fastlora.set_scale(model, 0.0)
    x = torch.randn(3, IN)
    assert same_bits(model(x), other(x))


def layers_of(model: Any) -> dict[str, Any]:
    """The model's own keys, parameters and classes."""
    own = {n: id(p) for n, p in model.named_parameters() if "fastlora" not in n}
    keys = [k for k in model.state_dict() if "fastlora" not in k]
    return {"classes": [type(m) for m in model], "own": own, "keys": keys}


def without_classes(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k != "classes"}


def test_copies_conversions_and_verify(kind: Kind, request: pytest.FixtureRequest) -> None:
    model = quantised(kind, torch.bfloat16)
    x = torch.randn(4, IN).bfloat16()
    fastlora.inject(model, fastlora.LoRA(4), where=["0"], name="a")  # the other stays bare
    randomise(model)
    with torch.no_grad():
        y = model(x)
        if request.node.callspec.params["kind"] != "gguf":  # diffusers' weight cannot be copied
            twin = copy.deepcopy(model)
            assert same_bits(twin(x), y)
            fastlora.set_scale(twin, 0.0)
        assert same_bits(model(x), y)
        assert same_bits(model.to("cpu")(x), y)
    report = fastlora.verify(model, x)
    assert report and [row.path for row in report.rows] == ["0", "output"], str(report)


@pytest.mark.parametrize("format", ["fastlora", "peft", "diffusers"])
def test_files_of_a_plain_model_load(kind: Kind, format: str, tmp_path: Path) -> None:
    source = plain(torch.float16)
    fastlora.inject(source, fastlora.LoRA(4, alpha=2), name="a", dtype=torch.float16)
    randomise(source)
    path = tmp_path / ("folder" if format == "peft" else "file.safetensors")
    parts = format == "diffusers"
    fastlora.save({"unet": source} if parts else source, path, "a", format)
    model, x = quantised(kind), torch.randn(3, IN)
    bare = model[0](x)
    report = fastlora.load({"unet": model} if parts else model, path, name="a")
    assert [item.module for item in report.applied] == ["0", "2"] and not report.unused
    for i in (0, 2):
        for key in ("down", "up"):
            got, expected = (getattr(m[i].fastlora["a"], key) for m in (model, source))
            torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=0)
    with torch.no_grad():
        one = {"a": torch.tensor(1.0)}
        exact = bare.double() + low_rank(model[0], one, x, torch.float64)
        torch.testing.assert_close(model[0](x).double(), exact, rtol=1e-5, atol=1e-5)
    fastlora.save(model, tmp_path / "again.safetensors", "a")
    fastlora.remove(model, "a")
    fastlora.load(model, tmp_path / "again.safetensors")


def test_what_needs_the_weight_is_refused(kind: Kind) -> None:
    model = quantised(kind)
    before = layers_of(model)
    for spec in (fastlora.LoRA(4, dora=True), fastlora.Spectral()):
        for where in (None, ["0"]):
            with pytest.raises(fastlora.AdapterError, match="0 .*plain weight.* before quantising"):
                fastlora.inject(model, spec, where)
    difference = Change(Dense(torch.randn(HIDDEN, IN)))
    with pytest.raises(fastlora.AdapterError, match="plain weight.* before quantising"):
        slot_from(model[0], difference)
    assert layers_of(model) == before
    fastlora.inject(model, fastlora.LoRA(4), name="a")
    for permanent in (False, True):
        with pytest.raises(fastlora.AdapterError, match="fold: 0: .* before quantising"):
            fastlora.fold(model, permanent)
    for dtype in (torch.float64, torch.float8_e4m3fn):
        with pytest.raises(fastlora.AdapterError, match="0: dtype: expected torch.*float32"):
            fastlora.inject(model, fastlora.LoRA(4), name="b", dtype=dtype)


@pytest.mark.filterwarnings("ignore")  # of torch and the libraries, in tracing
def test_compiled_models_compute_the_same(kind: Kind, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["kind"] == "gguf":
        pytest.skip("torch.compile cannot trace a bare GGUFLinear of diffusers 0.42 either")
    torch._dynamo.reset()
    model = quantised(kind)
    fastlora.inject(model, fastlora.LoRA(4), name="a")
    randomise(model)
    x = torch.randn(3, IN)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for scale in (1.0, -0.5):
            fastlora.set_scale(model, scale)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_several_adapters_are_one_pass(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = quantised(kind), []
    for name in "abc":
        fastlora.inject(model, fastlora.LoRA(4), where=["0"], name=name)
    add = beside.lora_add_
    monkeypatch.setattr(beside, "lora_add_", lambda *args: (calls.append(1), add(*args)))
    model(torch.randn(3, IN))
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
def test_peft_s_layers_beside_them(kind: Kind) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["0.0", "0.2"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(quantised(kind)), settings)
    x = torch.randn(3, IN)
    expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum(), trained(model))
    fastlora.accelerate(model)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.square().sum(), trained(model))
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)
    assert fastlora.verify(model, x)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_under_autocast(kind: Kind) -> None:
    model = quantised(kind)
    fastlora.inject(model, fastlora.LoRA(4), name="a")
    randomise(model)
    layer, x = model[0], torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        bare, y = layer.base(x), layer(x)
    exact = bare.double() + low_rank(layer, {"a": torch.tensor(1.0)}, x, torch.float64)
    assert y.dtype == bare.dtype
    low = bare + low_rank(layer, {"a": torch.tensor(1.0)}, x, bare.dtype).detach()
    assert_twofold(y, exact, low)


@pytest.mark.filterwarnings("ignore")  # of older libraries
def test_the_documentation_s_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    page = Path(__file__).resolve().parents[2] / "docs" / "quantised.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    model, x = plain(), torch.randn(3, IN)
    fastlora.inject(model, fastlora.LoRA(4))
    randomise(model)
    fastlora.save(model, "style.safetensors")
    adapted = model(x)
    fastlora.remove(model, "default")
    names: dict[str, Any] = {"model": model, "x": x, "fastlora": fastlora}
    bare = model(x)
    for i, block in enumerate(blocks):
        exec(compile(block, f"docs/quantised.md, Python block {i + 1}", "exec"), names)
    error, effect = (names["y"] - adapted).norm(), (bare - adapted).norm()
    assert error < 0.05 * effect  # what rounding the weights to 8 bits makes of it
