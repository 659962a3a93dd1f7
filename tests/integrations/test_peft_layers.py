"""PEFT's layers accelerated: what they compute, beside PEFT itself in float64, and what stays
PEFT's. Scalings are sums of powers of two: strengths are float32 also beside float64."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters.specs import AdapterError

pytest.importorskip("peft")
import peft
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict

TARGETS = ["emb", "conv", "l1", "l2"]
NAMES = ["default", "other", "__base__"]


class Net(nn.Module):
    """An embedding, a convolution with dilation and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.l1 = nn.Linear(16, 32)
        self.l2 = nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.emb(x)[:, None]).mean(1)
        return self.l2(torch.relu(self.l1(h)))


def config(rank: int = 4, alpha: float = 7.0, targets: list[str] = TARGETS, **more: Any) -> Any:
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False, **more
    )


def build(dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Net().to(dtype), config(**more), autocast_adapter_dtype=False).eval()


def with_two(**more: Any) -> Any:
    model = build(**more)
    model.add_adapter("other", config(3, 1.5, ["l1", "l2"]), autocast_adapter_dtype=False)
    return model.eval()


def layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def fused(model: nn.Module) -> list[bool]:
    """Whether each layer's next call is fused: a test that PEFT computes for proves nothing."""
    return [m.goes(m._fastlora_plan) for m in layers(model).values()]


X = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor, exact: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=exact, atol=exact)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True, "targets": ["conv", "l1"]},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_computes_what_peft_computes(case):
    model = build(**CASES[case])
    expected = model(X)
    fastlora.accelerate(model)
    assert all(fused(model))
    close(model(X), expected)
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
    scaled = model(X)
    assert not torch.allclose(scaled, expected)
    fastlora.restore(model)
    close(scaled, model(X))


@torch.no_grad()
def test_several_active_adapters_and_switching():
    model = with_two()
    answers = {}
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        answers[tuple(names)] = model(X)
    with model.disable_adapter():
        answers[()] = model(X)
    fastlora.accelerate(model)
    for names, expected in answers.items():
        if names:
            model.base_model.set_adapter(list(names))
            assert all(fused(model))
            close(model(X), expected)
    with model.disable_adapter():
        assert torch.equal(model(X), answers[()])


@torch.no_grad()
def test_an_adapter_for_each_sample():
    model = with_two()
    expected = model(X, adapter_names=NAMES)
    fastlora.accelerate(model)
    calls = []
    for layer in layers(model).values():
        host = layer._fastlora_plan.host
        inner = host.mixed
        vars(host)["mixed"] = lambda *a, inner=inner: calls.append(1) or inner(*a)
    close(model(X, adapter_names=NAMES), expected)
    assert len(calls) == 4
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(X, adapter_names=NAMES[:2])


