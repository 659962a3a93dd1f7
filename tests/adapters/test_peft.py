"""PEFT 0.21 as the oracle where it is right: LoRA and DoRA on Linear, Conv2d (dilation 1, zero
padding, no groups) and Embedding, rank-stabilised LoRA, several adapters, outputs and gradients."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.adapters.oracles import randomise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the imports of others warn about
    peft = pytest.importorskip("peft")

LAYERS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(14, 9), lambda: torch.randn(2, 5, 14)),
    "conv": (
        lambda: nn.Conv2d(6, 8, 3, stride=2, padding=(1, 2)),
        lambda: torch.randn(2, 6, 7, 8),
    ),
    "conv_1x1": (lambda: nn.Conv2d(6, 8, 1, bias=False), lambda: torch.randn(2, 6, 4, 4)),
    "embedding": (lambda: nn.Embedding(13, 6), lambda: torch.tensor([[1, 12], [0, 5]])),
}
CASES = {
    "lora": dict(r=4, lora_alpha=6),
    "rslora": dict(r=5, lora_alpha=3, use_rslora=True),
    "dora": dict(r=4, lora_alpha=4, use_dora=True),
    "dora_alpha": dict(r=4, lora_alpha=10, use_dora=True),
}


def wrapped(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(make())


def peft_twin(model: nn.Module, ours: nn.Module, configs: dict[str, dict[str, Any]]) -> nn.Module:
    """PEFT on `model`, with the values of our adapters, all of them active."""
    for name, config in configs.items():
        kwargs = {"lora_dropout": 0.0, "target_modules": ["0"], **config}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            model = peft.inject_adapter_in_model(
                peft.LoraConfig(**kwargs), model, adapter_name=name
            )
    layer, own = model[0], ours[0].fastlora
    layer.set_adapter(list(configs))
    with torch.no_grad():
        for name in configs:
            if name in layer.lora_A:
                layer.lora_A[name].weight.copy_(own[name].down)
                layer.lora_B[name].weight.copy_(own[name].up)
            else:
                layer.lora_embedding_A[name].copy_(own[name].down)
                layer.lora_embedding_B[name].copy_(own[name].up)
            if own[name].magnitude is not None:
                vector = layer.lora_magnitude_vector[name].weight
                vector.copy_(own[name].magnitude.view(vector.shape))
    return model


def peft_parameters(layer: nn.Module, name: str, dora: bool) -> list[torch.Tensor]:
    if name in layer.lora_A:
        found = [layer.lora_A[name].weight, layer.lora_B[name].weight]
    else:
        found = [layer.lora_embedding_A[name], layer.lora_embedding_B[name]]
    return found + ([layer.lora_magnitude_vector[name].weight] if dora else [])


def spec_of(config: dict[str, Any]) -> fastlora.LoRA:
    return fastlora.LoRA(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rank_stabilized=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_outputs_and_gradients(layer: Any, case: dict[str, Any]) -> None:
    make, data = layer
    ours, theirs, x = wrapped(make).double(), wrapped(make).double(), data()
    fastlora.inject(ours, spec_of(case), name="a", seed=0)
    randomise(ours)
    theirs = peft_twin(theirs, ours, {"a": case})
    if x.is_floating_point():
        x = x.double().requires_grad_()
    slot = ours[0].fastlora["a"]
    mine = [p for p in (slot.down, slot.up, slot.magnitude) if p is not None]
    other = peft_parameters(theirs[0], "a", slot.magnitude is not None)
    more = [x] if x.is_floating_point() else []
    probe = torch.randn_like(ours(x))
    # gates are float32: scalings such as 3/sqrt(5) carry its rounding
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad((ours(x) * probe).sum(), mine + more)
    expected = torch.autograd.grad((theirs(x) * probe).sum(), other + more)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.view(a.shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_several_adapters(layer: Any) -> None:
    """A DoRA only as the first: PEFT rescales what the adapters before it have added, too, so that
    its result depends on their order."""
    make, data = layer
    ours, theirs, x = wrapped(make), wrapped(make), data()
    cases = {"a": CASES["dora_alpha"], "b": CASES["rslora"], "c": CASES["lora"]}
    for name, case in cases.items():
        fastlora.inject(ours, spec_of(case), name=name, seed=0)
    randomise(ours)
    theirs = peft_twin(theirs, ours, cases)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_a_training_run_follows_pefts_step_by_step() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 3))

    ours = model()
    fastlora.inject(ours, fastlora.LoRA(rank=4, alpha=8, dora=True), where=["0", "2"], seed=0)
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0", "2"]), model()
    )
    for i in (0, 2):
        with torch.no_grad():
            slot = ours[i].fastlora["default"]
            theirs[i].lora_A["default"].weight.copy_(slot.down)
            theirs[i].lora_B["default"].weight.copy_(slot.up)
    x, target = torch.randn(16, 8), torch.randn(16, 3)
    losses = []
    for m, own in [
        (ours, fastlora.parameters(ours)),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ]:
        assert sum(p.numel() for p in own) == 4 * (8 + 12 + 12 + 3) + 12 + 3
        optimiser = torch.optim.AdamW(own, lr=1e-2)
        for _ in range(30):
            loss = (m(x) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[29] < 0.7 * losses[0]
    torch.testing.assert_close(losses[:30], losses[30:], rtol=1e-4, atol=1e-5)


def test_initial_factors_have_pefts_distribution() -> None:
    ours = nn.Sequential(nn.Linear(300, 200))
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=40, target_modules=["0"]), copy.deepcopy(ours)
    )
    fastlora.inject(ours, fastlora.LoRA(rank=40), seed=0)
    a, b = ours[0].fastlora["default"].down, theirs[0].lora_A["default"].weight
    assert a.abs().max().item() == pytest.approx(b.abs().max().item(), rel=0.01)
    assert a.std().item() == pytest.approx(b.std().item(), rel=0.02)
