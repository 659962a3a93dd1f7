"""`fastlora fold` into files with the original implementations' names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlora.cli import main

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
Q_PROJ = "text_model.encoder.layers.0.self_attn.q_proj"


def flat(path: str, prefix: str = "lora_unet") -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def run(capsys, *arguments) -> dict:
    assert main(["fold", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_original_names_of_a_unet_and_of_clip(tmp_path, capsys):
    unet = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    clip = f"cond_stage_model.transformer.{Q_PROJ}.weight"
    base = {unet: torch.randn(6, 6), clip: torch.randn(8, 8), "first_stage_model.x": torch.ones(3)}
    save_file(base, tmp_path / "base.safetensors")
    a, b = torch.randn(6, 2), torch.randn(2, 6)
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    name, text = flat(TO_Q), flat(Q_PROJ, "lora_te")
    adapter = {
        f"{name}.lora_down.weight": b,
        f"{name}.lora_up.weight": a,
        f"{text}.lora_down.weight": down,
        f"{text}.lora_up.weight": up,
    }
    save_file(adapter, tmp_path / "adapter.safetensors")
    out = tmp_path / "out.safetensors"
    into = tmp_path / "base.safetensors"
    run(capsys, tmp_path / "adapter.safetensors", "--into", into, "--out", out)
    expected = {**base, unet: base[unet] + a @ b, clip: base[clip] + up @ down}
    torch.testing.assert_close(load_file(out), expected)


def test_original_names_of_fused_projections(tmp_path, capsys):
    """OpenCLIP's (SDXL's second text encoder) and FLUX's have queries, keys, values in one."""
    start = "conditioner.embedders.1.model.transformer.resblocks.0."
    keys = {n: f"{start}{n}" for n in ("attn.in_proj_weight", "mlp.c_fc.weight")}
    base = {
        keys["attn.in_proj_weight"]: torch.randn(12, 4),
        keys["mlp.c_fc.weight"]: torch.randn(8, 4),
    }
    base["model.diffusion_model.out.0.weight"] = torch.ones(4)
    save_file(base, tmp_path / "base.safetensors")
    layer = "text_model.encoder.layers.0"
    down, up, wide = torch.randn(2, 4), torch.randn(4, 2), torch.randn(8, 2)
    adapter = {}
    for path, u in ((f"{layer}.self_attn.k_proj", up), (f"{layer}.mlp.fc1", wide)):
        adapter[f"{flat(path, 'lora_te2')}.lora_down.weight"] = down.clone()
        adapter[f"{flat(path, 'lora_te2')}.lora_up.weight"] = u
    save_file(adapter, tmp_path / "adapter.safetensors")
    out = tmp_path / "out.safetensors"
    run(
        capsys,
        tmp_path / "adapter.safetensors",
        "--into",
        tmp_path / "base.safetensors",
        "--out",
        out,
    )
    new = load_file(out)
    fused = base[keys["attn.in_proj_weight"]].clone()
    fused[4:8] += up @ down
    torch.testing.assert_close(new[keys["attn.in_proj_weight"]], fused)
    torch.testing.assert_close(
        new[keys["mlp.c_fc.weight"]], base[keys["mlp.c_fc.weight"]] + wide @ down
    )


def test_a_diffusers_lora_in_an_original_flux(tmp_path, capsys):
    """Rows of queries, keys, values and the MLP: 1, 1, 1 and 4 parts of 7."""
    base = {
        "double_blocks.0.img_attn.qkv.weight": torch.randn(12, 4),
        "single_blocks.0.linear1.weight": torch.randn(28, 4),
    }
    save_file(base, tmp_path / "base.safetensors")
    paths = {"transformer_blocks.0.attn.to_v": 4, "single_transformer_blocks.0.proj_mlp": 16}
    parts = {path: (torch.randn(rows, 2), torch.randn(2, 4)) for path, rows in paths.items()}
    adapter = {f"transformer.{p}.lora_B.weight": up for p, (up, _) in parts.items()}
    adapter |= {f"transformer.{p}.lora_A.weight": down for p, (_, down) in parts.items()}
    save_file(adapter, tmp_path / "adapter.safetensors")
    out = tmp_path / "out.safetensors"
    into = tmp_path / "base.safetensors"
    run(capsys, tmp_path / "adapter.safetensors", "--into", into, "--out", out)
    expected = {key: value.clone() for key, value in base.items()}
    (v_up, v_down), (mlp_up, mlp_down) = parts.values()
    expected["double_blocks.0.img_attn.qkv.weight"][8:] += v_up @ v_down
    expected["single_blocks.0.linear1.weight"][12:] += mlp_up @ mlp_down
    torch.testing.assert_close(load_file(out), expected)


def test_fused_projections_are_where_diffusers_has_them():
    """The names against diffusers' own conversion of an OpenCLIP text model."""
    single = pytest.importorskip("diffusers.loaders.single_file_utils")
    transformers = pytest.importorskip("transformers")
    from fastlora.formats.checkpoint_names import modules_of

    config = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=1,
        vocab_size=16, max_position_embeddings=5, projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config)
    start = "conditioner.embedders.1.model."
    base = {"model.diffusion_model.out.0.weight": torch.ones(4)}
    own = {"token_embedding.weight": (16, 8), "positional_embedding": (5, 8)}
    own |= {f"ln_final.{x}": (8,) for x in ("weight", "bias")} | {"text_projection": (8, 8)}
    for i in range(2):
        block = f"transformer.resblocks.{i}."
        own |= {f"{block}ln_{n}.{x}": (8,) for n in (1, 2) for x in ("weight", "bias")}
        own |= {f"{block}attn.in_proj_weight": (24, 8), f"{block}attn.in_proj_bias": (24,)}
        own |= {f"{block}attn.out_proj.weight": (8, 8), f"{block}attn.out_proj.bias": (8,)}
        own |= {f"{block}mlp.c_fc.weight": (12, 8), f"{block}mlp.c_fc.bias": (12,)}
        own |= {f"{block}mlp.c_proj.weight": (8, 12), f"{block}mlp.c_proj.bias": (8,)}
    base |= {start + k: torch.randn(s) for k, s in own.items()}
    theirs = single.convert_open_clip_checkpoint(model, dict(base), prefix=start)
    ours = {
        f"{target.path}.{name}": where.of(base[where.key])
        for target, names in modules_of(base).items()
        if target.component == "text_encoder_2"
        for name, where in names.items()
    }
    prefix = "text_model."
    known = {k: v for k, v in theirs.items() if "text_projection" not in k and "ids" not in k}
    assert {k if k.startswith(prefix) else prefix + k for k in known} == set(ours)
    for key, value in known.items():
        torch.testing.assert_close(ours[key if key.startswith(prefix) else prefix + key], value)