@torch.no_grad()
def test_a_strength_for_each_sample():
    """fastlora's own function on PEFT's adapter: sample by sample as PEFT with that scaling."""
    model = build()
    strengths = [0.0, 0.5, 2.0]
    rows = []
    for i, strength in enumerate(strengths):
        for layer in layers(model).values():
            layer.set_scale("default", strength)
        rows.append(model(X)[i])
        for layer in layers(model).values():
            layer.set_scale("default", 1.0)
    fastlora.accelerate(model)
    fastlora.set_scale(model, {"default": torch.tensor(strengths)})
    # Strengths are float32 also beside float64.
    torch.testing.assert_close(model(X), torch.stack(rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_is_at_most_twice_as_far_from_float64_as_peft(dtype):
    exact = build()(X)
    model = build().to(dtype)
    plain = model(X)
    fastlora.accelerate(model)
    assert all(fused(model))
    double = copy.deepcopy(model).double()
    fastlora.restore(double)
    reference = double(X)
    error, allowed = (model(X) - reference).abs().max(), (plain - reference).abs().max()
    assert model(X).dtype == dtype
    assert error <= 2 * allowed + torch.finfo(dtype).eps * reference.abs().max()
    assert (reference - exact).abs().max() < 0.3 * exact.abs().max()


def test_gradients_reach_peft_s_own_parameters():
    model = build().train()
    model(X).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fastlora.accelerate(model)
    assert all(fused(model))
    model(X).square().sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() and all(".lora_" in name for name in got)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


def test_dropout_in_training_is_peft_s_own():
    model = build(lora_dropout=0.5).train()
    torch.manual_seed(3)
    expected = model(X)
    fastlora.accelerate(model)
    torch.manual_seed(3)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("case", ["plain", "dora", "bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_unmerging_is_exact(case, dtype):
    model = build(torch.float32, **CASES[case]).to(dtype)
    fastlora.accelerate(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    unmerged = model(X)
    for _ in range(3):
        model.merge_adapter()
        assert not torch.equal(layers(model)["base_model.model.l1"].weight, before[KEY])
        torch.testing.assert_close(model(X), unmerged, rtol=0.05, atol=0.05)
        model.unmerge_adapter()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert torch.equal(model(X), unmerged)


KEY = "base_model.model.l1.base_layer.weight"


@torch.no_grad()
def test_what_was_written_while_merged_is_not_undone():
    model = build()
    fastlora.accelerate(model)
    model.merge_adapter()
    layer = layers(model)["base_model.model.l1"]
    layer.base_layer.weight.add_(1.0)
    expected = layer.base_layer.weight - layer.get_delta_weight("default")
    model.unmerge_adapter()
    close(layer.base_layer.weight, expected)


@torch.no_grad()
def test_merged_and_moved_to_another_dtype():
    model = build()
    fastlora.accelerate(model)
    before = layers(model)["base_model.model.l1"].base_layer.weight.clone()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert torch.equal(layers(model)["base_model.model.l1"].base_layer.weight, before.bfloat16())


@torch.no_grad()
def test_safe_merge_of_a_broken_adapter_changes_nothing():
    model = build(targets=["l1"])
    fastlora.accelerate(model)
    layer = layers(model)["base_model.model.l1"]
    layer.lora_A["default"].weight[0, 0] = float("nan")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged
    assert "_fastlora_pristine" not in vars(layer)


@torch.no_grad()
def test_merge_and_unload_gives_the_plain_model():
    model = build()
    expected = model(X)
    fastlora.accelerate(model)
    plain = model.merge_and_unload()
    assert type(plain.l1) is nn.Linear and not any("_fastlora" in n for n in vars(plain.l1))
    close(plain(X), expected)


# --- what stays PEFT's ----------------------------------------------------------------------------


def test_the_books_are_peft_s():
    model = build()
    before = list(model.state_dict()), [n for n, _ in model.named_modules()], repr(model)
    objects = layers(model)
    fastlora.accelerate(model)
    assert (list(model.state_dict()), [n for n, _ in model.named_modules()], repr(model)) == before
    for name, layer in layers(model).items():
        assert layer is objects[name] and isinstance(layer, LoraLayer)
    layer = layers(model)["base_model.model.l1"]
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
    assert (layer.in_features, layer.out_features) == (16, 32)
    assert layer.get_base_layer() is layer.base_layer and type(layer.base_layer) is nn.Linear
    assert layer.active_adapters == ["default"] and not layer.merged
    assert layer.scaling == {"default": 7 / 4}
    saved = get_peft_model_state_dict(model)
    fastlora.restore(model)
    assert saved.keys() == get_peft_model_state_dict(model).keys()


@torch.no_grad()
def test_restore_gives_back_the_very_objects():
    model = with_two()
    before = {n: (m, type(m), set(vars(m))) for n, m in model.named_modules()}
    values = {n: t.clone() for n, t in model.state_dict().items()}
    fastlora.accelerate(model)
    model(X)
    model.merge_adapter()
    model.unmerge_adapter()
    fastlora.restore(model)
    for name, module in model.named_modules():
        assert (module, type(module), set(vars(module))) == before[name], name
    scalings = [type(m.scaling) for m in layers(model).values()]
    assert scalings == [dict] * 4
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())


@torch.no_grad()
def test_adapters_come_and_go():
    model = build()
    fastlora.accelerate(model)
    model.add_adapter("other", config(3, 1.5, ["l1", "l2"]), autocast_adapter_dtype=False)
    model.eval()
    twin = with_two()
    twin.load_state_dict(model.state_dict())
    for name in ("other", "default"):
        model.set_adapter(name)
        twin.set_adapter(name)
        assert all(fused(model))
        close(model(X), twin(X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("other")
        twin.delete_adapter("other")
    close(model(X), twin(X))
    assert list(fastlora.adapters(model)) == ["default"]


@torch.no_grad()
def test_layers_that_come_later_are_accelerated_too():
    model = build(targets=["l1"])
    fastlora.accelerate(model)
    model.add_adapter("other", config(2, 2, ["l2", "conv"]))
    assert len(fused(model)) == 3
    fastlora.restore(model)
    model.add_adapter("third", config(2, 2, ["emb"]))
    assert [type(m).__module__ for m in layers(model).values()] == ["peft.tuners.lora.layer"] * 4


@torch.no_grad()
def test_parameters_may_be_exchanged():
    model = build()
    fastlora.accelerate(model)
    model(X)
    other = build()
    for parameter in other.parameters():
        parameter.mul_(1.1)
    model.load_state_dict(other.state_dict(), assign=True)
    close(model(X), other(X))


@torch.no_grad()
def test_copies_and_pickles():
    model = build()
    fastlora.accelerate(model)
    expected = model(X)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (twin, torch.load(file, weights_only=False)):
        assert all(fused(copied))
        close(copied(X), expected)
        layers(copied)["base_model.model.l1"].set_scale("default", 0.0)
        assert not torch.allclose(copied(X), expected)
        close(model(X), expected)


@torch.no_grad()
def test_hooks_of_inner_modules_are_called():
    model = build()
    fastlora.accelerate(model)
    layer, seen = layers(model)["base_model.model.l1"], []
    expected = model(X)
    handles = [
        layer.base_layer.register_forward_hook(lambda *a: seen.append("base")),
        layer.lora_A["default"].register_forward_hook(lambda *a: seen.append("A")),
    ]
    close(model(X), expected)
    assert seen == ["base", "A"]
    for handle in handles:
        handle.remove()
    assert all(fused(model))


# --- fastlora's functions on them -----------------------------------------------------------------


@torch.no_grad()
def test_fastlora_s_functions_know_peft_s_adapters(tmp_path):
    model = with_two()
    fastlora.accelerate(model)
    model.base_model.set_adapter(["default", "other"])
    info = fastlora.adapters(model)
    assert {n: (i.modules, i.rank) for n, i in info.items()} == {
        "default": (("emb", "conv", "l1", "l2"), 4),
        "other": (("l1", "l2"), 3),
    }
    assert fastlora.verify(model, X)
    both = model(X)
    with fastlora.scaled(model, {"other": 0.0}):
        without = model(X)
    model.set_adapter("default")
    close(without, model(X))
    model.base_model.set_adapter(["default", "other"])
    fastlora.fold(model)
    close(model(X), both, 1e-6)
    fastlora.unfold(model)
    fastlora.save(model, tmp_path / "a.safetensors", "other")
    plain = build().unload()
    fastlora.load(plain, tmp_path / "a.safetensors", "x")
    model.set_adapter("other")
    close(model(X), plain(X), 1e-6)
    with pytest.raises(AdapterError, match=r"delete_adapter\('other'\)"):
        fastlora.remove(model, "other")


@torch.no_grad()
def test_fastlora_s_adapters_beside_peft_s(tmp_path):
    model = with_two()
    fastlora.accelerate(model)
    model.set_adapter("default")
    alone = model(X)
    fastlora.save(model, tmp_path / "a.safetensors", "default")
    fastlora.load(model, tmp_path / "a.safetensors", "native", scale=0.0)
    close(model(X), alone)
    assert fastlora.verify(model, X)
    fastlora.set_scale(model, {"default": 0.0, "native": 1.0})
    close(model(X), alone, 1e-6)
    fastlora.remove(model, "native")
    fastlora.set_scale(model, {"default": 1.0})
    close(model(X), alone)
    assert all(fused(model)) and type(layers(model)["base_model.model.l1"].base_layer) is nn.Linear


@torch.no_grad()
def test_a_compiled_model_follows_without_recompiling():
    import torch._dynamo.testing

    model = with_two()
    fastlora.accelerate(model)
    model.base_model.set_adapter(["default", "other"])
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    close(compiled(X), model(X))
    assert counter.frame_count == 1
    for scale in (0.5, 0.0, 2.0):
        for layer in layers(model).values():
            layer.set_scale("default", scale)
        close(compiled(X), model(X))
        fastlora.set_scale(model, {"other": scale})
        close(compiled(X), model(X))
    assert counter.frame_count == 1
    model.delete_adapter("other")
    close(compiled(X), model(X))


# --- what is left ---------------------------------------------------------------------------------


def test_types_that_are_not_lora_are_named():
    model = get_peft_model(Net(), LoHaConfig(r=2, target_modules=["l1"]))
    expected = type(model.base_model.model.l1)
    report = fastlora.accelerate(model)
    assert not report.replaced and "loha" in str(report)
    assert type(model.base_model.model.l1) is expected


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's of a newer transformers
def test_the_model_inside_of_a_peft_model():
    """Methods without layers have no model of PEFT's between theirs and the user's."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 9}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    inner = transformers.GPT2LMHeadModel(config)
    inner.model = inner.transformer  # as other architectures have it
    prompts = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=2)
    model = get_peft_model(inner, prompts)
    info = fastlora.inject(model, fastlora.LoRA(rank=2), where=["lm_head"])
    assert info.modules == ("lm_head",)
    assert str(fastlora.accelerate(model)) == "nothing to do"


@torch.no_grad()
def test_variants_stay_peft_s():
    """Two DoRA at once compound in PEFT, in the order in which they are active."""
    model = with_two(use_dora=True)
    model.add_adapter("third", config(2, 3.0, ["l1"], use_dora=True), autocast_adapter_dtype=False)
    model.eval()
    model.base_model.set_adapter(["default", "third"])
    expected = model(X)
    fastlora.accelerate(model)
    assert torch.allclose(model(X), expected, rtol=1e-12)
    assert fused(model) == [True, True, False, True]
    with pytest.raises(AdapterError, match="per sample"):
        fastlora.set_scale(model, {"default": torch.ones(3)})


@torch.no_grad()
def test_padding_mode_and_dilation_are_the_base_layer_s():
    """PEFT's own adapter of such a convolution crashes, or pads with zeros without a word."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")).double()
    model = get_peft_model(base, config(targets=["0"]), autocast_adapter_dtype=False).eval()
    layer = layers(model)["base_model.model.0"]
    weight = layer.weight + layer.get_delta_weight("default")
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    expected = layer.base_layer._conv_forward(x, weight, layer.bias)
    fastlora.accelerate(model)
    close(model(x), expected)
