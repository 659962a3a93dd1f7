"""`fastlora convert`: the output means what the input does, or there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora import cli
from fastlora.formats import detect
from fastlora.formats.changes import Change, Dense, LowRank, Target
from fastlora.formats.writing import pack, write
from tests.commands.adapter_files import ATTENTION, UNET, deltas, kohya, lycoris

NAMES = ("fastlora", "peft", "diffusers", "diffusers-lora", "diffusers-old", "kohya", "lycoris")


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


def place(folder: Path, format: str) -> Path:
    return folder / (format if format == "peft" else f"{format}.safetensors")


def same(got: dict, expected: dict, relative: float = 0.0) -> bool:
    return got.keys() == expected.keys() and all(
        float((got[key] - value).norm()) <= relative * float(value.norm())
        for key, value in expected.items()
    )


@pytest.mark.parametrize("format", NAMES)
def test_every_format_says_the_same(tmp_path, capsys, format):
    """Alphas differ from module to module; what is read back is the same to the last bit, as their
    ratios are powers of two."""
    source = kohya(tmp_path / "in.safetensors", ATTENTION, {}, alpha=lambda i: 2.0**i)
    out = place(tmp_path, format)
    assert convert(source, out, "--to", format, "--only", "unet") == 0
    assert capsys.readouterr().out.startswith(f"{out}: {format}, 4 modules, float16")
    found = {target.path: delta for target, delta in deltas(out).items()}
    assert same(found, {target.path: delta for target, delta in deltas(source).items()})


@pytest.mark.parametrize("format", ["diffusers-lora", "diffusers-old"])
def test_formats_without_alpha_have_it_in_the_tensors(tmp_path, capsys, format):
    """In float32 where half precision would lose something, and --dtype says that it may."""
    source = kohya(tmp_path / "in.safetensors", ATTENTION, {}, alpha=lambda i: i + 0.3)
    out = tmp_path / "out.safetensors"
    assert convert(source, out, "--to", format) == 0
    assert same(deltas(out), deltas(source), 1e-6)
    assert "float32 where float16 would lose digits" in capsys.readouterr().out
    assert convert(source, out, "--to", format, "--dtype", "float16", "--force") == 0
    assert not same(deltas(out), deltas(source), 1e-6) and same(deltas(out), deltas(source), 2**-10)


def test_there_and_back(tmp_path):
    source = kohya(tmp_path / "in.safetensors", alpha=lambda i: i + 0.3)
    for before, after in (("in", "diffusers"), ("diffusers", "lycoris"), ("lycoris", "kohya")):
        paths = [tmp_path / f"{name}.safetensors" for name in (before, after)]
        assert convert(*paths, "--to", after) == 0
    assert same(deltas(tmp_path / "kohya.safetensors"), deltas(source), 1e-7)


@pytest.mark.filterwarnings("ignore")
def test_peft_loads_the_folder(tmp_path):
    peft = pytest.importorskip("peft")
    source = kohya(tmp_path / "in.safetensors", dtype=torch.float32, alpha=lambda i: i + 0.3)
    assert convert(source, tmp_path / "folder", "--to", "peft", "--only", "unet") == 0
    model = nn.Module()
    for path, shape in UNET.items():
        *parents, name = path.split(".")
        inner = model
        for parent in parents:
            if not hasattr(inner, parent):
                inner.add_module(parent, nn.Module())
            inner = getattr(inner, parent)
        layer = nn.Linear(*shape[::-1]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], 3)
        inner.add_module(name, layer)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "folder").base_model.model
    for target, delta in deltas(source).items():
        if target.component == "unet":
            got = loaded.get_submodule(target.path).get_delta_weight("default")
            assert torch.allclose(got.double(), delta, atol=1e-6)


def test_what_is_no_lora_is_refused_with_the_ways_out(tmp_path, capsys):
    source = lycoris(tmp_path / "in.safetensors")
    for format in ("kohya", "diffusers", "peft", "fastlora"):
        assert convert(source, place(tmp_path, format), "--to", format) == 2
        err = capsys.readouterr().err
        assert "unet." in err and "--rank" in err and "--to lycoris" in err
    assert os.listdir(tmp_path) == ["in.safetensors"]
    assert convert(source, tmp_path / "out.safetensors", "--to", "lycoris") == 0
    assert same(deltas(tmp_path / "out.safetensors"), deltas(source))


def test_rank_makes_loras_and_says_what_is_lost(tmp_path, capsys):
    """Against the singular values of the dense updates, in float64."""
    source, out = lycoris(tmp_path / "in.safetensors", dtype=torch.float32), tmp_path / "peft"
    assert convert(source, out, "--to", "peft", "--rank", 3, "--json") == 0
    said = json.loads(capsys.readouterr().out)["error"]
    whole, lost, norms = deltas(source), {}, {}
    for target, delta in whole.items():
        values = torch.linalg.svdvals(delta.flatten(1))
        lost[str(target)], norms[str(target)] = values[3:].norm(), values.norm()
    errors = {name: float(lost[name] / norms[name]) for name in lost}
    total = torch.stack([*lost.values()]).norm() / torch.stack([*norms.values()]).norm()
    assert said["rank"] == 3 and said["modules"] == pytest.approx(errors, rel=1e-4)
    assert said["total"] == pytest.approx(float(total), rel=1e-4)
    assert said["largest"] == pytest.approx(max(errors.values()), rel=1e-4)
    assert errors[said["largest_module"]] == max(errors.values())
    made = deltas(out)
    for target, delta in whole.items():
        got = made[target._replace(component="")]
        assert float((got - delta).norm()) == pytest.approx(float(lost[str(target)]), rel=1e-4)


def test_rank_leaves_loras_alone(tmp_path, capsys):
    source, out = kohya(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    assert convert(source, out, "--to", "diffusers", "--rank", 2) == 0
    assert same(deltas(out), deltas(source)) and "rank 2" not in capsys.readouterr().out


def test_dtype(tmp_path, capsys):
    source, out = kohya(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    assert convert(source, out, "--to", "diffusers", "--dtype", "bfloat16") == 0
    with safe_open(out, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}
    assert not same(deltas(out), deltas(source)) and same(deltas(out), deltas(source), 2**-7)


def test_a_value_beyond_the_dtype_is_refused(tmp_path, capsys):
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    large = LowRank(torch.full((1, 4), 1e6), torch.ones(4, 1))
    write(
        source, pack({Target("unet", "mid_block.attentions.0.proj_in"): Change(large)}, "diffusers")
    )
    assert convert(source, out, "--to", "diffusers", "--dtype", "float16") == 2
    assert "mid_block.attentions.0.proj_in" in capsys.readouterr().err and not out.exists()


def test_metadata_about_the_training_is_carried_along(tmp_path):
    given = {"ss_tags": "dog", "modelspec.title": "a", "ss_network_dim": "99", "other": "b"}
    source, out = kohya(tmp_path / "in.safetensors", metadata=given), tmp_path / "out.safetensors"
    assert convert(source, out, "--to", "kohya") == 0
    metadata = detect.read(out).metadata
    assert metadata["ss_tags"] == "dog" and metadata["modelspec.title"] == "a"
    assert metadata["ss_network_dim"] == "4" and "other" not in metadata


def test_parts_of_a_pipeline(tmp_path, capsys):
    """PEFT's folder is for one model; what a file does not say can be said."""
    source = kohya(tmp_path / "in.safetensors")
    assert convert(source, tmp_path / "folder", "--to", "peft") == 2
    assert "--only text_encoder" in capsys.readouterr().err
    assert convert(source, tmp_path / "folder", "--to", "peft", "--only", "vae") == 2
    assert "text_encoder, unet" in capsys.readouterr().err
    assert convert(source, tmp_path / "folder", "--to", "peft", "--only", "unet") == 0
    back = tmp_path / "back.safetensors"
    assert convert(tmp_path / "folder", back, "--to", "kohya", "--component", "unet") == 0
    expected = {t: d for t, d in deltas(source).items() if t.component == "unet"}
    assert same(deltas(back), expected)


