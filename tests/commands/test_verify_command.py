"""`fastlora verify`: right adapters pass, and what is wrong by a little is found."""

import json

import pytest
import torch
from torch import nn

import fastlora
from fastlora.cli import main
from fastlora.commands import verifying
from fastlora.formats.changes import Change, LowRank

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """The folder of a tiny UNet."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "unet"
    diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12,
    ).save_pretrained(folder)  # fmt: skip
    return folder


SPECS = {
    "lora": fastlora.LoRA(rank=2, alpha=3.0),
    "dora": fastlora.LoRA(rank=2, dora=True),
    "spectral": fastlora.Spectral(),
}


def adapter(folder, path, kind, where=r".*(attn1\.to_[qk]|conv1|norm1)"):
    model = diffusers.UNet2DConditionModel.from_pretrained(folder)
    if kind != "spectral":
        where = where.replace("|norm1", "")
    fastlora.inject(model, SPECS[kind], where=where, name="a")
    for parameter in fastlora.parameters(model):
        nn.init.normal_(parameter, std=0.3)
    if kind == "dora":
        for name, parameter in model.named_parameters():
            if name.endswith("magnitude"):
                nn.init.uniform_(parameter, 0.5, 2)
    fastlora.save(model, path)
    return path


def run(capsys, *arguments) -> tuple[int, dict]:
    code = main(["verify", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SPECS)
def test_right_adapters_pass(unet, tmp_path, capsys, kind, dtype):
    file = adapter(unet, tmp_path / "a.safetensors", kind)
    code, report = run(capsys, file, "--model", unet, "--dtype", dtype, "--strength", 0.7)
    wrong = [row for row in report["rows"] if not row["passed"]]
    assert (code, wrong) == (0, [])
    paths = {row["path"] for row in report["rows"]}
    assert len(paths) == report["layers"] >= 10
    assert {(p, w) for p in paths for w in ("unmerged", "folded")} == {
        (row["path"], row["way"]) for row in report["rows"]
    }
    used = [row["used"] for row in report["rows"]]
    assert used == sorted(used, reverse=True)


def test_the_digits_model(tmp_path, capsys):
    from fastlora.models import digits

    model = digits.load()
    fastlora.inject(model, fastlora.LoRA(rank=2), where=r"unet\..*(to_[qkv]|conv\d)", name="a")
    for parameter in fastlora.parameters(model):
        nn.init.normal_(parameter, std=0.1)
    fastlora.save(model, tmp_path / "a.safetensors")
    code, report = run(capsys, tmp_path / "a.safetensors", "--model", "digits")
    assert code == 0 and report["layers"] > 5


def test_a_strength_that_is_wrong_by_a_thousandth_is_found(unet, tmp_path, capsys, monkeypatch):
    """As with another alpha or a scale that was forgotten, only smaller."""
    file = adapter(unet, tmp_path / "a.safetensors", "lora")
    right = verifying.load
    monkeypatch.setattr(
        verifying, "load", lambda models, path, file, s: right(models, path, file, s * 1.001)
    )
    assert main(["verify", str(file), "--model", str(unet)]) == 1
    said = capsys.readouterr().out
    assert "WRONG: " in said and said.count("lora") >= 15


def test_one_wrong_layer_among_others_comes_first(unet, tmp_path, capsys, monkeypatch):
    file = adapter(unet, tmp_path / "a.safetensors", "lora")
    right = verifying.load

    def load(models, *arguments):
        right(models, *arguments)
        with torch.no_grad():
            models[""].mid_block.resnets[0].conv1.fastlora[verifying.NAME].up[0] *= 1.01

    monkeypatch.setattr(verifying, "load", load)
    code, report = run(capsys, file, "--model", unet)
    wrong = [row["path"] for row in report["rows"] if not row["passed"]]
    assert code == 1 and wrong == ["mid_block.resnets.0.conv1"] * 2
    assert [row["path"] for row in report["rows"][:2]] == wrong


def test_what_it_prints(unet, tmp_path, capsys):
    file = adapter(unet, tmp_path / "a.safetensors", "lora")
    assert main(["verify", str(file), "--model", str(unet)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{file} (fastlora) on {unet}, float32")
    assert said[2].split()[:3] == ["layer", "kind", "way"]
    assert said[-1].startswith("right: ")


def test_what_cannot_be_verified_is_an_error_in_one_line(unet, tmp_path, capsys):
    file = adapter(unet, tmp_path / "a.safetensors", "lora")
    cases = {
        "no such file": [tmp_path / "no.safetensors", "--model", unet],
        "expected digits or a folder": [file, "--model", tmp_path],
        "fastlora verify": [file, "--model", "digits"],  # which has other layers
    }
    for expected, arguments in cases.items():
        assert main(["verify", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert expected in said


LAYERS = {
    "linear": (nn.Linear(6, 5), 6, 5),
    "convolution": (nn.Conv2d(6, 5, 3, stride=2, padding=1, padding_mode="reflect"), 6, 5),
    "dilated": (nn.Conv2d(6, 5, 3, dilation=7), 6, 5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_explicit_computation_is_the_layer_with_another_weight(name):
    layer, inputs, out = LAYERS[name]
    kernel = layer.weight.shape[2:]
    down, up = torch.randn(2, inputs, *kernel), torch.randn(out, 2, *[1] * len(kernel))
    change = Change(LowRank(down, up, 1.0), bias=torch.ones(out))
    base = verifying.Base(layer.weight.detach(), layer.bias.detach())
    x = verifying.random_input(layer, base, torch.Generator().manual_seed(0))
    got = verifying.explicit(layer, base, change, 0.5, x, torch.float64)
    with torch.no_grad():
        delta = 0.25 * (up.flatten(1).double() @ down.flatten(1).double()).view_as(layer.weight)
        layer.double()
        layer.weight += delta
        layer.bias += 0.5
        torch.testing.assert_close(got, layer(x.double()))


def test_a_wrong_decomposition_is_found(unet, tmp_path, capsys, monkeypatch):
    """The layer agrees with its own singular vectors, which are not those of the weight."""
    file = adapter(unet, tmp_path / "a.safetensors", "spectral")
    right = verifying.load

    def load(models, *arguments):
        right(models, *arguments)
        factors = models[""].mid_block.resnets[0].conv1.fastlora
        factors.svd_u, factors.svd_vh = factors.svd_u.flip(1), factors.svd_vh.flip(0)

    monkeypatch.setattr(verifying, "load", load)
    code, report = run(capsys, file, "--model", unet)
    wrong = {row["path"] for row in report["rows"] if not row["passed"]}
    assert code == 1 and wrong == {"mid_block.resnets.0.conv1"}
