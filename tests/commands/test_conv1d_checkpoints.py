"""Checkpoints of GPT-2, whose linear layers are stored [in, out]: what square ones do not tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastlora.cli import main
from tests.commands.checkpoints import State, save_folder

BLOCK = "transformer.h.0"


def gpt2() -> State:
    shapes = {
        "transformer.wte.weight": (20, 8),
        f"{BLOCK}.attn.c_attn.weight": (8, 24),
        f"{BLOCK}.attn.c_attn.bias": (24,),
        f"{BLOCK}.attn.c_proj.weight": (8, 8),
        f"{BLOCK}.attn.c_proj.bias": (8,),
    }
    return {key: torch.randn(*shape) for key, shape in shapes.items()}


def lora(folder: Path, module: str, inputs: int, outputs: int) -> Path:
    path = folder / "lora.safetensors"
    metadata = {
        "format": "fastlora",
        "version": "2",
        "config": json.dumps({"kind": "lora", "settings": {"rank": 2}, "modules": {module: {}}}),
    }
    tensors = {f"{module}.down": torch.randn(2, inputs), f"{module}.up": torch.randn(outputs, 2)}
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(("layer", "outputs"), [("c_attn", 24), ("c_proj", 8)])
def test_folding_into_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layer: str, outputs: int
) -> None:
    save_folder(tmp_path / "gpt2", gpt2(), "model")
    file = lora(tmp_path, f"{BLOCK}.attn.{layer}", 8, outputs)
    out = tmp_path / "out"
    assert main(["fold", str(file), "--into", str(tmp_path / "gpt2"), "--out", str(out)]) == 2
    assert "stored [in, out] (Conv1D of transformers)" in capsys.readouterr().err
    assert not out.exists()


def test_an_embedding_of_it_is_folded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path / "gpt2", gpt2(), "model")
    file = lora(tmp_path, "transformer.wte", 20, 8)
    arguments = ["fold", str(file), "--into", str(tmp_path / "gpt2"), "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 0, capsys.readouterr().err


def test_extracting_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "tuned"):
        save_folder(tmp_path / name, gpt2(), "model")
    places = [str(tmp_path / name) for name in ("base", "tuned")]
    assert (
        main(["extract", *places, "--rank", "2", "--to", "peft", "--out", str(tmp_path / "a")]) == 2
    )
    assert "expected weights [out, in]" in capsys.readouterr().err
