"""`fastlora verify`: right adapters pass, and what is wrong by a little is found."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastlora
from fastlora.cli import main
from fastlora.commands import verifying
from fastlora.commands.models import load_models
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


Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
NORM = "lora_unet_mid_block_resnets_0_norm1"
TUCKER = {"t1": (2, 2, 3, 3), "t2": (2, 2, 3, 3)}
FOREIGN = {
    "kohya": {
        Q: {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "alpha": ()},
        CONV: {"lora_down.weight": (2, 16, 3, 3), "lora_up.weight": (16, 2, 1, 1)},
    },
    "tucker": {
        CONV: {
            "lora_down.weight": (2, 16, 1, 1),
            "lora_mid.weight": (2, 2, 3, 3),
            "lora_up.weight": (16, 2, 1, 1),
        },
    },
    "loha": {
        Q: {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)},
        CONV: {f"hada_w{i}_{x}": (2, 16) for i in (1, 2) for x in "ab"}
        | {f"hada_{t}": shape for t, shape in TUCKER.items()},
    },
    "lokr": {Q: {"lokr_w1": (4, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 8), "alpha": ()}},
    "full": {CONV: {"diff": (16, 16, 3, 3), "diff_b": (16,)}, NORM: {"w_norm": (16,)}},
    "dora of outputs": {
        Q: {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "dora_scale": (16, 1)},
    },
    "dora of inputs": {
        CONV: {
            "lora_down.weight": (2, 16, 3, 3),
            "lora_up.weight": (16, 2, 1, 1),
            "dora_scale": (1, 16, 1, 1),
        },
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats(unet, tmp_path, capsys, kind, dtype):
    tensors = {
        f"{module}.{part}": torch.rand(shape) + 0.5 if part == "dora_scale" else torch.randn(shape)
        for module, parts in FOREIGN[kind].items()
        for part, shape in parts.items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    arguments = [tmp_path / "a.safetensors", "--model", unet, "--dtype", dtype, "--strength", 0.3]
    code, report = run(capsys, *arguments)
    assert code == 0 and report["layers"] == len(FOREIGN[kind])


def test_a_pipeline_s_parts(unet, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=16, max_position_embeddings=5,
    )  # fmt: skip
    folder = tmp_path / "pipe"
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    shutil.copytree(unet, folder / "unet")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "vae": ["diffusers", "AutoencoderKL"],  # which is not there
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{text}.lora_{x}.weight": torch.randn(8, 8) for x in ("down", "up")}
    tensors |= {f"{Q}.lora_{x}.weight": torch.randn(16, 16) for x in ("down", "up")}
    save_file(tensors, tmp_path / "a.safetensors")
    code, report = run(capsys, tmp_path / "a.safetensors", "--model", folder)
    assert code == 0
    paths = sorted({row["path"] for row in report["rows"]})
    assert len(paths) == 2
    assert paths[0].startswith("text_encoder.") and paths[0].endswith("self_attn.q_proj")
    assert paths[1] == "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    native = adapter(unet, tmp_path / "native.safetensors", "lora")  # names no part
    code, report = run(capsys, native, "--model", folder)
    assert code == 0 and all(row["path"].startswith("unet.") for row in report["rows"])


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
    monkeypatch.setattr(verifying, "load", lambda models, path, s: right(models, path, s * 1.001))
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
        "--device: expected one that is there": [file, "--model", unet, "--device", "cuda:99"],
        "--device: expected one that computes": [file, "--model", unet, "--device", "meta"],
    }
    for expected, arguments in cases.items():
        assert main(["verify", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert expected in said


def test_what_does_not_fit_is_said_without_options_that_verify_has_not(unet, tmp_path, capsys):
    tensors = {f"{Q}.lora_down.weight": torch.ones(2, 16), f"{Q}.lora_up.weight": torch.ones(16, 2)}
    for part in ("down", "up"):
        wide = torch.ones(2, 5) if part == "down" else torch.ones(7, 2)
        tensors[f"{Q.replace('to_q', 'to_k')}.lora_{part}.weight"] = wide
        tensors[f"{Q.replace('to_q', 'to_v')}.lora_{part}.weight"] = wide.clone()
    save_file(tensors, tmp_path / "a.safetensors")
    assert main(["verify", str(tmp_path / "a.safetensors"), "--model", str(unet)]) == 2
    said = capsys.readouterr().err
    assert "to_k" in said and "do not fit" in said and "strict=False" not in said


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


@pytest.mark.parametrize("strength", ["0", "nan", "inf", "much"])
def test_a_strength_that_checks_nothing_is_refused_at_once(capsys, strength):
    with pytest.raises(SystemExit) as stop:
        main(["verify", "no.safetensors", "--model", "digits", "--strength", strength])
    assert stop.value.code == 2
    assert f"expected a finite number that is not 0, got {strength}" in capsys.readouterr().err


def test_loading_a_text_encoder_writes_nothing_onto_stderr(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(tmp_path / "encoder")
    capsys.readouterr()
    load_models(str(tmp_path / "encoder"), [""], torch.device("cpu"), torch.float32)
    assert capsys.readouterr().err == ""
