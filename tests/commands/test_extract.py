"""`fastlora extract` against singular value decompositions in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlora.cli import main
from fastlora.formats import detect
from fastlora.formats.changes import Dense, LowRank, Target
from fastlora.formats.svd import truncated_svd
from tests.commands import checkpoints as disk

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TOKENS = "text_model.embeddings.token_embedding"


def run(capsys, *arguments) -> dict:
    assert main(["extract", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments) -> str:
    assert main(["extract", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1  # one line
    return said


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """A UNet's file, and a copy with changes of rank 3 in a matrix and a convolution."""
    base = disk.state("unet")
    tuned = {k: v.clone() for k, v in base.items()}
    tuned[f"{TO_Q}.weight"] += torch.randn(6, 3) @ torch.randn(3, 6)
    tuned["conv_in.weight"] += (torch.randn(6, 3) @ torch.randn(3, 36)).view(6, 4, 3, 3)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def deltas(base: Path, tuned: Path) -> dict[str, torch.Tensor]:
    old, new = load_file(base), load_file(tuned)
    return {k: new[k].double() - old[k].double() for k in old}


@pytest.mark.parametrize("format", ["diffusers", "fastlora", "kohya", "lycoris", "peft"])
def test_what_has_the_rank_comes_back(pair, tmp_path, capsys, format):
    out = tmp_path / ("out" if format == "peft" else "out.safetensors")
    report = run(capsys, *pair, "--rank", 3, "--to", format, "--out", out)
    file, expected = detect.read(out), deltas(*pair)
    assert {t.path for t in file.changes} == {TO_Q, "conv_in"}
    for target, change in file.changes.items():
        assert isinstance(change.weight, LowRank)
        assert (change.weight.rank, change.weight.ratio) == (3, 1)
        exact = expected[f"{target.path}.weight"]
        delta = change.delta(tuple(exact.shape), torch.float64)
        assert (delta - exact).norm() < 1e-6 * exact.norm()
    assert report["error"]["total"] < 1e-6
    assert report["unchanged"] == 3  # the norm, attn2.to_k, ff.net.0.proj


def test_the_error_is_the_least_there_is(pair, tmp_path, capsys):
    """Eckart and Young: the root of the squares of the singular values that are left out."""
    report = run(capsys, *pair, "--rank", 2, "--out", tmp_path / "out.safetensors")
    lost, norms = [], []
    for key, delta in deltas(*pair).items():
        if delta.any():
            s = torch.linalg.svdvals(delta.flatten(1))
            lost.append(s[2:].norm())
            norms.append(s.norm())
            error = report["error"]["modules"][key.removesuffix(".weight")]
            assert error == pytest.approx(float(lost[-1] / norms[-1]), rel=1e-5)
    total = torch.stack(lost).norm() / torch.stack(norms).norm()
    assert report["error"]["total"] == pytest.approx(float(total), rel=1e-5)


