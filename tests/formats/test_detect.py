"""Formats are told by what is in a file, and a folder's file is found or the choice refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.formats import detect, files, native
from fastlora.formats.changes import LowRank, Target
from fastlora.formats.files import FormatError
from fastlora.formats.patterns import Patterns


def pair(down: str, up: str) -> dict[str, Tensor]:
    return {down: torch.ones(2, 3), up: torch.ones(4, 2)}


PEFT = pair("base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight")
DIFFUSERS = pair("unet.a.lora_A.weight", "unet.a.lora_B.weight")
BARE = pair("a.lora_A.weight", "a.lora_B.weight")
OLD = pair("a.processor.to_q_lora.down.weight", "a.processor.to_q_lora.up.weight")
BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
KOHYA = pair(f"lora_unet_{BLOCK}.lora_down.weight", f"lora_unet_{BLOCK}.lora_up.weight")
LYCORIS = {f"lycoris_{BLOCK}.diff": torch.ones(4, 4)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


@pytest.mark.parametrize(
    ("tensors", "name", "format"),
    [
        (PEFT, "peft", "peft"),
        (DIFFUSERS, "diffusers", "diffusers"),
        (BARE, "diffusers", "diffusers"),
        (OLD, "diffusers", "diffusers"),
        (KOHYA, "kohya", "kohya"),
        (LYCORIS, "kohya", "lycoris"),
    ],
    ids=["peft", "diffusers", "bare", "old", "kohya", "lycoris"],
)
def test_the_content_tells_the_format(tensors: dict[str, Tensor], name: str, format: str) -> None:
    assert detect.detect(tensors, {"format": "pt"}) == name
    config = CONFIG if name == "peft" else None
    file = detect.unpack(tensors, {}, config)
    assert file.format == format and len(file.changes) == 1 and not file.unused


def test_fastlora_files_say_so() -> None:
    config = {"kind": "lora", "modules": {"a": {"rank": 2, "alpha": 6.0}}}
    tensors, metadata = native.pack(
        {"a": {"down": torch.ones(2, 3), "up": torch.ones(4, 2)}}, config
    )
    file = detect.unpack(tensors, metadata)
    assert file.format == "fastlora" and list(file.changes) == [Target("", "a")]
    assert torch.equal(file.changes[Target("", "a")].delta((4, 3)), torch.full((4, 3), 6.0))


def test_complex_numbers_are_refused() -> None:
    for tensors in (PEFT, DIFFUSERS, KOHYA):
        values = {key: tensor.to(torch.complex64) for key, tensor in tensors.items()}
        with pytest.raises(FormatError, match="the file: .*expected real numbers, got .*complex64"):
            detect.unpack(values, {}, CONFIG if tensors is PEFT else None)


def test_a_file_of_two_formats_leaves_the_keys_of_one_unused() -> None:
    file = detect.unpack({**DIFFUSERS, **OLD, **KOHYA}, {})
    assert file.format == "diffusers" and len(file.changes) == 2
    assert file.unused.keys() == KOHYA.keys()


@pytest.mark.parametrize("keys", [[], ["model.a.weight", "b.bias"], ["emb_params"]])
def test_what_no_format_explains(keys: list[str]) -> None:
    example = ", ".join(keys) or "none"
    with pytest.raises(FormatError, match=f"^some file: .*got {example}; formats known: fastlora"):
        detect.unpack({key: torch.ones(1) for key in keys}, {}, source="some file")


@pytest.mark.parametrize(
    "tensors", [PEFT, DIFFUSERS, KOHYA, {**OLD, "a.to_q.alpha": torch.tensor(1.0)}]
)
def test_values_are_not_needed(tensors: dict[str, Tensor]) -> None:
    shapes = {k: v.to("meta") if v.dim() else v for k, v in tensors.items()}
    config = {**CONFIG, "lora_bias": True} if tensors is PEFT else None
    if tensors is PEFT:
        shapes["base_model.model.a.lora_B.bias"] = torch.ones(4, device="meta")
    (change,) = detect.unpack(shapes, {}, config).changes.values()
    assert isinstance(change.weight, LowRank) and change.weight.down.is_meta


def write(folder: Path, name: str, tensors: dict[str, Tensor], metadata: Any = None) -> Path:
    files.write(folder / name, tensors, metadata or {"format": "pt"})
    return folder / name


def ratio(file: Any) -> float:
    (change,) = file.changes.values()
    return change.weight.ratio


def test_folders_of_peft_and_diffusers(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="expected a folder with a safetensors file, got none"):
        detect.read(tmp_path)
    path = write(tmp_path, "adapter_model.safetensors", PEFT)
    with pytest.raises(FormatError, match=r"adapter_model.safetensors: .*adapter_config.json"):
        detect.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    write(tmp_path, "training_state.safetensors", {"x": torch.ones(1)})
    assert ratio(detect.read(tmp_path)) == ratio(detect.read(path)) == 3

    write(tmp_path, "pytorch_lora_weights.safetensors", DIFFUSERS)
    with pytest.raises(FormatError, match="got 2: adapter_model.safetensors, pytorch_lora_wei"):
        detect.read(tmp_path)
    path.unlink()
    (tmp_path / "adapter_config.json").unlink()
    assert ratio(detect.read(tmp_path)) == 1


def test_a_folder_with_other_names(tmp_path: Path) -> None:
    write(tmp_path, "style.safetensors", KOHYA)
    (tmp_path / ".hidden.safetensors").touch()
    (tmp_path / "README.md").touch()
    assert detect.read(tmp_path).format == "kohya"
    write(tmp_path, "other.safetensors", DIFFUSERS)
    with pytest.raises(FormatError, match="got 2: other.safetensors, style.safetensors"):
        detect.read(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save(PEFT, tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match="adapter_model.bin: .*pickle"):
        detect.read(tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        detect.read(tmp_path / "none.safetensors")


def test_keys_without_pefts_prefix_take_the_alpha_beside(tmp_path: Path) -> None:
    """A scale of 1 would be wrong there."""
    path = write(tmp_path, "adapter_model.safetensors", BARE)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert ratio(detect.read(path)) == 3
    header = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 8})}
    assert ratio(detect.read(write(tmp_path, "model.safetensors", BARE, header))) == 4
    assert ratio(detect.read(write(tmp_path, "kohya.safetensors", KOHYA))) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "adapter_config.json: expected JSON"),
        ("[" * 100_000, "adapter_config.json: expected JSON"),
        ("[]", "adapter_config.json: expected an object, got list"),
        ('{"peft_type": "PROMPT_TUNING"}', "peft_type: .*got 'PROMPT_TUNING'"),
    ],
)
def test_what_is_wrong_beside(tmp_path: Path, config: str, message: str) -> None:
    write(tmp_path, "adapter_model.safetensors", {"prompt_embeddings": torch.ones(2, 3)})
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(FormatError, match=message):
        detect.read(tmp_path)


@pytest.mark.parametrize("path", ["a.b", "c.a.b", "a.bb", "b", "xa.b", "ab", "a.b.a.b", "1.a-b"])
def test_patterns_mean_what_they_mean_to_peft(path: str) -> None:
    peft = pytest.importorskip("peft.utils.other")
    patterns = [r"b", r"a\.b", r"^a\.b", r"x?a\.b", r"[ab]b$", r"a\-b", r"c\..*", "^b$", "a.bb"]
    for start in range(len(patterns)):
        own = {key: place for place, key in enumerate(patterns[start:] + patterns[:start])}
        expected = own.get(peft.get_pattern_key(own, path))
        assert Patterns("rank_pattern", own).get(path) == expected


def test_many_patterns_for_many_modules() -> None:
    """As converted files have them; trying each for each module would take minutes."""
    paths = [f"blocks.{i}.to_q" for i in range(10_000)]
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors.update(
            pair(f"transformer.{path}.lora_A.weight", f"transformer.{path}.lora_B.weight")
        )
    alphas = {path: i for i, path in enumerate(paths, 1)}
    header = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.alpha_pattern": alphas}
    file = detect.unpack(tensors, {"lora_adapter_metadata": json.dumps(header)})
    found = {t.path: c.weight.alpha for t, c in file.changes.items()}  # type: ignore[union-attr]
    assert found == alphas
