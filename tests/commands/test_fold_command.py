"""`fastlora fold` against formulas written out in float64, file by file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastlora
from fastlora.adapters.base_hash import base_hash
from fastlora.cli import main
from fastlora.formats import native
from tests.commands import checkpoints as disk

BLOCK = "down_blocks.0.attentions.0"
TO_Q = f"{BLOCK}.transformer_blocks.0.attn1.to_q"
PROJ = f"{BLOCK}.transformer_blocks.0.ff.net.0.proj"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"
TOKENS = "text_model.embeddings.token_embedding"


def flat(path: str, prefix: str = "lora_unet") -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def run(capsys, *arguments, code: int = 0) -> dict:
    assert main(["fold", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments) -> str:
    assert main(["fold", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def everything(folder: Path) -> dict[str, bytes]:
    """All that is there, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- all kinds ------------------------------------------------------------------------------------

# A key of the UNet's file, parts of a kohya or LyCORIS file, and W' in float64.
SEEDED = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(shape, generator=SEEDED)


a, b, c, d = random(6, 2), random(2, 6), random(6, 2), random(2, 6)
conv_down, conv_up = random(2, 4, 3, 3), random(6, 2, 1, 1)
w1, w2 = random(2, 3), random(3, 2)
m_out, m_in = random(6, 1).abs() + 1, random(1, 6).abs() + 1
S = 0.7  # the strength


def lora(w):
    return w + S * 0.5 * a.double() @ b.double()  # alpha 1, rank 2


def normed(v, axis):
    return v / v.square().sum(axis, keepdim=True).sqrt()


