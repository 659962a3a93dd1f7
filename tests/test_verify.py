"""`verify` passes what is right, names what is wrong, and leaves the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters import adapted_layers, layers
from fastlora.adapters.adapted import Adapted
from tests.adapters.nets import Net
from tests.adapters.oracles import assert_unchanged, randomise, same_bits, snapshot

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def one_thread(fixed_seed: None) -> None:
    torch.set_num_threads(1)  # small tensors; `fixed_seed` puts the number back


def mixed(dtype: torch.dtype = torch.float32, scale: float = 1 / 3) -> tuple[Net, Tensor]:
    """All kinds of adapters; scales and ratios that no float32 holds exactly."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    fastlora.inject(model, fastlora.LoRA(rank=6, alpha=1.1), name="a", seed=0)
    fastlora.inject(model, fastlora.LoRA(rank=2, dropout=0.5), where=["inner.0", "conv"], name="b")
    fastlora.inject(model, fastlora.LoRA(rank=4, dora=True), where=["conv", "inner.2"], name="d")
    fastlora.inject(model, fastlora.Spectral(), where=["conv", "norm", "inner.0"], name="s")
    randomise(model, size=0.5)
    fastlora.set_scale(model, scale)
    return model, torch.randint(0, 12, (5, 4))


def failures(report: fastlora.VerifyReport) -> list[str]:
    return [row.path for row in report.rows if not row.passed]


# --- what is right ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("folded", [False, True], ids=["unfolded", "folded"])
def test_a_right_model_passes_and_stays_as_it_is(dtype: torch.dtype, folded: bool) -> None:
    model, x = mixed(dtype)
    model.inner.eval()
    if folded:
        fastlora.fold(model)
    before = snapshot(model)
    modes = {p: m.training for p, m in model.named_modules()}
    report = fastlora.verify(model, x)
    assert report and report.passed, str(report)
    assert [r.path for r in report.rows] == [*adapted_layers(model), "output"]
    assert all(r.error <= r.allowed and r.relative < 0.05 for r in report.rows)
    assert all((r.note == "folded") == folded for r in report.rows[:-1])
    assert_unchanged(model, before)
    assert {p: m.training for p, m in model.named_modules()} == modes


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5, 0.1])
def test_scales_and_switches(scale: float) -> None:
    model, x = mixed(scale=scale)
    assert fastlora.verify(model, x)
    fastlora.disable(model, "d", "s")
    assert fastlora.verify(model, x)
    fastlora.disable(model)
    assert fastlora.verify(model, x)


def test_strengths_per_sample() -> None:
    model, x = mixed()
    fastlora.set_scale(model, {"a": torch.tensor([0.0, 0.1, -1, 2, 1 / 3])})
    report = fastlora.verify(model, x)
    assert report, str(report)
    learned = torch.ones(5, requires_grad=True)
    fastlora.set_scale(model, {"b": learned})
    assert fastlora.verify(model, x)


class Output(NamedTuple):
    sample: Tensor
    more: Any


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.pack = model, pack

    def forward(self, *, tokens: Tensor, scale: Tensor | None = None, extra: Any = None) -> Any:
        y = self.model(tokens)
        return self.pack(y if scale is None else y * scale[0]["value"])


class Converts:
    def __init__(self, y: Tensor) -> None:
        self.y = y

    def to_tuple(self) -> tuple[Any, ...]:
        return self.y, None, self.y.argmax(-1)


PACKS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "tensor": (lambda y: y, 1),
    "dict": (lambda y: {"sample": y, "tokens": y.argmax(-1), "none": None}, 1),
    "nested": (lambda y: [y, (y + 1, {"z": [y * 2]}), "text"], 3),
    "named": (lambda y: Output(y, [y]), 2),
    "to_tuple": (Converts, 1),
}


@pytest.mark.parametrize(("pack", "count"), PACKS.values(), ids=PACKS.keys())
def test_keywords_and_outputs_of_any_structure(pack: Any, count: int) -> None:
    model, x = mixed()
    wrapped = Wrapped(model, pack)
    for scale in (None, ({"value": torch.tensor(2.0)},)):
        report = fastlora.verify(wrapped, tokens=x, scale=scale)
        assert report, str(report)
        assert sum(r.kind == "model" for r in report.rows) == count
    with torch.no_grad():
        model.inner[2].fastlora["d"].up[0, 0] = float("nan")
    report = fastlora.verify(wrapped, tokens=x)
    assert not report and sum(r.kind == "model" and not r.passed for r in report.rows) == count


def test_layers_called_by_keyword_and_called_twice() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(input=x).relu())

    model = Model()
    fastlora.inject(model, fastlora.LoRA(rank=2))
    randomise(model)
    assert fastlora.verify(model, torch.randn(3, 4))


def test_single_images_and_subclasses_of_linear() -> None:
    class Mine(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).sigmoid()

    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten(0), Mine(64, 5)
    )
    fastlora.inject(model, fastlora.LoRA(rank=2))
    randomise(model)
    report = fastlora.verify(model, torch.randn(3, 6, 6))
    assert report, str(report)


def test_under_autocast() -> None:
    model, x = mixed()
    with torch.autocast("cpu", torch.bfloat16):
        report = fastlora.verify(model, x)
    assert report, str(report)


def test_hooks_of_the_caller_stay() -> None:
    model, x = mixed()
    calls = []
    model.conv.register_forward_hook(lambda *a: calls.append(1))
    model.conv.forward = model.conv.forward  # an instance's own, as offloading libraries set it
    mine = vars(model.conv)["forward"]
    assert fastlora.verify(model, x)
    assert calls and vars(model.conv)["forward"] is mine


