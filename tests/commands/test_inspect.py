"""`fastlora inspect`: what it says is what is in the file, of every format."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastlora import cli
from fastlora.formats import outlines
from fastlora.formats.changes import Change, LowRank, Target
from fastlora.formats.files import SafetensorsFile
from fastlora.formats.writing import pack, write
from tests.commands.adapter_files import TEXT_ENCODER, UNET, deltas, kohya, lycoris


def report(capsys, *arguments: object) -> dict:
    assert cli.main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_file_of_kohya(tmp_path, capsys):
    metadata = {"ss_base_model_version": "sd_v1", "long": "word " * 500}
    path = kohya(tmp_path / "a.safetensors", metadata=metadata)
    said = report(capsys, path)
    assert said["format"] == "kohya" and said["base"]["name"] == "SD 1"
    assert said["base"]["text_encoders"] == {"text_encoder": "CLIP-L"}
    assert said["bytes"] == path.stat().st_size
    assert said["dtypes"] == {"float16": 14}
    assert said["metadata"] == metadata and said["unused"] == {}
    settings = {"kind": "lora", "rank": 4, "alpha": 2.0, "ratio": 0.5}
    assert {part["part"]: part for part in said["parts"]} == {
        "unet": {
            "part": "unet",
            "modules": 5,
            "kinds": {"lora": 5},
            "settings": [{**settings, "modules": 5}],
        },
        "text_encoder": {
            "part": "text_encoder",
            "modules": 2,
            "kinds": {"lora": 2},
            "settings": [{**settings, "modules": 2}],
        },
    }
    shapes = {m["module"]: tuple(m["shape"]) for m in said["modules"]}
    assert shapes == {f"unet.{p}": s for p, s in UNET.items()} | {
        f"text_encoder.{p}": s for p, s in TEXT_ENCODER.items()
    }


def test_norms_are_those_of_the_dense_updates(tmp_path, capsys):
    path = kohya(tmp_path / "a.safetensors", alpha=lambda i: i + 1.0)
    said = report(capsys, path)
    dense = {str(target): float(delta.norm()) for target, delta in deltas(path).items()}
    assert {m["module"]: m["norm"] for m in said["modules"]} == pytest.approx(dense, rel=1e-5)
    blocks = {(b["part"], b["block"]): b for b in said["blocks"]}
    first = [n for name, n in dense.items() if ".down_blocks.0." in name]
    assert blocks["unet", "down_blocks.0"]["norm"] == pytest.approx(math.hypot(*first), rel=1e-5)
    assert blocks["unet", "down_blocks.0"]["modules"] == 3
    assert [block for _, block in blocks] == [
        "text_model.encoder.layers.0",
        "text_model.encoder.layers.10",
        "down_blocks.0",
        "mid_block",
        "up_blocks.3",
    ]


@pytest.mark.parametrize("format", ["fastlora", "peft", "diffusers", "diffusers-lora", "lycoris"])
def test_norms_of_every_format(tmp_path, capsys, format):
    """What readers make of tensors without values leads to the values."""
    changes = {
        Target("unet", path): Change(
            LowRank(torch.randn(3, *s[1:]), torch.randn(s[0], 3, *[1] * len(s[2:])), 2.0)
        )
        for path, s in UNET.items()
    }
    path = tmp_path / ("folder" if format == "peft" else "a.safetensors")
    write(path, pack(changes, format))
    dense = {t.path: float(delta.norm()) for t, delta in deltas(path).items()}
    norms = {m["module"].removeprefix("unet."): m["norm"] for m in report(capsys, path)["modules"]}
    assert norms == pytest.approx(dense, rel=1e-5) and len(norms) == 5


def test_fused_projections_and_shifts(tmp_path, capsys):
    """Views of a tensor, of which three modules have a third; SVDiff's shifts."""
    up, down = torch.randn(9, 4), torch.randn(4, 6)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    fused = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    save_file(fused, tmp_path / "flux.safetensors")
    norms = [m["norm"] for m in report(capsys, tmp_path / "flux.safetensors")["modules"]]
    expected = [float((rows.double() @ down.double()).norm()) for rows in up.chunk(3)]
    assert norms == pytest.approx(expected, rel=1e-5)

    config = json.dumps({"kind": "spectral", "settings": {}, "modules": {"a": {}}})
    metadata = {"format": "fastlora", "version": "2", "config": config}
    save_file({"a.shift": torch.tensor([3.0, 4.0])}, tmp_path / "svdiff.safetensors", metadata)
    (module,) = report(capsys, tmp_path / "svdiff.safetensors")["modules"]
    assert (module["kind"], module["rank"], module["norm"]) == ("svdiff", None, 5.0)