def test_the_error_has_the_rounding_in_it(pair, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    report = run(capsys, *pair, "--rank", 3, "--dtype", "bfloat16", "--out", out)
    expected = deltas(*pair)
    for target, change in detect.read(out).changes.items():
        assert isinstance(change.weight, LowRank)
        assert change.weight.up.dtype == torch.bfloat16
        exact = expected[f"{target.path}.weight"]
        error = (change.delta(tuple(exact.shape), torch.float64) - exact).norm() / exact.norm()
        assert report["error"]["modules"][target.path] == pytest.approx(float(error), rel=0.02)


def test_biases_and_norms_are_reported_and_only_lycoris_has_them(pair, tmp_path, capsys):
    base, tuned = pair
    state = load_file(tuned)
    state["conv_in.bias"] += 1
    state["down_blocks.0.attentions.0.norm.weight"] += 2
    save_file(state, tuned)
    out = tmp_path / "out.safetensors"
    report = run(capsys, *pair, "--rank", 3, "--out", out)
    left = ["conv_in.bias", "down_blocks.0.attentions.0.norm.weight"]
    assert report["left_out"] == left and len(detect.read(out).changes) == 2
    report = run(capsys, *pair, "--rank", 3, "--out", out, "--to", "lycoris", "--force")
    changes = {t.path: c for t, c in detect.read(out).changes.items()}
    assert report["left_out"] == []
    torch.testing.assert_close(changes["conv_in"].bias, torch.ones(6))
    norm = changes["down_blocks.0.attentions.0.norm"].weight
    assert isinstance(norm, Dense)
    torch.testing.assert_close(norm.diff, torch.full((6,), 2.0))


@pytest.mark.parametrize("shards", [1, 3])
def test_pipelines_and_shards(tmp_path, capsys, shards):
    base = {c: disk.state(c, torch.float16) for c in disk.SHAPES}
    tuned = {c: {k: v + torch.randn_like(v) for k, v in s.items()} for c, s in base.items()}
    disk.save_pipeline(tmp_path / "base", base)
    disk.save_pipeline(tmp_path / "tuned", tuned, shards)
    places = tmp_path / "base", tmp_path / "tuned"
    out = tmp_path / "out.safetensors"
    run(capsys, *places, "--rank", 99, "--dtype", "float32", "--out", out)
    changes = detect.read(out).changes
    for component, shapes in disk.SHAPES.items():
        for key, shape in shapes.items():
            target = Target(component, key.rpartition(".")[0])
            if len(shape) == 1 or target not in changes:
                assert len(shape) == 1
                continue
            exact = tuned[component][key].double() - base[component][key].double()
            delta = changes[target].delta(shape, torch.float64)
            assert (delta - exact).norm() < 1e-6 * exact.norm(), key
    tokens = changes[Target("text_encoder", TOKENS)].weight
    assert isinstance(tokens, LowRank) and tokens.embedding and tokens.down.shape == (8, 20)
    only = run(capsys, *places, "--rank", 1, "--only", "unet", "--out", out, "--force")
    assert set(only["error"]["modules"]) == {
        f"unet.{k.removesuffix('.weight')}" for k, s in disk.SHAPES["unet"].items() if len(s) > 1
    }
    kohya = run(capsys, *places, "--rank", 1, "--to", "lycoris", "--out", out, "--force")
    assert kohya["left_out"] == [f"text_encoder.{TOKENS}.weight"]


def test_original_names_are_read_as_the_modules_that_they_are(tmp_path, capsys):
    start = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0."
    base = {f"{start}attn1.to_q.weight": torch.randn(6, 6), "first_stage_model.x": torch.ones(2)}
    base["model.diffusion_model.input_blocks.0.0.bias"] = torch.ones(3)
    tuned = {k: v + 1 for k, v in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    places = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "out")]
    report = run(capsys, *places[:2], "--rank", 1, "--out", places[2])
    (target,) = detect.read(places[2]).changes
    assert target == Target("unet", TO_Q)
    assert report["left_out"] == ["unet.conv_in.bias"]


def test_other_models_are_refused_by_name(pair, tmp_path, capsys):
    base, tuned = pair
    out = tmp_path / "out.safetensors"
    state = load_file(tuned)
    save_file({**state, "extra.weight": torch.ones(2, 2)}, tuned)
    said = refused(capsys, *pair, "--rank", 2, "--out", out)
    assert "only the tuned model has extra.weight" in said
    save_file({k: v for k, v in state.items() if "to_q" not in k}, tuned)
    assert f"only the base model has {TO_Q}.weight" in refused(
        capsys, *pair, "--rank", 2, "--out", out
    )
    save_file({**state, "conv_in.weight": torch.ones(6, 5, 3, 3)}, tuned)
    said = refused(capsys, *pair, "--rank", 2, "--out", out)
    assert "conv_in.weight [6, 4, 3, 3] and [6, 5, 3, 3]" in said
    said = refused(capsys, base, base, "--rank", 2, "--out", out)
    assert "do not differ" in said
    assert "no such file" in refused(capsys, base, tmp_path / "no", "--rank", 2, "--out", out)
    assert not out.exists()


