"""Which way an accelerated layer goes where PEFT's books say something unusual.

The oracle is a copy of the model that nobody has accelerated, in float64.
"""

from __future__ import annotations

import copy
import gc
import importlib
import io
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import set_peft_model_state_dict

X = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def config(targets: list[str], **more: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False, **more)


def build(*targets: str, **more: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    return get_peft_model(net, config(list(targets or ("0", "2")), **more)).double().eval()


def pair(**more: Any) -> tuple[Any, Any]:
    """A model, accelerated, and a copy that is not."""
    model = build(**more)
    twin = copy.deepcopy(model)
    fastlora.accelerate(model)
    return model, twin


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def fused(model: nn.Module) -> list[bool]:
    return [layer.goes(layer._fastlora_plan) for layer in layers(model)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


@torch.no_grad()
def test_dora_of_scaling_zero_still_rescales_rows():
    """PEFT's does: its magnitude is not the base's norm. fastlora's own zero is the base layer."""
    model, twin = pair(use_dora=True)
    with twin.disable_adapter():
        base = twin(X)
    for scaling in (0.0, 1.0, 0.0):
        for layer in layers(model) + layers(twin):
            layer.scaling["default"] = scaling
        close(model(X), twin(X))
        assert not torch.allclose(model(X), base, rtol=1e-2)
        assert fused(model) == [True, True]
    fastlora.set_scale(model, {"default": 0.0})
    close(model(X), base)


@torch.no_grad()
@pytest.mark.parametrize("scaling", [1e39, -1e39, float("inf"), float("nan")])
def test_scalings_beyond_float32(scaling):
    """Strengths are float32: such a scaling is PEFT's to compute."""
    model, twin = pair()
    for layer in layers(model) + layers(twin):
        layer.set_scale("default", scaling)
    close(model(X), twin(X))
    assert fused(model) == [False, False]
    for layer in layers(model) + layers(twin):
        layer.set_scale("default", 1.0)
    close(model(X), twin(X))
    assert fused(model) == [True, True]


@torch.no_grad()
@pytest.mark.parametrize("names", [None, ["default", "other", "__base__"]])
def test_a_dropout_in_training_inside_of_a_layer_that_is_not(names):
    """As of every adapter that PEFT adds to a model in eval mode."""
    model, twin = pair()
    for each in (model, twin):
        torch.manual_seed(1)
        each.add_adapter("other", config(["0"], lora_dropout=0.5))
        each.double()
        each.set_adapter("other")
    assert not model.training and fused(model) == [False, True]
    asked = {} if names is None else {"adapter_names": names}
    results = []
    for each in (model, twin):
        torch.manual_seed(2)
        results.append(each(X, **asked))
    close(*results)
    model.eval()
    assert fused(model) == [True, True]
    close(model(X), twin.eval()(X))


def test_gradients_of_torch_func():
    """The operators have none that functorch takes; PEFT's own forward pass has."""
    model, twin = pair()
    found = [torch.func.jacrev(each)(X[0]) for each in (model, twin)]
    close(*found)
    names = ["default", "__base__", "default"]
    found = [
        torch.func.grad(lambda x, each=each: each(x, adapter_names=names).sum())(X)
        for each in (model, twin)
    ]
    close(*found)
    assert fused(model) == [True, True]


@torch.no_grad()
@pytest.mark.parametrize("how", ["load_state_dict", "load_adapter"])
def test_a_folded_model_follows_what_is_loaded(how):
    model, twin = pair()
    state = {name: 1.25 * tensor for name, tensor in twin.state_dict().items()}
    adapter = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    fastlora.fold(model)
    torch.testing.assert_close(model(X), twin(X), rtol=1e-6, atol=1e-6)
    for each in (model, twin):
        if how == "load_state_dict":
            each.load_state_dict(state)
        else:
            saved = {name.replace(".default", ""): tensor for name, tensor in adapter.items()}
            set_peft_model_state_dict(each, saved)
    torch.testing.assert_close(model(X), twin(X), rtol=1e-6, atol=1e-6)
    fastlora.unfold(model)
    close(model(X), twin(X))


# --- modules that others exchange or listen to ----------------------------------------------------


def exchanged(layer: Any) -> None:
    torch.manual_seed(5)
    layer.lora_A["default"] = nn.Linear(8, 4, bias=False).double()


def given_a_base(layer: Any) -> None:
    torch.manual_seed(5)
    layer.base_layer = nn.Linear(8, 6).double()


def given_a_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Dropout(0.5).train()


def given_a_forward(layer: Any) -> None:
    """As accelerate's hooks and layerwise casting do."""
    inner = layer.lora_A["default"]
    inner.forward = lambda x: 3 * nn.functional.linear(x, inner.weight)


def parametrised(layer: Any) -> None:
    nn.utils.parametrize.register_parametrization(layer.lora_A["default"], "weight", nn.Tanh())


CHANGES = [exchanged, given_a_base, given_a_dropout, given_a_forward, parametrised]


@torch.no_grad()
@pytest.mark.parametrize("names", [None, ["default", "default", "__base__"]])
@pytest.mark.parametrize("change", CHANGES)
def test_what_others_do_to_the_modules_of_an_adapter(change, names):
    model, twin = pair()
    asked = {} if names is None else {"adapter_names": names}
    results = []
    for each in (model, twin):
        change(layers(each)[0])
        torch.manual_seed(2)
        results.append(each(X, **asked))
    close(*results)
    assert fused(model)[1]


# --- graphs, copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dropout", "merged"])
def test_what_peft_computes_becomes_one_graph(how):
    model, twin = pair(lora_dropout=0.5 if how == "dropout" else 0.0)
    for each in (model, twin):
        if how == "dropout":
            each.train()
        else:
            each.merge_adapter()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for each in (compiled, twin):
        torch.manual_seed(2)
        results.append(each(X))
    close(*results)
    if how == "dropout":
        fastlora.set_scale(model, {"default": 0.5})
        for layer in layers(twin):
            layer.scale_layer(0.5)
        results = []
        for each in (compiled, twin):
            torch.manual_seed(2)
            results.append(each(X))
        close(*results)


@torch.no_grad()
def test_a_compiled_dora_follows_scalings_without_recompiling():
    import torch._dynamo.testing

    model, twin = pair(use_dora=True)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for scaling in (1.0, 0.5, 0.0, 2.0):
        for layer in layers(model) + layers(twin):
            layer.set_scale("default", scaling)
        close(compiled(X), twin(X))
    assert counter.frame_count == 1


def replicas(model: nn.Module) -> nn.Module:
    """What DataParallel makes of a model for another device; here the weights are doubled."""
    made = {n: m._replicate_for_data_parallel() for n, m in model.named_modules()}
    for path, module in model.named_modules():
        for name in module._modules:
            made[path]._modules[name] = made[f"{path}.{name}".lstrip(".")]
        for name, parameter in module._parameters.items():
            if parameter is None:
                made[path]._parameters[name] = None
            else:
                setattr(made[path], name, 2 * parameter)
    return made[""]


@torch.no_grad()
def test_replicas_of_data_parallel_compute_on_their_own_parameters():
    model, twin = pair()
    fastlora.set_scale(model, {"default": 0.5})
    for layer in layers(twin):
        layer.scale_layer(0.5)
    before = model(X)
    close(replicas(model)(X), replicas(twin)(X))
    assert torch.equal(model(X), before) and fused(model) == [True, True]


@torch.no_grad()
def test_a_shallow_copy_leaves_the_layer_its_scalings():
    model, twin = pair()
    copied = copy.copy(layers(model)[0])
    del copied
    gc.collect()
    for each in (model, twin):
        layers(each)[0].set_scale("default", 3.0)
    close(model(X), twin(X))


def test_layers_that_come_into_a_model_read_by_another_process(monkeypatch):
    file = io.BytesIO()
    model = build("0")
    fastlora.accelerate(model)
    torch.save(model, file)
    file.seek(0)
    inject: Any = BaseTuner.inject_adapter
    monkeypatch.setattr(BaseTuner, "inject_adapter", inject.__wrapped__)  # PEFT's, as there
    importlib.reload(sys.modules["fastlora.integrations.peft"])  # which the pickle imports
    read = torch.load(file, weights_only=False)
    read.add_adapter("other", config(["2"]))
    assert fused(read.eval()) == [True, True]


@torch.no_grad()
def test_restored_models_keep_nothing():
    """Folded weights of the hosts among it, which are as large as the model."""
    model = build()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    fastlora.accelerate(model)
    host = weakref.ref(layers(model)[0]._fastlora_plan.host)
    fastlora.fold(model)
    fastlora.restore(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    gc.collect()
    assert host() is None
