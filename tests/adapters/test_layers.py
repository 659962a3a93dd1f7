"""Layers that are traps: attention, fused paths, parametrisations, subclasses, shared ones."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastlora
from tests.adapters.oracles import assert_unchanged, lora_delta, randomise, same_bits, snapshot


def test_the_output_projection_of_multihead_attention_is_refused() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "ff": nn.Linear(8, 8)})
    before = snapshot(model)
    for spec in (fastlora.LoRA(rank=2), fastlora.Spectral()):
        for where in (r"attn.*", ["out_proj"]):
            with pytest.raises(fastlora.AdapterError, match="out_proj .*never calls it"):
                fastlora.inject(model, spec, where=where)
    assert_unchanged(model, before)
    assert fastlora.inject(model, fastlora.LoRA(rank=2)).modules == ("ff",)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    "spec", [fastlora.LoRA(rank=2), fastlora.Spectral()], ids=["lora", "spectral"]
)
def test_the_fused_path_of_transformer_layers_sees_adapters(activation: str, spec: Any) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation)
    model = nn.TransformerEncoder(layer, 3).eval()
    for i, p in enumerate(model.parameters()):
        with torch.no_grad():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    with torch.no_grad():
        plain = [model(x), model(x, src_key_padding_mask=padding)]
    before = snapshot(model)
    for where in (
        ["1.linear1"] if isinstance(spec, fastlora.LoRA) else ["1.norm1", "1.linear2"],
        None,
    ):
        fastlora.inject(model, spec, where=where)
        randomise(model)
        results = []
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                results.append([model(x), model(x, src_key_padding_mask=padding)])
        for trained, sampled, base in zip(*results, plain, strict=True):
            valid = ~padding if trained is results[0][1] else torch.ones_like(padding)
            torch.testing.assert_close(sampled[valid], trained[valid])
            assert (sampled - base).abs().max() > 0.05
        assert fastlora.verify(model, x)
        other = copy.deepcopy(model)
        fastlora.remove(model, "default")
        assert_unchanged(model, before)
        with torch.no_grad():  # the fused path is back, with its own bits
            assert same_bits(model(x), plain[0])
            assert same_bits(model(x, src_key_padding_mask=padding), plain[1])
            torch.testing.assert_close(other(x), results[1][0])


def test_parametrised_layers_keep_their_own_forward() -> None:
    for parametrise in (parametrizations.weight_norm, parametrizations.orthogonal):
        model = nn.Sequential(parametrise(nn.Linear(6, 5)))
        x = torch.randn(3, 6)
        y, keys, kind = model(x).detach(), list(model.state_dict()), type(model[0])
        fastlora.inject(model, fastlora.LoRA(rank=2), name="a", freeze=False)
        torch.testing.assert_close(model(x), y)
        randomise(model)
        delta = lora_delta(nn.Linear(6, 5), model[0].fastlora["a"], 1.0).float()
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(model(x), y + x @ delta.t())
        other = copy.deepcopy(model)
        torch.testing.assert_close(other(x), model(x))
        fastlora.set_scale(other, 0.0)
        assert not torch.allclose(other(x), model(x))
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        for spec in (fastlora.Spectral(), fastlora.LoRA(rank=2, dora=True)):
            with pytest.raises(fastlora.AdapterError, match="need.* the plain weight"):
                fastlora.inject(model, spec, where="0", name="b")
        with pytest.raises(fastlora.AdapterError, match="a ParametrizedLinear computes"):
            fastlora.fold(model)
        fastlora.remove(model, "a")
        assert list(model.state_dict()) == keys and type(model[0]) is kind
        assert same_bits(model(x).detach(), y)


def test_a_layer_whose_class_changes_after_it_was_adapted() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    fastlora.inject(model, fastlora.LoRA(rank=2), name="a")
    randomise(model)
    x = torch.randn(3, 6)
    y = model(x).detach()
    parametrizations.weight_norm(model[1])
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(copy.deepcopy(model)(x), y)
    before = snapshot(model)
    for call in (
        lambda: fastlora.remove(model, "a"),
        lambda: fastlora.inject(model, fastlora.LoRA(rank=2), name="b"),
    ):
        with pytest.raises(fastlora.AdapterError, match="class was changed after it was adapted"):
            call()
        assert_unchanged(model, before)
    torch.nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    torch.testing.assert_close(model(x), y)
    fastlora.remove(model, "a")
    assert type(model[1]) is nn.Linear


def test_weights_that_a_hook_makes() -> None:
    model = nn.Sequential(prune.random_unstructured(nn.Linear(6, 5), "weight", 0.3))
    x = torch.randn(3, 6)
    y = model(x).detach()
    fastlora.inject(model, fastlora.LoRA(rank=2), name="a")
    randomise(model)
    delta = lora_delta(nn.Linear(6, 5), model[0].fastlora["a"], 1.0).float()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), y + x @ delta.t())
    with torch.no_grad():
        model[0].weight_orig.mul_(2)  # the hook makes another weight at the next call
        plain = F.linear(x, model[0].weight_orig * model[0].weight_mask, model[0].bias)
        torch.testing.assert_close(model(x), plain + x @ delta.t())
    for spec in (fastlora.Spectral(), fastlora.LoRA(rank=2, dora=True)):
        with pytest.raises(fastlora.AdapterError, match="need.* the plain weight"):
            fastlora.inject(model, spec, where="0", name="b")
    with pytest.raises(fastlora.AdapterError, match="computes with its weight in a way of its own"):
        fastlora.fold(model)


class Doubled(nn.Linear):
    """A subclass with arguments of its own, and an output that its backward has saved."""

    def forward(self, x: Tensor, factor: float = 2.0, *, shift: float = 0.0) -> Tensor:
        return (factor * super().forward(x) + shift).exp()


def test_a_subclass_of_linear_computes_in_its_own_way() -> None:
    layer = Doubled(6, 5)
    x = torch.randn(3, 6, requires_grad=True)
    calls = [((x,), {}), ((x, 3.0), {"shift": 0.5}), ((), {"x": x, "factor": 0.1})]
    plain = [layer(*a, **k).detach() for a, k in calls]
    before = snapshot(layer)
    fastlora.inject(layer, fastlora.LoRA(rank=2), name="a", freeze=False)
    assert isinstance(layer, Doubled)
    randomise(layer)
    delta = lora_delta(nn.Linear(6, 5), layer.fastlora["a"], 1.0).float()
    for (a, k), y in zip(calls, plain, strict=True):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(layer(*a, **k), y + x @ delta.t())
    layer(x).sum().backward()  # nothing that exp has saved was overwritten
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    fastlora.disable(layer)
    assert same_bits(layer(x).detach(), plain[0])
    fastlora.remove(layer, "a")
    assert_unchanged(layer, before)


def test_a_subclass_at_module_level_can_be_pickled() -> None:
    layer = Doubled(4, 4)
    fastlora.inject(layer, fastlora.LoRA(rank=2))
    randomise(layer)
    x = torch.randn(2, 4)
    other = pickle.loads(pickle.dumps(layer))
    assert type(other) is type(layer) and torch.equal(other(x), layer(x))


def test_a_conv_subclass_is_refused() -> None:
    class Mine(nn.Conv2d):
        pass

    with pytest.raises(
        fastlora.AdapterError, match=r"\(Mine\): this kind of layer is not supported"
    ):
        fastlora.inject(nn.Sequential(Mine(2, 2, 1)), fastlora.LoRA(rank=2), where="0")


def test_the_meta_device_lazy_layers_and_empty_ones() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    before = {k: type(m) for k, m in model.named_modules()}
    for spec in (fastlora.LoRA(rank=2), fastlora.Spectral()):
        with pytest.raises(fastlora.AdapterError, match="0: the model is on the meta device"):
            fastlora.inject(model, spec)
    assert {k: type(m) for k, m in model.named_modules()} == before
    lazy = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(fastlora.AdapterError, match="run the model once first"):
        fastlora.inject(lazy, fastlora.LoRA(rank=2), where="0")
    lazy(torch.randn(2, 3))
    fastlora.inject(lazy, fastlora.LoRA(rank=2), where="0")
    with pytest.raises(fastlora.AdapterError, match="its weight is complex"):
        fastlora.inject(nn.Linear(4, 4, dtype=torch.complex64), fastlora.LoRA(rank=2), where="")
    empty = nn.Sequential(nn.Embedding(0, 4))
    with pytest.raises(fastlora.AdapterError, match="its weight is empty"):
        fastlora.inject(empty, fastlora.LoRA(rank=2), where="0")


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embedding(x))))


@pytest.mark.parametrize("where", [None, ["second", "head"], r"first|second|embedding"])
def test_shared_modules_and_tied_weights(where: Any) -> None:
    model = Shared()
    x = torch.tensor([[1, 8], [3, 3]])
    y, before = model(x).detach(), snapshot(model)
    info = fastlora.inject(model, fastlora.LoRA(rank=2), where=where)
    assert model.first is model.second
    assert len(info.modules) == len(set(info.modules)) == (3 if where is None else 2)
    torch.testing.assert_close(model(x), y)
    randomise(model)
    assert model.embedding.weight is model.head.weight
    assert not torch.allclose(model(x), y)
    assert fastlora.verify(model, x)
    unfolded = model(x).detach()
    fastlora.fold(model)
    torch.testing.assert_close(model(x), unfolded, rtol=1e-4, atol=1e-4)
    fastlora.unfold(model)
    fastlora.remove(model, "default")
    assert_unchanged(model, before)
    assert same_bits(model(x).detach(), y)
