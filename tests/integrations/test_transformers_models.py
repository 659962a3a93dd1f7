"""Adapters on models of transformers: what they compute, train, generate, and what files they make.

The oracle is the plain model in float64 whose weights have the updates written into them by hand.
"""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.adapters.oracles import assert_unchanged, same_bits, snapshot
from tests.integrations.transformers_cases import (
    DECODER,
    GENERATE,
    MODELS,
    T,
    adapt,
    adapted,
    fresh,
    inputs,
    linear_paths,
    merged_by_hand,
    output,
)

each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    T.logging.set_verbosity_error()
    T.utils.logging.disable_progress_bar()


# --- what is computed -----------------------------------------------------------------------------


@each_model
def test_it_is_the_model_with_merged_weights(name: str) -> None:
    model, plain = adapted(name), fresh(name)
    exact = output(merged_by_hand(name, model, ratio=1.5), name, torch.float64).detach()
    got = output(model, name).detach()
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)
    assert (output(plain, name) - got).abs().max() > 0.05  # the adapters do something
    report = fastlora.verify(model, **inputs(name))
    assert report.passed, report


@each_model
def test_fold_unfold_and_remove_leave_no_trace(name: str) -> None:
    model = fresh(name)
    before = snapshot(model)
    base = output(model, name).detach()
    adapt(model)
    y = output(model, name).detach()
    fastlora.fold(model)
    torch.testing.assert_close(output(model, name).detach(), y, rtol=1e-4, atol=1e-5)
    report = fastlora.verify(model, **inputs(name))
    assert report.passed, report
    fastlora.unfold(model)
    assert same_bits(output(model, name), y)
    fastlora.remove(model, "default")
    assert_unchanged(model, before)
    assert same_bits(output(model, name), base)


@each_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    """Both ways: the adapters in the model's dtype, and float32 ones beside it. T5's feed forward
    reads `self.wo.weight.dtype`, which stays that of the base."""
    converted = adapted(name).to(dtype)
    beside = fresh(name).to(dtype)
    adapt(beside)
    own = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    for model in (converted, beside):
        assert output(model, name, dtype).dtype == dtype
        report = fastlora.verify(model, **own)
        assert report.passed, report
    assert {p.dtype for p in fastlora.parameters(beside)} == {torch.float32}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "CLIPTextModel", "GPT2LMHeadModel"])
def test_attention_implementations_agree(name: str) -> None:
    model = adapted(name)
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        results.append(output(model, name).detach())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_mixture_of_experts() -> None:
    """Its experts are parameters without layers, which stay plain; what is linear is adapted. Their
    grouped product has no float64, so `verify` wants the eager implementation."""
    torch.manual_seed(0)
    config = T.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    model: Any = T.MixtralForCausalLM(config).eval()
    adapt(model)
    assert not any("experts" in path for path in fastlora.adapters(model)["default"].modules)
    model.set_experts_implementation("eager")
    report = fastlora.verify(model, **inputs("LlamaForCausalLM"))
    assert report.passed, report


@pytest.mark.parametrize("name", GENERATE)
def test_generate_with_and_without_the_cache(name: str) -> None:
    model, ids = adapted(name), inputs(name)["input_ids"]
    folded = copy.deepcopy(model)
    fastlora.fold(folded, permanent=False)
    settings: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert torch.equal(cached, folded.generate(ids, **settings))
    assert not torch.equal(cached, fresh(name).generate(ids, **settings))


def test_compiled_without_graph_breaks_and_strengths_without_recompiling() -> None:
    name = "GPT2LMHeadModel"  # Conv1D and Linear
    model = adapted(name)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(output(compiled, name), output(model, name))
        fastlora.set_scale(model, {"default": 0.5})
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(output(compiled, name), output(model, name))


# --- training -------------------------------------------------------------------------------------


@each_model
def test_a_training_step_with_gradient_checkpointing(name: str) -> None:
    model = adapted(name).train()
    target = torch.randn_like(output(model, name))
    base = {k: p.detach().clone() for k, p in model.named_parameters() if "fastlora" not in k}

    def gradients() -> list[Any]:
        model.zero_grad()
        (output(model, name) - target).square().mean().backward()
        return [p.grad for p in fastlora.parameters(model)]

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None)  # what newer versions call it
    (enable or model.gradient_checkpointing_enable)()
    for a, b in zip(gradients(), plain, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    optimiser, losses = torch.optim.Adam(fastlora.parameters(model), lr=3e-2), []
    for _ in range(5):
        optimiser.zero_grad()
        loss = (output(model, name) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[k], v) and now[k].grad is None for k, v in base.items())