LORA = {"lora_down.weight": b, "lora_up.weight": a, "alpha": torch.tensor(1.0)}
KINDS = {
    "lora": (TO_Q, "weight", LORA, lora),
    "lora of a convolution": (
        "conv_in",
        "weight",
        {"lora_down.weight": conv_down, "lora_up.weight": conv_up, "alpha": torch.tensor(2.0)},
        lambda w: (
            w + S * torch.einsum("or,rikl->oikl", conv_up[..., 0, 0].double(), conv_down.double())
        ),
    ),
    "dora of outputs": (
        TO_Q,
        "weight",
        {**LORA, "dora_scale": m_out},
        lambda w: m_out.double() * normed(lora(w), 1),
    ),
    "dora of inputs": (
        TO_Q,
        "weight",
        {**LORA, "dora_scale": m_in},
        lambda w: m_in.double() * normed(lora(w), 0),
    ),
    "loha": (
        TO_Q,
        "weight",
        {
            "hada_w1_a": a,
            "hada_w1_b": b,
            "hada_w2_a": c,
            "hada_w2_b": d,
            "alpha": torch.tensor(1.0),
        },
        lambda w: w + S * 0.5 * (a.double() @ b.double()) * (c.double() @ d.double()),
    ),
    "lokr": (
        TO_Q,
        "weight",
        {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1.0)},
        lambda w: w + S * torch.einsum("ij,kl->ikjl", w1.double(), w2.double()).reshape(6, 6),
    ),
    "full": (TO_Q, "weight", {"diff": a @ b}, lambda w: w + S * (a @ b).double()),
    "norm": (f"{BLOCK}.norm", "weight", {"w_norm": a[:, 0]}, lambda w: w + S * a[:, 0].double()),
    "bias": (
        "conv_in",
        "bias",
        {"diff": torch.zeros(6, 4, 3, 3), "diff_b": a[:, 1]},
        lambda w: w + S * a[:, 1].double(),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_by_its_formula(tmp_path, capsys, kind):
    path, parameter, parts, formula = KINDS[kind]
    base = disk.state("unet")
    save_file(base, tmp_path / "base.safetensors", {"format": "pt"})
    parts = {f"{flat(path)}.{k}": v.contiguous() for k, v in parts.items()}
    save_file(parts, tmp_path / "adapter.safetensors")
    out = tmp_path / "out.safetensors"
    into = tmp_path / "base.safetensors"
    report = run(capsys, f"{tmp_path / 'adapter.safetensors'}={S}", "--into", into, "--out", out)
    new, key = load_file(out), f"{path}.{parameter}"
    exact = formula(base[key].double())
    assert (new[key] - exact).abs().max() < 4e-7 * exact.abs().max()
    # All else is there to the bit.
    assert list(new) == list(base) or set(new) == set(base)
    assert all(torch.equal(new[k], base[k]) for k in base if k != key)
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    change = (exact - base[key]).norm() / base[key].double().norm()
    if kind != "bias":  # whose zero update of the weight counts as well
        assert report["components"][""]["change"] == pytest.approx(float(change), rel=1e-5)


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_spectral_shifts(tmp_path, capsys, strength):
    base = disk.state("unet")
    save_file(base, tmp_path / "base.safetensors")
    weight, norm = base["conv_in.weight"], base[f"{BLOCK}.norm.weight"]
    shifts = {"conv_in": torch.randn(6), f"{BLOCK}.norm": torch.randn(6)}
    hashes = {"conv_in": base_hash(weight), f"{BLOCK}.norm": base_hash(norm)}
    modules = {path: {"shift": shift} for path, shift in shifts.items()}
    config = {
        "kind": "spectral",
        "modules": {path: {"norms": "elementwise"} for path in shifts},
        "base_hash": hashes,
    }
    tensors, metadata = native.pack(modules, config)
    save_file(tensors, tmp_path / "svdiff.safetensors", metadata)
    places = ["--into", tmp_path / "base.safetensors", "--out", tmp_path / "out.safetensors"]
    run(capsys, f"{tmp_path / 'svdiff.safetensors'}={strength}", *places)
    new = load_file(tmp_path / "out.safetensors")
    u, s, vh = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    moved = (s + strength * shifts["conv_in"].double()).relu()
    exact = ((u * moved) @ vh).view_as(weight)
    assert (new["conv_in.weight"] - exact).abs().max() < 1e-5
    torch.testing.assert_close(
        new[f"{BLOCK}.norm.weight"], norm + strength * shifts[f"{BLOCK}.norm"]
    )
    base["conv_in.weight"] = torch.randn(6, 4, 3, 3)
    save_file(base, tmp_path / "base.safetensors")
    said = refused(capsys, tmp_path / "svdiff.safetensors", *places, "--force")
    assert "conv_in: spectral shifts belong to the weight" in said


# --- rounding, sums -------------------------------------------------------------------------------


def kohya_file(
    path: Path, strength: float = 1.0, prefix: str = "lora_unet"
) -> tuple[Path, torch.Tensor]:
    down, up = torch.randn(2, 6), torch.randn(6, 2) * strength
    name = flat(TO_Q, prefix)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path)
    return path, up @ down


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_rounded_once(tmp_path, capsys, dtype):
    base = disk.state("unet", dtype)
    save_file(base, tmp_path / "base.safetensors")
    (one, first), (two, second) = (kohya_file(tmp_path / f"{i}.safetensors") for i in "ab")
    out = tmp_path / "out.safetensors"
    report = run(
        capsys, f"{one}=0.5", f"{two}=-2", "--into", tmp_path / "base.safetensors", "--out", out
    )
    old = base[f"{TO_Q}.weight"]
    wide = old.double() + 0.5 * first.double() - 2 * second.double()
    new = load_file(out)[f"{TO_Q}.weight"]
    assert new.dtype == dtype
    # Nearest to the exact value, but for those in the middle of two.
    unit = torch.finfo(dtype).eps / 2 * wide.abs()
    assert ((new.double() - wide).abs() <= 1.0001 * unit + 1e-6).all()
    rounding = (new.double() - wide).norm() / (wide - old.double()).norm()
    assert report["components"][""]["rounding"] == pytest.approx(float(rounding), rel=1e-2)