def test_unused_keys_are_said(tmp_path, capsys):
    source = kohya(tmp_path / "in.safetensors", extra=("foo.bar",))
    out = tmp_path / "out.safetensors"
    assert convert(source, out, "--to", "diffusers") == 1
    assert "foo.bar" in capsys.readouterr().out and same(deltas(out), deltas(source))


def test_nothing_is_overwritten_unless_told(tmp_path, capsys):
    source, out = kohya(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    before = source.read_bytes()
    out.write_text("precious")
    assert convert(source, out, "--to", "kohya") == 2
    assert out.read_text() == "precious" and "--force" in capsys.readouterr().err
    assert convert(source, out, "--to", "kohya", "--force") == 0
    assert same(deltas(out), deltas(source)) and source.read_bytes() == before


def test_a_folder_keeps_its_other_files(tmp_path):
    source, folder = kohya(tmp_path / "in.safetensors", text_encoder={}), tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("precious")
    (folder / "adapter_config.json").write_text("old")
    assert convert(source, folder, "--to", "peft", "--force") == 0
    assert (folder / "README.md").read_text() == "precious"
    assert sorted(os.listdir(folder)) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    ]
    assert len(deltas(folder)) == 5


def test_the_input_is_never_the_output(tmp_path, capsys):
    source = kohya(tmp_path / "in.safetensors", text_encoder={})
    folder = tmp_path / "folder"
    assert convert(source, folder, "--to", "peft") == 0
    link = tmp_path / "link.safetensors"
    link.symlink_to(source)
    before = source.read_bytes(), (folder / "adapter_model.safetensors").read_bytes()
    for given, out, format in (
        (source, source, "kohya"),
        (source, link, "kohya"),
        (folder, folder, "peft"),
        (folder / "adapter_model.safetensors", folder, "peft"),
        (folder, folder / "adapter_model.safetensors", "diffusers"),
    ):
        assert convert(given, out, "--to", format, "--force") == 2
        assert "another place" in capsys.readouterr().err
    assert before == (source.read_bytes(), (folder / "adapter_model.safetensors").read_bytes())


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_a_failure_leaves_nothing_behind(tmp_path, capsys, monkeypatch, format):
    source = kohya(tmp_path / "in.safetensors", text_encoder={})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert convert(source, place(tmp_path, format), "--to", format) == 2
    assert "No space left" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in.safetensors"]


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("out.bin", "kohya", "ends with .safetensors"),
        ("out.safetensors", "peft", "folder"),
        ("none/out.safetensors", "kohya", "does not exist"),
    ],
)
def test_an_output_that_cannot_be(tmp_path, capsys, name, format, expected):
    source = kohya(tmp_path / "in.safetensors", text_encoder={})
    assert convert(source, tmp_path / name, "--to", format) == 2
    assert expected in capsys.readouterr().err