def test_it_says_what_it_did(pair, tmp_path, capsys):
    assert (
        main(["extract", *map(str, pair), "--rank", "2", "--out", str(tmp_path / "o.safetensors")])
        == 0
    )
    said = capsys.readouterr().out
    assert "diffusers, 2 modules, float32" in said
    assert "3 modules did not change" in said
    assert TO_Q in said and "conv_in" in said


# --- the decomposition ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 7), (5, 40), (40, 5), (3, 5000), (1, 4), (4, 1)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_truncated_svd_is_the_nearest_matrix(shape, rank):
    matrix = torch.randn(shape)
    u, s, v, rest = truncated_svd(matrix, rank)
    exact = torch.linalg.svdvals(matrix.double())
    count = min(rank, *shape)
    assert u.shape == (shape[0], count) and v.shape == (count, shape[1])
    torch.testing.assert_close(s.double(), exact[:rank], rtol=1e-6, atol=0)
    left = exact[rank:].square().sum()
    assert rest == pytest.approx(float(left), rel=1e-6, abs=1e-12 * float(exact[0]) ** 2)
    difference = matrix.double() - (u.double() * s.double()) @ v.double()
    assert difference.norm() == pytest.approx(float(left.sqrt()), abs=2e-6 * float(exact.norm()))


def test_truncated_svd_of_less_than_the_rank():
    """Singular values below 1e-8 of the largest are zeros, not noise divided by noise."""
    matrix = torch.outer(torch.arange(1.0, 9.0), torch.ones(16))  # exactly of rank 1
    u, s, v, rest = truncated_svd(matrix, 4)
    assert s[0] > 0 and not s[1:].any() and not v[1:].any()
    assert rest < 1e-12 * float(s[0]) ** 2
    torch.testing.assert_close((u * s) @ v, matrix)


def test_truncated_svd_in_float64():
    matrix = torch.randn(6, 9, dtype=torch.float64)
    u, s, v, _ = truncated_svd(matrix, 6)
    torch.testing.assert_close((u * s) @ v, matrix)
    assert s.dtype == torch.float64


def test_the_family_is_asked_for_before_anything_is_decomposed(tmp_path, capsys, monkeypatch):
    path = "mid_block.attentions.0.proj_in.weight"  # of SD and SDXL
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    save_file({path: torch.randn(6, 6)}, base)
    save_file({path: torch.randn(6, 6)}, tuned)
    arguments = (base, tuned, "--rank", 2, "--component", "unet", "--to", "kohya")
    arguments = (*arguments, "--out", tmp_path / "out.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("fastlora.formats.extraction.extract", None)  # fails if it is called
        assert "say which: --family" in refused(capsys, *arguments)
    assert run(capsys, *arguments, "--family", "sdxl")["family"] == "sdxl"
    assert all("middle_block_1_proj_in" in key for key in load_file(arguments[-1]))


def test_a_text_encoder_alone_has_the_names_of_sd_and_says_so(tmp_path, capsys):
    path = "text_model.encoder.layers.0.mlp.fc1.weight"
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    save_file({path: torch.randn(6, 6)}, base)
    save_file({path: torch.randn(6, 6)}, tuned)
    out = tmp_path / "out.safetensors"
    arguments = (base, tuned, "--rank", 2, "--component", "text_encoder", "--to", "kohya")
    assert main(["extract", *map(str, arguments), "--out", str(out)]) == 0
    assert "names of sd, as nothing tells the family" in capsys.readouterr().out
    assert all(key.startswith("lora_te_text_model") for key in load_file(out))


def test_layers_without_an_error_are_not_listed(tmp_path, capsys):
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    save_file({"a.weight": torch.zeros(1, 4), "b.weight": torch.zeros(6, 6)}, base)
    save_file({"a.weight": torch.ones(1, 4), "b.weight": torch.randn(6, 6)}, tuned)
    out = tmp_path / "out.safetensors"
    assert main(["extract", str(base), str(tuned), "--rank", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert " %  b" in said and " %  a" not in said