def test_other_kinds_have_their_norms(tmp_path, capsys):
    path = lycoris(tmp_path / "a.safetensors")
    said = report(capsys, path)
    dense = {str(t): float(d.norm()) for t, d in deltas(path).items()}
    assert said["format"] == "lycoris"
    assert said["parts"][0]["kinds"] == {"loha": 4, "full": 1}
    assert {m["module"]: m["norm"] for m in said["modules"]} == pytest.approx(dense, rel=1e-5)


def test_without_norms_only_the_header_is_read(tmp_path, capsys, monkeypatch):
    path = kohya(tmp_path / "a.safetensors")
    read = []
    tensor = SafetensorsFile.tensor
    monkeypatch.setattr(
        SafetensorsFile, "tensor", lambda self, key: read.append(key) or tensor(self, key)
    )
    assert "norm" not in report(capsys, path, "--no-norms")["modules"][0]
    assert read and all(key.endswith(".alpha") for key in read)


def test_threads_of_pytorch_are_what_they_were(tmp_path):
    found = outlines.outline(kohya(tmp_path / "a.safetensors"))
    torch.set_num_threads(2)
    assert len(list(outlines.norms(found))) == 7
    assert torch.get_num_threads() == 2


def test_unused_keys_are_a_problem(tmp_path, capsys):
    path = kohya(tmp_path / "a.safetensors", extra=("foo.bar",))
    assert cli.main(["inspect", str(path)]) == 1
    out = capsys.readouterr().out
    assert "1 unused key" in out and "foo.bar" in out
    assert cli.main(["inspect", str(path), "--json"]) == 1
    assert list(json.loads(capsys.readouterr().out)["unused"]) == ["foo.bar"]


def test_many_settings_are_counted(tmp_path, capsys):
    modules = {f"mid_block.attentions.{i}.proj_in": (8, 8) for i in range(12)}
    path = kohya(tmp_path / "a.safetensors", modules, {}, alpha=lambda i: i + 1.0)
    assert cli.main(["inspect", str(path), "--no-norms"]) == 0
    assert "4 more settings" in capsys.readouterr().out