def test_vectors_of_norms_are_for_lycoris_alone(tmp_path, capsys):
    """They have no low-rank form: `--rank` leaves them, and other formats refuse them by name."""
    source = tmp_path / "in.safetensors"
    changes = {
        Target("unet", "down_blocks.0.resnets.0.norm1"): Change(Dense(torch.ones(32))),
        Target("unet", "down_blocks.0.attentions.0.proj_in"): Change(Dense(torch.ones(32, 32))),
    }
    write(source, pack(changes, "lycoris"))
    out = tmp_path / "out.safetensors"
    assert convert(source, out, "--to", "diffusers", "--rank", 1) == 2
    assert "norm1" in capsys.readouterr().err
    assert convert(source, out, "--to", "lycoris", "--rank", 1) == 0
    kinds = {target.path: change.kind for target, change in detect.read(out).changes.items()}
    assert kinds == {
        "down_blocks.0.resnets.0.norm1": "full",
        "down_blocks.0.attentions.0.proj_in": "lora",
    }


def text_encoder(path: Path, prefix: str = "lora_te", metadata: dict | None = None) -> Path:
    name = f"{prefix}_text_model_encoder_layers_0_mlp_fc1"
    down, up = torch.randn(2, 4), torch.randn(8, 2)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path, metadata)
    return path


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_a_text_encoder_keeps_its_prefix(tmp_path, capsys, prefix):
    source = text_encoder(tmp_path / "in.safetensors", prefix)
    for format in ("kohya", "lycoris"):
        out = tmp_path / f"{format}.safetensors"
        assert convert(source, out, "--to", format) == 0
        assert "--family" not in capsys.readouterr().out
        assert all(key.startswith(f"{prefix}_text_model") for key in load_file(out))


def test_the_family_is_what_is_said_or_a_choice_that_is_said(tmp_path, capsys):
    source, peft = text_encoder(tmp_path / "in.safetensors"), tmp_path / "peft"
    assert convert(source, peft, "--to", "peft") == 0
    out = tmp_path / "out.safetensors"
    assert convert(peft, out, "--to", "kohya", "--component", "text_encoder") == 0
    assert "names of sd, as nothing tells the family" in capsys.readouterr().out
    assert all(key.startswith("lora_te_") for key in load_file(out))
    arguments = ("--component", "text_encoder", "--family", "sdxl", "--force")
    assert convert(peft, out, "--to", "kohya", *arguments) == 0
    assert all(key.startswith("lora_te1_") for key in load_file(out))
    assert convert(source, out, "--to", "diffusers", "--family", "sd", "--force") == 2
    assert "--family: only kohya and lycoris have one" in capsys.readouterr().err


def test_the_family_is_asked_for_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    source = lycoris(tmp_path / "loha.safetensors")
    middle = tmp_path / "middle.safetensors"
    names = {k: v for k, v in load_file(source).items() if "mid_block" in k}
    save_file(names, middle)
    monkeypatch.setattr("fastlora.commands.convert.approximated", None)  # fails if it is called
    out = tmp_path / "out.safetensors"
    assert convert(middle, out, "--to", "kohya", "--rank", 2) == 2
    assert "say which: --family sd, sdxl, flux" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_the_size_is_that_of_the_file(tmp_path, capsys, format):
    source = kohya(tmp_path / "in.safetensors", text_encoder={})
    out = place(tmp_path, format)
    assert convert(source, out, "--to", format, "--json") == 0
    written = out / "adapter_model.safetensors" if format == "peft" else out
    assert json.loads(capsys.readouterr().out)["bytes"] == written.stat().st_size