def test_checkpoints_of_the_trainer_have_the_adapters(tmp_path: Path) -> None:
    """Why `save_pretrained` writes them beside the base: a training goes on from there."""
    pytest.importorskip("accelerate")
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 64, (8, 9))]

    def train(model: nn.Module, resume: bool) -> dict[str, Any]:
        settings: dict[str, Any] = dict(max_steps=2, save_steps=2, per_device_train_batch_size=2)
        settings |= dict(report_to=[], use_cpu=True, logging_strategy="no", disable_tqdm=True)
        arguments = T.TrainingArguments(str(tmp_path), **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pin_memory without an accelerator
            T.Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return {k: v.clone() for k, v in model.state_dict().items()}

    model = adapted("LlamaForCausalLM")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained = train(model, resume=False)
    changed = {k for k in trained if not torch.equal(trained[k], before[k])}
    assert changed == {k for k in trained if ".fastlora." in k}
    resumed = train(adapted("LlamaForCausalLM"), resume=True)
    assert all(same_bits(resumed[k], trained[k]) for k in trained)


# --- checkpoints ----------------------------------------------------------------------------------


@each_model
def test_from_pretrained_reads_the_base_of_what_save_pretrained_wrote(
    name: str, tmp_path: Path
) -> None:
    model, plain = adapted(name), fresh(name)
    fastlora.fold(model)  # `weight` stays that of the base
    model.save_pretrained(tmp_path / "all")
    read, info = type(plain).from_pretrained(tmp_path / "all", output_loading_info=True)
    assert same_bits(output(read.eval(), name), output(plain, name))
    assert not info["missing_keys"]
    adapters = {k for k in model.state_dict() if ".fastlora." in k}
    assert set(info["unexpected_keys"]) == adapters
    base = {k: v for k, v in model.state_dict().items() if k not in adapters}
    model.save_pretrained(tmp_path / "base", state_dict=base)
    read, info = type(plain).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert same_bits(output(read.eval(), name), output(plain, name))
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_tied_weights_stay_tied_and_are_not_folded_for_good() -> None:
    """`lm_head` adds its adapter, the embedding that has the same weight does not."""
    model = adapted("GPT2LMHeadModel")
    assert model.lm_head.weight is model.transformer.wte.weight
    embedded = model.transformer.wte(torch.arange(5))
    assert same_bits(embedded, fresh("GPT2LMHeadModel").transformer.wte(torch.arange(5)))
    with pytest.raises(fastlora.AdapterError, match=r"wte\.weight and lm_head\.weight are one"):
        fastlora.fold(model, permanent=True)
    assert fastlora.verify(model, **inputs("GPT2LMHeadModel")).passed


def test_folded_for_good_is_a_plain_checkpoint(tmp_path: Path) -> None:
    name = "GPT2LMHeadModel"
    model = fresh(name)
    paths = [path for path in linear_paths(model) if path != "lm_head"]
    fastlora.inject(model, fastlora.LoRA(rank=4), where=paths, seed=0)
    with torch.no_grad():
        for p in fastlora.parameters(model):
            p.normal_(0, 0.1)
    y = output(model, name).detach()
    fastlora.fold(model, permanent=True)
    model.save_pretrained(tmp_path)
    read, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    torch.testing.assert_close(output(read.eval(), name), y, rtol=1e-4, atol=1e-5)


# --- accelerate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["hooks", "adapters"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_hooks_of_accelerate(name: str, first: str) -> None:
    """Hooks keep the forward that a layer had: the adapters must be in it, whichever came first,
    and leave it when they are removed."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, plain = fresh(name), fresh(name)

    def hook() -> None:
        for path in linear_paths(model):
            layer = model.get_submodule(path)
            hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu", io_same_device=True))

    steps = [hook, lambda: adapt(model)]
    for step in steps if first == "hooks" else steps[::-1]:
        step()
    expected = output(adapted(name), name)
    assert same_bits(output(model, name), expected)
    assert fastlora.verify(model, **inputs(name)).passed
    twin = copy.deepcopy(model)
    hooks.remove_hook_from_module(twin, recurse=True)
    assert same_bits(output(twin, name), expected)
    for one in (model, twin):
        fastlora.remove(one, "default")
        assert same_bits(output(one, name), output(plain, name))
    hooks.remove_hook_from_module(model, recurse=True)
    assert same_bits(output(model, name), output(plain, name))


def test_dispatch_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    name = "LlamaForCausalLM"
    model = accelerate.dispatch_model(fresh(name), {"": "cpu"}, force_hooks=True)
    adapt(model)
    assert same_bits(output(model, name), output(adapted(name), name))


# --- the size of strengths ------------------------------------------------------------------------


def test_strengths_per_sample() -> None:
    name = "LlamaForCausalLM"
    model = adapted(name)
    fastlora.set_scale(model, {"default": torch.tensor([0.0, 1.0])})
    both = output(model, name).detach()
    torch.testing.assert_close(both[0], output(fresh(name), name)[0])
    torch.testing.assert_close(both[1], output(adapted(name), name)[1])
    assert not math.isclose(both[0, 0, 0].item(), output(adapted(name), name)[0, 0, 0].item())