# --- what is wrong ----------------------------------------------------------------------------


def test_a_wrong_operator_is_named(monkeypatch) -> None:
    model, x = mixed()
    good = layers.lora_linear

    def wrong(x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor, *rest: Any) -> Tensor:
        return good(x, weight, bias, down, up * (1 + 1e-3), *rest)

    monkeypatch.setattr(layers, "lora_linear", wrong)
    report = fastlora.verify(model, x)
    # the others convolve, look up, or add to their base with another operator
    assert not report and failures(report) == ["inner.0", "output"]


def test_a_wrong_shortcut_is_named(monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    fastlora.inject(model, fastlora.LoRA(rank=2))
    randomise(model)
    x = torch.randn(3, 6)
    assert fastlora.verify(model, x)
    good = layers.AdaptedLinear.fused
    wrong = staticmethod(lambda *a: good(*a) * (1 + 2**-19))
    monkeypatch.setattr(layers.AdaptedLinear, "fused", wrong)
    report = fastlora.verify(model, x)
    assert not report and failures(report) == ["0", "1", "output"]


@pytest.mark.parametrize("what", ["folded", "gate", "kept_weight", "kept_dora"])
def test_a_stale_or_wrong_copy_is_named(what: str) -> None:
    model, x = mixed()
    with torch.no_grad():
        model(x)
        if what == "folded":
            fastlora.fold(model)
            model.grouped.fastlora.folded_weight[3, 0, 1, 1] += 0.01
            expected = ["grouped"]
        elif what == "gate":
            layer = model.inner[0]
            layer.gate("a")[2] += 0.01
            expected = ["inner.0"]
        else:
            layer = model.get_submodule("norm" if what == "kept_weight" else "inner.2")
            key = next(k for k in layer._state.cache if k.startswith(what.removeprefix("kept_")))
            kept = layer._state.cache[key][-1]
            (kept if isinstance(kept, Tensor) else kept[0])[0] += 0.1
            expected = ["norm" if what == "kept_weight" else "inner.2"]
    report = fastlora.verify(model, x)
    assert not report and failures(report) == [*expected, "output"]


def test_a_base_that_changed_under_the_fold_is_named() -> None:
    model, x = mixed()
    fastlora.fold(model)
    with torch.no_grad():
        model.embedding.weight.mul_(1.01)
    assert failures(fastlora.verify(model, x)) == ["embedding", "output"]


class Reads(nn.Module):
    """Reads the weight of a layer and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.used(x), self.read.weight, self.read.bias)


def test_a_layer_that_is_not_called_fails() -> None:
    model = Reads()
    fastlora.inject(model, fastlora.LoRA(rank=2))
    report = fastlora.verify(model, torch.randn(2, 4))
    assert not report and failures(report) == ["read"]
    assert "was not called: something reads its weight directly" in str(report)


def test_the_fused_path_of_transformer_layers_would_be_noticed() -> None:
    """That path is not taken where forward hooks are: looking must not change what is seen."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    fastlora.inject(model, fastlora.LoRA(rank=2))
    randomise(model)
    x = torch.randn(2, 3, 8)
    assert fastlora.verify(model, x)
    model.activation_relu_or_gelu = 1  # as if nobody had switched it off
    assert failures(fastlora.verify(model, x)) == ["linear1", "linear2"]


def test_nan_is_infinitely_wrong() -> None:
    model, x = mixed()
    with torch.no_grad():
        model.conv.fastlora["a"].down[0, 0, 0, 0] = float("nan")
    report = fastlora.verify(model, x)
    assert not report and "conv" in failures(report) and "output" in failures(report)
    assert "inf" in str(report) or "nan" in str(report)


def test_an_exception_restores_everything() -> None:
    model, x = mixed()
    model.inner.eval()
    before, modes = snapshot(model), [m.training for m in model.modules()]
    with pytest.raises(RuntimeError):
        fastlora.verify(model, x.float())  # an embedding wants integers
    assert_unchanged(model, before)
    assert [m.training for m in model.modules()] == modes


def test_no_adapters() -> None:
    with pytest.raises(fastlora.AdapterError, match="the model has no adapters"):
        fastlora.verify(Net(), torch.ones(1))


# --- the report -------------------------------------------------------------------------------


def test_the_report_reads_well() -> None:
    model, x = mixed()
    report = fastlora.verify(model, x)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "kind", "max", "error", "relative", "allowed"]
    assert len(lines) == len(report.rows) + 3 and max(map(len, lines)) <= 100
    assert len({line.index("e-") for line in lines[2:-1] if "e-" in line}) == 1  # columns
    assert "inner.0    lora+spectral" in str(report) and "lora+dora+spectral" in str(report)
    assert (
        lines[-1] == f"{len(report.rows)} of {len(report.rows)} rows within twice the plain error"
    )
    fastlora.fold(model)
    assert str(fastlora.verify(model, x)).count("ok folded") == 6
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    bad = str(fastlora.verify(model, x))
    assert bad.count("FAILED") == 2 and "5 of 7 rows" in bad


def test_verification_is_independent_of_gradients_and_of_earlier_calls() -> None:
    model, x = mixed()
    report = fastlora.verify(model, x)
    y = model(x)
    y.sum().backward()
    assert fastlora.verify(model, x) == report
    with torch.inference_mode():
        assert fastlora.verify(model, x)
    assert same_bits(model(x).detach(), y.detach()) or model.training
    assert fastlora.verify(copy.deepcopy(model), x) == report
    assert all(isinstance(m, Adapted) for m in adapted_layers(model).values())
