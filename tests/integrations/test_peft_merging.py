"""Unmerging of accelerated layers puts the base weight back where it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fastlora

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model


def build(**more: Any) -> tuple[Any, nn.Linear]:
    torch.manual_seed(0)
    base = nn.Linear(8, 6)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **more)
    model = get_peft_model(nn.Sequential(base), config)
    fastlora.accelerate(model)
    return model, base


def test_others_that_look_at_the_memory_of_a_weight_see_it_restored():
    """As a second parameter on it does, or a process that shares it."""
    model, base = build()
    twin, before = nn.Parameter(base.weight.data), base.weight.detach().clone()
    address = base.weight.data_ptr()
    model.merge_adapter()
    assert torch.equal(twin, base.weight) and not torch.equal(twin, before)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before) and torch.equal(twin, before)
    assert base.weight.data_ptr() == address


@pytest.mark.parametrize("inside", [False, True], ids=["unmerged_after", "unmerged_inside"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_under_inference_mode_and_trained_afterwards(dora, safe, inside):
    model, base = build(use_dora=dora)
    before = base.weight.detach().clone()
    with torch.inference_mode():
        model.merge_adapter(safe_merge=safe)
        if inside:
            model.unmerge_adapter()
    if not inside:
        model.unmerge_adapter()
    assert torch.equal(base.weight, before)
    model(torch.ones(2, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
