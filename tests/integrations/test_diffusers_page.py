"""docs/diffusers.md: its Python runs, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import save_file

import fastlora
from tests.integrations.adapter_samples import kohya, linears
from tests.integrations.tiny_pipelines import FRAGILE, PROMPTS, diffusers, stable_diffusion

pytestmark = FRAGILE


def test_the_page_about_pipelines(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    page = Path(__file__).parents[2] / "docs" / "diffusers.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    pipe = stable_diffusion()
    for seed, name in enumerate(("style", "slider")):
        save_file(kohya(pipe, linears(pipe, "unet", "to_q"), seed)[0], f"{name}.safetensors")
    scheduler, cls = pipe.scheduler, type(pipe)
    names = {"pipe": pipe, "prompt": PROMPTS[0], "prompts": PROMPTS}

    def run(block: str) -> None:
        exec(compile(block, page.name, "exec"), names)

    switch, load, call, by_hand = blocks
    run(switch)
    assert pipe.scheduler is scheduler and type(pipe) is cls
    run(load)
    assert pipe.get_list_adapters() == {"unet": ["style", "slider"]}
    run(call)
    assert len(names["images"]) == 3
    scales = {name: info.scale for name, info in fastlora.adapters(pipe.unet).items()}
    assert scales == {"style": 1.0, "slider": 1.0}
    run(by_hand)
    assert type(pipe.scheduler).__name__ == "FastEulerDiscreteScheduler"
    assert isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)