def test_the_same_as_folding_a_loaded_model(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    spec = fastlora.LoRA(rank=2, alpha=3.0, dora=True)
    fastlora.inject(unet, spec, where=r".*(attn\d\.to_[qkv]|conv1|proj_in)", name="style")
    for parameter in fastlora.parameters(unet):
        torch.nn.init.normal_(parameter, 1.0, 0.1)
    fastlora.save(unet, tmp_path / "style.safetensors")
    fastlora.set_scale(unet, {"style": 0.6})
    fastlora.fold(unet, permanent=True)
    place = tmp_path / "out"
    run(
        capsys, f"{tmp_path / 'style.safetensors'}=0.6", "--into", tmp_path / "unet", "--out", place
    )
    new = diffusers.UNet2DConditionModel.from_pretrained(place).state_dict()
    for key, value in unet.state_dict().items():
        torch.testing.assert_close(new[key], value)


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pipeline(tmp_path, capsys, shards):
    states = {c: disk.state(c) for c in disk.SHAPES}
    disk.save_pipeline(tmp_path / "base", states, shards)
    before = everything(tmp_path / "base")
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    rows, dims = torch.randn(2, 20), torch.randn(8, 2)
    adapter = {
        f"unet.{TO_Q}.lora_A.weight": b,
        f"unet.{TO_Q}.lora_B.weight": a,
        f"text_encoder.{Q_PROJ}.lora_A.weight": down,
        f"text_encoder.{Q_PROJ}.lora_B.weight": up,
        f"text_encoder.{TOKENS}.lora_embedding_A": rows,
        f"text_encoder.{TOKENS}.lora_embedding_B": dims,
    }
    save_file(adapter, tmp_path / "adapter.safetensors")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    (tmp_path / "base" / "old.ckpt").write_bytes(b"old")
    out = tmp_path / "out"
    report = run(
        capsys, tmp_path / "adapter.safetensors", "--into", tmp_path / "base", "--out", out
    )
    new = {c: disk.load_folder(out / c) for c in states}
    expected = {c: dict(s) for c, s in states.items()}
    expected["unet"][f"{TO_Q}.weight"] = states["unet"][f"{TO_Q}.weight"] + a @ b
    text = expected["text_encoder"]
    text[f"{Q_PROJ}.weight"] = text[f"{Q_PROJ}.weight"] + up @ down
    text[f"{TOKENS}.weight"] = text[f"{TOKENS}.weight"] + (dims @ rows).t()
    torch.testing.assert_close(new, expected)
    after = everything(out)
    assert after.keys() == before.keys()  # without the pickles
    assert [Path(p).name for p in report["not_copied"]] == [
        "old.ckpt",
        "diffusion_pytorch_model.bin",
    ]
    same = [p for p in before if "unet/" not in p and "text_encoder/" not in p]
    assert len(same) == 4 and all(after[p] == before[p] for p in same)
    assert report["components"]["text_encoder"]["tensors"] == 2


def test_variants_of_a_component_are_all_folded(tmp_path, capsys):
    state = disk.state("unet")
    disk.save_folder(tmp_path / "base", state, "diffusion_pytorch_model")
    half = {k: v.half() for k, v in state.items()}
    save_file(half, tmp_path / "base" / "diffusion_pytorch_model.fp16.safetensors")
    adapter, delta = kohya_file(tmp_path / "adapter.safetensors")
    run(capsys, adapter, "--into", tmp_path / "base", "--out", tmp_path / "out")
    exact = state[f"{TO_Q}.weight"] + delta
    for name, tolerance in (("", 1e-6), (".fp16", 2e-3)):
        file = tmp_path / "out" / f"diffusion_pytorch_model{name}.safetensors"
        new = load_file(file)[f"{TO_Q}.weight"].float()
        torch.testing.assert_close(new, exact, rtol=tolerance, atol=2 * tolerance)


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path) -> Path:
    save_file(disk.state("unet"), tmp_path / "base.safetensors")
    kohya_file(tmp_path / "adapter.safetensors")
    return tmp_path


