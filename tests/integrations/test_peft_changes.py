"""Accelerated layers while PEFT takes adapters in, deletes them and exchanges their parameters.

The oracle is a model of the same parameters that nobody has accelerated, in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter_from_state_dict

X = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.lin = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.conv(self.emb(x)[:, None]).mean(1))


def config(rank: int, targets: list[str], **more: Any) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, **more)


def build(rank: int, targets: list[str], **more: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Net().double(), config(rank, targets, **more))
    return model.double().eval()


def fused(model: nn.Module) -> list[bool]:
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "_fastlora_plan")]
    return [layer.goes(layer._fastlora_plan) for layer in layers]


def close(model: Any, twin: Any) -> None:
    """The twin computes as PEFT does: it was copied before the model was accelerated."""
    torch.testing.assert_close(model(X), twin(X), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("target", ["emb", "conv", "lin"])
@pytest.mark.parametrize("dora", [False, True])
def test_another_adapter_comes_and_one_is_deleted(target, dora):
    model = build(4, [target], use_dora=dora)
    twin = copy.deepcopy(model)
    fastlora.accelerate(model)
    for each in (model, twin):
        torch.manual_seed(1)
        each.add_adapter("other", config(2, [target], use_dora=dora))
        each.set_adapter("other")
        each.double().eval()
    assert fused(model) == [True]
    close(model, twin)
    for each in (model, twin):
        each.delete_adapter("default")
    assert fused(model) == [True] and list(fastlora.adapters(model)) == ["other"]
    close(model, twin)


def hotswap(model: Any, name: str, source: Any, rank: int, alpha: float, targets: Any) -> None:
    """`hotswap_adapter`, from the parameters of another model's adapter instead of a file."""
    state = {
        key.replace(".default.", f".{name}."): value.clone()
        for key, value in source.state_dict().items()
        if ".lora_" in key
    }
    options = config(rank, targets, lora_alpha=alpha)
    hotswap_adapter_from_state_dict(model, state, name, options)


@torch.no_grad()
@pytest.mark.parametrize("alphas", [(3.0, 6.0), (3.0, 3.0)])
def test_hotswap_to_another_rank(alphas):
    """With the same scaling nothing is assigned that a layer could hear of."""
    targets = ["conv", "lin"]
    model, source = build(3, targets, lora_alpha=alphas[0]), build(6, targets)
    twin = copy.deepcopy(model)
    fastlora.accelerate(model)
    close(model, twin)
    for each in (model, twin):
        hotswap(each, "default", source, 6, alphas[1], targets)
    close(model, twin)
    assert fused(model) == [True, True]
    close(model, twin)


@torch.no_grad()
def test_two_adapters_exchange_their_ranks():
    """Together they have the rank that they had; each has its own gates all the same."""
    targets = ["lin"]
    model = build(2, targets, lora_alpha=1.0)
    model.add_adapter("other", config(4, targets, lora_alpha=8.0))
    model.base_model.set_adapter(["default", "other"])
    model.double().eval()
    twin = copy.deepcopy(model)
    fastlora.accelerate(model)
    close(model, twin)
    small, large = build(2, targets), build(4, targets)
    for each in (model, twin):
        hotswap(each, "default", large, 4, 2.0, targets)
        layer = each.base_model.model.lin
        for part in (layer.lora_A, layer.lora_B):  # to a smaller rank PEFT fills up with zeros
            key = "lora_A" if part is layer.lora_A else "lora_B"
            value = getattr(small.base_model.model.lin, key)["default"].weight
            part["other"].weight = nn.Parameter(value.clone())
    close(model, twin)
    assert fused(model) == [True]
