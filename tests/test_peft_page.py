"""docs/peft.md: its Python runs as it stands, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
from peft import LoHaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer

import fastlora

PAGE = Path(__file__).resolve().parent.parent / "docs" / "peft.md"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.l1 = nn.Linear(8, 6)
        self.l2 = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(torch.relu(self.l1(self.conv(self.emb(x)[:, None]).mean(1))))


def lora(*targets: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)


@torch.no_grad()
def test_what_the_page_shows_runs(capsys):
    torch.manual_seed(0)
    model = get_peft_model(Net(), lora("emb", "conv", "l1", "l2"))
    model.add_adapter("other", lora("l1"))
    mixed = get_peft_model(Net(), LoHaConfig(r=2, target_modules=["l2"]))
    names: dict[str, Any] = {
        "torch": torch,
        "model": model.eval(),
        "mixed": mixed,
        "x": torch.randint(0, 20, (3, 5)),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    outputs = []
    for block in blocks:
        plain = model(names["x"])
        exec(compile(block, f"docs/peft.md: {block.splitlines()[0]}", "exec"), names)
        outputs.append((plain, names["y"]))
        assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*?\)  # (.*)", block)
    assert len(blocks) == 5
    switch, _, each, scaled, _ = outputs

    torch.testing.assert_close(*switch)
    fastlora.restore(model)  # PEFT itself, for what the page has computed
    rows = []
    for row, name in enumerate(names["names"]):
        sample = names["x"][row : row + 1]
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(sample))
        else:
            model.set_adapter(name)
            rows.append(model(sample))
    torch.testing.assert_close(each[1], torch.cat(rows))
    model.set_adapter("default")
    rows = []
    for row, strength in enumerate((0.0, 0.5, 1.0)):
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.set_scale("default", strength)
        rows.append(model(names["x"][row : row + 1]))
    torch.testing.assert_close(scaled[1], torch.cat(rows))