def test_what_the_model_has_not_is_an_error(place, capsys):
    adapter = load_file(place / "adapter.safetensors")
    other = flat("mid_block.attentions.0.proj_in")
    for part, value in (("down", b), ("up", a)):
        adapter[f"{other}.lora_{part}.weight"] = value
    save_file(adapter, place / "adapter.safetensors")
    before = everything(place)
    arguments = [place / "adapter.safetensors", "--into", place / "base.safetensors"]
    arguments += ["--out", place / "out.safetensors"]
    said = refused(capsys, *arguments)
    assert "the model has no unet.mid_block.attentions.0.proj_in" in said and "--no-strict" in said
    assert everything(place) == before
    report = run(capsys, *arguments, "--no-strict", code=1)
    assert report["modules"] == 1 and len(*report["unused"].values()) == 2


def test_what_does_not_fit_is_named_with_its_file_and_may_be_left_out(place, capsys):
    """Of other shapes than the model's, or for a bias that it has not."""
    adapter = place / "adapter.safetensors"
    good = load_file(adapter)
    cases = {
        "expected an update of [6, 6]": {f"{flat(TO_Q)}.diff": torch.ones(5, 6)},
        "expected a bias in the checkpoint": {f"{flat(TO_Q)}.diff_b": torch.ones(6)},
        "expected a magnitude of 6": {
            f"{flat(TO_Q)}.lora_down.weight": torch.ones(2, 9),
            f"{flat(TO_Q)}.lora_up.weight": torch.ones(4, 2),
            f"{flat(TO_Q)}.dora_scale": torch.ones(4, 1),
        },
    }
    for expected, wrong in cases.items():
        other = place / "other.safetensors"
        save_file(wrong, other)
        arguments = [adapter, other, "--into", place / "base.safetensors"]
        arguments += ["--out", place / "out.safetensors"]
        said = refused(capsys, *arguments)
        assert f"{other}: unet.{TO_Q}: " in said or f"{other}: {TO_Q}: " in said
        report = run(capsys, *arguments, "--no-strict", code=1)
        assert report["modules"] == 1 and report["unused"].keys() == {str(other)}
        (place / "out.safetensors").unlink()
        if expected != "expected a magnitude of 6":  # where the update does not fit either
            assert expected in said
    assert load_file(adapter).keys() == good.keys()


def test_an_error_has_a_module_once(place, capsys):
    adapter = load_file(place / "adapter.safetensors")
    others = [f"mid_block.attentions.{i}.proj_in" for i in range(3)]
    for path in others:
        for part, value in (("lora_down.weight", b), ("lora_up.weight", a)):
            adapter[f"{flat(path)}.{part}"] = value.clone()
        adapter[f"{flat(path)}.alpha"] = torch.tensor(2.0)
    save_file(adapter, place / "adapter.safetensors")
    arguments = [place / "adapter.safetensors", "--into", place / "base.safetensors"]
    said = refused(capsys, *arguments, "--out", place / "out.safetensors")
    assert all(said.count(path) == 1 for path in others) and "more" not in said


def test_a_change_that_leaves_nothing_of_the_weights_is_refused(place, capsys):
    before = everything(place)
    arguments = ["--into", place / "base.safetensors", "--out", place / "out.safetensors"]
    for strength in ("1e30", "-1e12"):
        said = refused(capsys, f"{place / 'adapter.safetensors'}={strength}", *arguments)
        assert "smaller strength" in said
    assert everything(place) == before


