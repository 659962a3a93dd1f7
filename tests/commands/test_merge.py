"""`fastlora merge`: the output's updates are the sum of the inputs', each at its strength."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastlora import cli
from fastlora.commands.arguments import file_and_strength
from fastlora.formats import detect
from tests.commands.adapter_files import ATTENTION, UNET, deltas, kohya, lycoris


def merge(*arguments: object) -> int:
    return cli.main(["merge", *map(str, arguments)])


def total(*files: tuple[Path, float]) -> dict:
    """Σ strength · ΔW in float64."""
    found: dict = {}
    for path, strength in files:
        for target, delta in deltas(path).items():
            found[target] = found.get(target, 0) + strength * delta
    return found


def same(got: dict, expected: dict, relative: float) -> bool:
    return got.keys() == expected.keys() and all(
        float((got[key] - value).norm()) <= relative * float(value.norm())
        for key, value in expected.items()
    )


@pytest.mark.parametrize("format", ["kohya", "lycoris", "diffusers", "diffusers-lora"])
def test_the_sum_is_exact(tmp_path, capsys, format):
    """Files of several formats, of other ranks, alphas and modules."""
    a = kohya(tmp_path / "a.safetensors", alpha=lambda i: i + 1.0)
    b = kohya(tmp_path / "b.safetensors", ATTENTION, {}, rank=3, alpha=1.0)
    c = tmp_path / "c.safetensors"
    assert cli.main(["convert", str(b), str(c), "--to", "diffusers"]) == 0
    out = tmp_path / "out.safetensors"
    assert merge(f"{a}=0.8", f"{b}=-0.3", c, "--out", out, "--to", format) == 0
    assert same(deltas(out), total((a, 0.8), (b, -0.3), (c, 1.0)), 1e-6)
    ranks = {t.path: c.weight.rank for t, c in detect.read(out).changes.items()}
    assert all(ranks[path] == (10 if path in ATTENTION else 4) for path in UNET)
    assert "--dtype" in capsys.readouterr().out  # why it is float32


def test_the_format_is_the_first_files(tmp_path):
    a = kohya(tmp_path / "a.safetensors", text_encoder={})
    peft, out = tmp_path / "peft", tmp_path / "out"
    assert cli.main(["convert", str(a), str(peft), "--to", "peft"]) == 0
    assert merge(peft, f"{peft}=0.5", "--out", out) == 0
    assert detect.read(out).format == "peft"
    assert same(deltas(out), total((peft, 1.5)), 1e-6)
    assert merge(a, a, "--out", tmp_path / "out.safetensors") == 0
    assert detect.read(tmp_path / "out.safetensors").format == "kohya"


def test_equal_strengths_lose_nothing_in_half_precision(tmp_path, capsys):
    a, b = kohya(tmp_path / "a.safetensors"), kohya(tmp_path / "b.safetensors")
    out = tmp_path / "out.safetensors"
    assert merge(f"{a}=0.5", f"{b}=0.5", "--out", out) == 0
    assert same(deltas(out), total((a, 0.5), (b, 0.5)), 1e-15)
    with safe_open(out, "pt") as file:
        dtypes = {file.get_tensor(k).dtype for k in file.keys() if not k.endswith(".alpha")}
    assert dtypes == {torch.float16} and "--dtype" not in capsys.readouterr().out


def test_dtype_rounds(tmp_path):
    a, b = kohya(tmp_path / "a.safetensors"), kohya(tmp_path / "b.safetensors")
    out = tmp_path / "out.safetensors"
    assert merge(f"{a}=0.8", f"{b}=0.3", "--out", out, "--dtype", "float16") == 0
    with safe_open(out, "pt") as file:
        dtypes = {file.get_tensor(k).dtype for k in file.keys() if not k.endswith(".alpha")}
    assert dtypes == {torch.float16}
    assert same(deltas(out), total((a, 0.8), (b, 0.3)), 2**-10)


def test_rank_cuts_the_sum_down_and_says_what_is_lost(tmp_path, capsys):
    """Against the singular values of the dense sums, in float64."""
    a = kohya(tmp_path / "a.safetensors", dtype=torch.float32)
    b = lycoris(tmp_path / "b.safetensors", dtype=torch.float32)
    out = tmp_path / "out.safetensors"
    assert merge(f"{a}=0.8", f"{b}=0.5", "--out", out, "--rank", 5, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    lost, norms = {}, {}
    made = deltas(out)
    for target, delta in total((a, 0.8), (b, 0.5)).items():
        values = torch.linalg.svdvals(delta.flatten(1))
        lost[str(target)], norms[str(target)] = values[5:].norm(), values.norm()
        got = float((made[target] - delta).norm() / delta.norm())
        assert got == pytest.approx(float(values[5:].norm() / values.norm()), rel=1e-3, abs=1e-6)
    errors = {name: float(lost[name] / norms[name]) for name in lost}
    whole = torch.stack([*lost.values()]).norm() / torch.stack([*norms.values()]).norm()
    assert said["error"]["modules"] == pytest.approx(errors, rel=1e-3, abs=1e-6)
    assert said["error"]["total"] == pytest.approx(float(whole), rel=1e-4)
    assert said["error"]["largest"] == pytest.approx(max(errors.values()), rel=1e-4)
    assert [i["strength"] for i in said["inputs"]] == [0.8, 0.5]
    assert all(change.weight.rank <= 5 for change in detect.read(out).changes.values())


def test_loha_of_small_rank_stays_low_rank_in_a_sum(tmp_path):
    a = kohya(tmp_path / "a.safetensors", ATTENTION, {})
    b = lycoris(tmp_path / "b.safetensors", rank=2)
    out = tmp_path / "out.safetensors"
    assert merge(a, b, "--out", out, "--to", "lycoris") == 0
    assert same(deltas(out), total((a, 1.0), (b, 1.0)), 1e-6)
    changes = detect.read(out).changes
    assert {t.path for t, c in changes.items() if c.kind == "lora"} == set(ATTENTION)


def test_what_the_format_cannot_hold_is_refused(tmp_path, capsys):
    a, b = kohya(tmp_path / "a.safetensors"), lycoris(tmp_path / "b.safetensors")
    out = tmp_path / "out.safetensors"
    assert merge(a, b, "--out", out) == 2
    err = capsys.readouterr().err
    assert "unet.down_blocks.0.resnets.0.conv1" in err and "--rank" in err
    assert not out.exists()


def test_dora_is_refused_by_name(tmp_path, capsys):
    a = kohya(tmp_path / "a.safetensors")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
    dora = {
        f"{name}.lora_down.weight": torch.randn(2, 48),
        f"{name}.lora_up.weight": torch.randn(48, 2),
        f"{name}.dora_scale": torch.rand(48, 1) + 1,
    }
    save_file(dora, tmp_path / "dora.safetensors")
    assert merge(a, tmp_path / "dora.safetensors", "--out", tmp_path / "out.safetensors") == 2
    err = capsys.readouterr().err
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0" in err
    assert "DoRA" in err and not (tmp_path / "out.safetensors").exists()


def test_files_for_different_models_are_refused(tmp_path, capsys):
    a = kohya(tmp_path / "a.safetensors", {"mid_block.attentions.0.proj_in": (8, 8)}, {})
    b = kohya(tmp_path / "b.safetensors", {"mid_block.attentions.0.proj_in": (16, 16)}, {})
    assert merge(a, b, "--out", tmp_path / "out.safetensors") == 2
    assert "mid_block.attentions.0.proj_in" in capsys.readouterr().err


def test_parts_without_a_name_need_one(tmp_path, capsys):
    a = kohya(tmp_path / "a.safetensors", text_encoder={})
    folder, out = tmp_path / "folder", tmp_path / "out.safetensors"
    assert cli.main(["convert", str(a), str(folder), "--to", "peft"]) == 0
    assert merge(a, folder, "--out", out) == 2
    assert "--component" in capsys.readouterr().err
    assert merge(a, folder, "--out", out, "--component", "unet") == 0
    assert same(deltas(out), total((a, 2.0)), 1e-6)


def test_unused_keys_are_said_of_their_file(tmp_path, capsys):
    a = kohya(tmp_path / "a.safetensors", extra=("foo.bar",))
    b = kohya(tmp_path / "b.safetensors")
    assert merge(a, b, "--out", tmp_path / "out.safetensors") == 1
    assert f"left out of {a}: foo.bar" in capsys.readouterr().out


def test_metadata_that_all_files_share_is_kept(tmp_path):
    a = kohya(tmp_path / "a.safetensors", metadata={"ss_base": "x", "ss_tags": "dog"})
    b = kohya(tmp_path / "b.safetensors", metadata={"ss_base": "x", "ss_tags": "cat"})
    assert merge(a, b, "--out", tmp_path / "out.safetensors") == 0
    metadata = detect.read(tmp_path / "out.safetensors").metadata
    assert metadata["ss_base"] == "x" and "ss_tags" not in metadata


def test_inputs_are_not_outputs(tmp_path, capsys):
    a = kohya(tmp_path / "a.safetensors")
    before = a.read_bytes()
    assert merge(a, a, "--out", a, "--force") == 2
    assert "another place" in capsys.readouterr().err and a.read_bytes() == before


def test_strengths_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert file_and_strength("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert file_and_strength("a.safetensors=-0.5") == (Path("a.safetensors"), -0.5)
    assert file_and_strength("a=b.safetensors=1e-1") == (Path("a=b.safetensors"), 0.1)
    Path("a=2").touch()
    assert file_and_strength("a=2") == (Path("a=2"), 1.0)
    assert file_and_strength("a=2=3") == (Path("a=2"), 3.0)


@pytest.mark.parametrize("strength", ["0", "x", "nan", "inf", ""])
def test_a_strength_that_is_none(capsys, strength):
    with pytest.raises(SystemExit) as stop:
        merge(f"a.safetensors={strength}", "--out", "b.safetensors")
    assert stop.value.code == 2 and "FILE=STRENGTH" in capsys.readouterr().err


def test_a_text_encoder_keeps_its_prefix(tmp_path):
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    down, up = torch.randn(2, 4), torch.randn(8, 2)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, source)
    assert merge(source, f"{source}=0.5", "--out", out) == 0
    with safe_open(out, "pt") as file:
        assert all(key.startswith(name) for key in file.keys())