def text(path: Path, capsys, monkeypatch, columns: int = 80, *arguments: str) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["inspect", str(path), *arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_bars_and_metadata_fit_the_terminal(tmp_path, capsys, monkeypatch, columns):
    path = kohya(tmp_path / "a.safetensors", metadata={"ss_tags": "word " * 500})
    lines = text(path, capsys, monkeypatch, columns)
    bars = [line for line in lines if line[-1:] in "▏▎▍▌▋▊▉█" and line]
    assert len(bars) == 5 and max(map(len, bars)) <= columns
    assert max(line.count("█") for line in bars) > columns / 6  # the largest has all the room
    (tags,) = [line for line in lines if line.strip().startswith("ss_tags")]
    assert len(tags) <= columns and tags.endswith("(2,499 characters)")


def test_bars_are_proportional(tmp_path, capsys, monkeypatch):
    path = kohya(tmp_path / "a.safetensors")
    blocks = {b["block"]: b["norm"] for b in report(capsys, path)["blocks"]}
    bars = {
        line.split()[0]: line.split()[2]
        for line in text(path, capsys, monkeypatch, 100)
        if "█" in line
    }
    longest = max(map(len, bars.values()))
    for block, norm in blocks.items():
        assert len(bars[block]) == pytest.approx(longest * norm / max(blocks.values()), abs=1)


def test_metadata_in_full(tmp_path, capsys, monkeypatch):
    path = kohya(tmp_path / "a.safetensors", metadata={"ss_tags": "word " * 500})
    assert ("word " * 500).strip() in "\n".join(
        text(path, capsys, monkeypatch, 80, "--metadata", "--no-norms")
    )


def test_a_files_text_does_not_steer_the_terminal(tmp_path, capsys):
    evil = "\x1b[31m\x07a\nb"
    path = kohya(tmp_path / "a.safetensors", metadata={evil: evil}, extra=(f"key{evil}",))
    assert cli.main(["inspect", str(path)]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\\x1b[31m" in out


def test_ascii_where_the_encoding_is(tmp_path, capsys, monkeypatch):
    path = kohya(tmp_path / "a.safetensors", metadata={"author": "Ł"})
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert cli.main(["inspect", str(path)]) == 0
    out = written.getvalue().decode("ascii")
    assert "####" in out and "\\u0141" in out


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_errors_are_one_line(tmp_path, capsys, flags):
    assert cli.main(["inspect", str(tmp_path / "none.safetensors"), *flags]) == 2
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    assert cli.main(["inspect", str(tmp_path / "b.safetensors"), *flags]) == 2
    save_file({"weight": torch.ones(3)}, tmp_path / "c.safetensors")
    assert cli.main(["inspect", str(tmp_path / "c.safetensors"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 3
    assert "no such file" in err and "c.safetensors" in err


def test_nan_is_named(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    name = "lora_unet_mid_block_attentions_0_proj_in"
    down = torch.full((2, 8), math.nan)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": torch.ones(8, 2)}, path)
    assert cli.main(["inspect", str(path)]) == 2
    assert f"{name}.lora_down.weight" in capsys.readouterr().err
    assert cli.main(["inspect", str(path), "--no-norms"]) == 0


def test_bars_stay_readable_on_a_wide_terminal(tmp_path, capsys, monkeypatch):
    path = kohya(tmp_path / "a.safetensors", metadata={"author": "me"})
    lines = text(path, capsys, monkeypatch, 200)
    assert max(line.count("█") for line in lines) == 60
    assert "  metadata" in lines  # nothing is shortened
    narrow = kohya(tmp_path / "a.safetensors", metadata={"author": "me " * 100})
    assert "  metadata (long values: --metadata)" in text(narrow, capsys, monkeypatch, 80)
    assert "  metadata" in text(narrow, capsys, monkeypatch, 80, "--metadata")


@pytest.mark.parametrize(("alpha", "expected"), [(0, 0.0), (3, 1.5)])
def test_norms_of_factors_that_the_reader_makes(tmp_path, capsys, alpha, expected):
    """PEFT's alpha of two whole factors, and its alpha 0, are in the factors."""
    w1, w2 = torch.randn(3, 2), torch.randn(2, 2)
    name = "base_model.model.proj"
    save_file({f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, tmp_path / "a.safetensors")
    config = {"peft_type": "LOKR", "r": 2, "alpha": alpha}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (module,) = report(capsys, tmp_path / "a.safetensors")["modules"]
    exact = expected * float(torch.kron(w1, w2).norm())
    assert module["norm"] == pytest.approx(exact, rel=1e-5)


def test_norms_of_a_lora_with_alpha_zero(tmp_path, capsys):
    name = "base_model.model.proj"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, 4),
        f"{name}.lora_B.weight": torch.ones(6, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (module,) = report(capsys, tmp_path / "a.safetensors")["modules"]
    assert module["norm"] == 0