def test_one_part_of_a_file(place, capsys):
    adapter = load_file(place / "adapter.safetensors")
    for part, value in (("down", b), ("up", a)):
        adapter[f"{flat(Q_PROJ, 'lora_te')}.lora_{part}.weight"] = value
    save_file(adapter, place / "adapter.safetensors")
    arguments = [place / "adapter.safetensors", "--into", place / "base.safetensors"]
    arguments += ["--out", place / "out.safetensors"]
    assert "the model has no text_encoder" in refused(capsys, *arguments)
    report = run(capsys, *arguments, "--only", "unet")
    assert report["modules"] == 1 and not report["unused"]
    said = refused(capsys, *arguments, "--only", "vae", "--force")
    assert "--only vae" in said and "has text_encoder, unet" in said


def test_outputs_that_are_there(place, capsys):
    arguments = [place / "adapter.safetensors", "--into", place / "base.safetensors", "--out"]
    out = place / "out.safetensors"
    out.write_bytes(b"mine")
    assert "--force replaces it" in refused(capsys, *arguments, out)
    assert out.read_bytes() == b"mine"
    run(capsys, *arguments, out, "--force")
    assert out.read_bytes() != b"mine"
    for taken in ("base.safetensors", "adapter.safetensors"):
        assert "another place" in refused(capsys, *arguments, place / taken, "--force")
    assert "its folder does not exist" in refused(
        capsys, *arguments, place / "no" / "x.safetensors"
    )


def test_a_fold_that_fails_leaves_the_disk_as_it_was(place, capsys):
    disk.save_pipeline(place / "pipe", {"unet": disk.state("unet", torch.float16)})
    adapter = load_file(place / "adapter.safetensors")
    save_file({k: v * 1e4 for k, v in adapter.items()}, place / "adapter.safetensors")
    (place / "out").mkdir()
    (place / "out" / "mine").write_bytes(b"mine")
    before = everything(place)
    said = refused(
        capsys,
        place / "adapter.safetensors",
        "--into",
        place / "pipe",
        "--out",
        place / "out",
        "--force",
    )
    assert f"{TO_Q}.weight: a value of" in said and "beyond torch.float16" in said
    assert everything(place) == before
    wrong = {f"{flat(TO_Q)}.diff": torch.ones(5, 6)}
    save_file(wrong, place / "adapter.safetensors")
    before = everything(place)
    arguments = [place / "adapter.safetensors", "--into", place / "base.safetensors", "--out"]
    assert f"{TO_Q}: expected an update of [6, 6]" in refused(
        capsys, *arguments, place / "x.safetensors"
    )
    assert everything(place) == before


def test_a_folder_is_replaced_whole(place, capsys):
    disk.save_pipeline(place / "pipe", {"unet": disk.state("unet")})
    (place / "out").mkdir()
    (place / "out" / "mine").write_bytes(b"mine")
    run(
        capsys,
        place / "adapter.safetensors",
        "--into",
        place / "pipe",
        "--out",
        place / "out",
        "--force",
    )
    assert everything(place / "out").keys() == everything(place / "pipe").keys()
    assert sorted(p.name for p in place.iterdir()) == [
        "adapter.safetensors", "base.safetensors", "out", "pipe",
    ]  # fmt: skip


def test_quantised_weights_are_refused(place, capsys):
    state = disk.state("unet")
    state[f"{TO_Q}.weight"] = torch.ones(6, 6, dtype=torch.uint8)
    save_file(state, place / "base.safetensors")
    said = refused(
        capsys, place / "adapter.safetensors", "--into", place / "base.safetensors", "--out",
        place / "out.safetensors",
    )  # fmt: skip
    assert "expected floating-point weights" in said


def test_pickles_are_refused(place, capsys):
    (place / "folder").mkdir()
    (place / "folder" / "pytorch_model.bin").write_bytes(b"x")
    said = refused(
        capsys, place / "adapter.safetensors", "--into", place / "folder", "--out", place / "out"
    )
    assert "expected safetensors files, got ['pytorch_model.bin']" in said
