"""The original names of UNets and FLUX, against diffusers' conversion of original checkpoints."""

from functools import cache

import pytest
import torch

from fastlora.formats.changes import Target
from fastlora.formats.files import FormatError
from fastlora.formats.names import Place, flat_name, fused, places
from tests.formats.architectures import UNETS, adaptable, flattened

single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")


# -- the original UNet


def original_unet(config: dict) -> list[str]:
    """Names of all modules with weights of the original UNet, built as the original builds it."""
    channels = config["block_out_channels"]
    depths = config.get("transformer_layers_per_block", (1,) * len(channels))
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    names = ["time_embed.0", "time_embed.2", "out.0", "out.2", "input_blocks.0.0"]
    if "addition_embed_type" in config:
        names += ["label_emb.0.0", "label_emb.0.2"]

    def resnet(at: str, inputs: int, outputs: int) -> None:
        parts = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
        names.extend(f"{at}.{p}" for p in parts + ["skip_connection"] * (inputs != outputs))

    def attention(at: str, depth: int) -> None:
        names.extend(f"{at}.{p}" for p in ("norm", "proj_in", "proj_out"))
        heads = [f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")]
        parts = ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2", *heads]
        names.extend(f"{at}.transformer_blocks.{d}.{p}" for d in range(depth) for p in parts)

    stack, now, number = [channels[0]], channels[0], 1
    for level, width in enumerate(channels):
        for _ in range(2):
            resnet(f"input_blocks.{number}.0", now, width)
            if attends[level]:
                attention(f"input_blocks.{number}.1", depths[level])
            now, number = width, number + 1
            stack.append(now)
        if level != len(channels) - 1:
            names.append(f"input_blocks.{number}.0.op")
            stack.append(now)
            number += 1
    resnet("middle_block.0", now, now)
    attention("middle_block.1", depths[-1])
    resnet("middle_block.2", now, now)
    number = 0
    for level in reversed(range(len(channels))):
        for i in range(3):
            resnet(f"output_blocks.{number}.0", now + stack.pop(), channels[level])
            if attends[level]:
                attention(f"output_blocks.{number}.1", depths[level])
            if level and i == 2:
                names.append(f"output_blocks.{number}.{1 + attends[level]}.conv")
            now, number = channels[level], number + 1
    return names


@cache
def unet_oracle(name: str) -> dict[str, str]:
    """Original name -> path in diffusers' UNet, by diffusers' conversion of checkpoints."""
    config = {"layers_per_block": 2, "addition_embed_type": None, **UNETS[name]}
    start = "model.diffusion_model."
    checkpoint = {f"{start}{n}.weight": n for n in original_unet(UNETS[name])}
    checkpoint |= {f"{start}{n}.bias": n for n in original_unet(UNETS[name])}
    converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, config)
    return {n: k.removesuffix(".weight") for k, n in converted.items() if k.endswith(".weight")}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_original_unet_reaches_every_module_once(name):
    oracle = unet_oracle(name)
    assert sorted(oracle) == sorted(original_unet(UNETS[name]))  # the oracle explains them all
    got = {n: places("lora_unet", flattened(n)) for n in oracle}
    assert got == {n: (Place(Target("unet", path)),) for n, path in oracle.items()}
    assert sorted(p[0].target.path for p in got.values()) == sorted(adaptable(name))


def test_sdxl_is_written_by_its_original_names():
    for original, path in unet_oracle("sdxl").items():
        name = ("lora_unet", flattened(original))
        assert flat_name(Target("unet", path), "sdxl") == name
        assert flat_name(Target("unet", flattened(path), flat=True), "sdxl") == name


def test_unets_by_diffusers_names():
    for path in adaptable("sd"):
        name = ("lora_unet", flattened(path))
        assert places(*name) == (Place(Target("unet", path)),)
        assert flat_name(Target("unet", path), "sd") == name
        assert flat_name(Target("", path), "sd") == name


@pytest.mark.parametrize(
    "flat",
    [
        "",
        "anything",
        "text_model_encoder_layers_0_mlp_fc1",  # no denoiser's
        "input_blocks_0_0_in_layers_2",
        "input_blocks_0_1_proj_in",
        "input_blocks_3_1_op",  # only part 0 is a downsampler
        "input_blocks_3_1_proj_in",
        "input_blocks_4_0_op",
        "input_blocks_04_1_proj_in",  # one name for one module
        "input_blocks_4_1_to_x",
        "input_blocks_4_2_proj_in",
        "middle_block_3_proj_in",
        "middle_block_0_proj_in",
        "output_blocks_2_0_conv",
        "output_blocks_1_1_conv",  # only the last of a block's layers has an upsampler
        "output_blocks_2_1_in_layers_2",
        "double_blocks_0_img_attn",
        "double_blocks_00_img_attn_qkv",
        "double_blocks_0_linear1",
        "single_blocks_0_img_attn_qkv",
        "final_layer_adaLN_modulation_1",  # its halves are exchanged in diffusers
    ],
)
def test_unknown_names_of_denoisers(flat):
    assert places("lora_unet", flat) == places("lora_transformer", flat) == ()


# -- the original FLUX

FLUX_INNER = 3072  # diffusers' conversion knows no other width


def original_flux() -> dict[str, int]:
    """Original name -> rows, of all modules with weights and the scales of norms."""
    rows = {"img_in": 1, "txt_in": 1, "final_layer.linear": 1, "final_layer.adaLN_modulation.1": 2}
    for name in ("time_in", "vector_in", "guidance_in"):
        rows |= {f"{name}.in_layer": 1, f"{name}.out_layer": 1}
    for n in range(2):
        for stream in ("img", "txt"):
            at = f"double_blocks.{n}.{stream}"
            rows |= {f"{at}_mod.lin": 6, f"{at}_attn.qkv": 3, f"{at}_attn.proj": 1}
            rows |= {f"{at}_mlp.0": 4, f"{at}_mlp.2": 1}
        at = f"single_blocks.{n}"
        rows |= {f"{at}.modulation.lin": 3, f"{at}.linear1": 7, f"{at}.linear2": 1}
    rows = {name: FLUX_INNER * parts for name, parts in rows.items()}
    return rows | {"final_layer.linear": 64}


@cache
def flux_oracle() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Original name -> numbered rows, and diffusers' path -> rows by its conversion."""
    starts, weights = 0, {}
    for name, rows in original_flux().items():
        weights[name] = torch.arange(starts, starts + rows).unsqueeze(1)
        starts += rows
    checkpoint = {f"{n}.weight": w for n, w in weights.items()}
    checkpoint |= {f"{n}.bias": w for n, w in weights.items()}
    for n in range(2):
        norms = [f"double_blocks.{n}.{stream}_attn.norm" for stream in ("img", "txt")]
        for norm in (*norms, f"single_blocks.{n}.norm"):
            for x in ("query", "key"):
                checkpoint[f"{norm}.{x}_norm.scale"] = torch.empty(0)
    converted = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
    assert not checkpoint  # the oracle explains all names
    weights.pop("final_layer.adaLN_modulation.1")
    return weights, {k.removesuffix(".weight"): w for k, w in converted.items()}


def test_flux_places_are_the_rows_of_the_conversion():
    weights, converted = flux_oracle()
    modules = adaptable("flux")
    reached = []
    for name, rows in weights.items():
        at = places("lora_unet", flattened(name))
        assert [p.first for p in at] == [0, *[p.last for p in at[:-1]]]  # without gaps
        assert at[-1].last == at[-1].total
        for (component, path, flat), first, last, total in at:
            assert (component, flat) == ("transformer", False)
            part = rows[first * len(rows) // total : last * len(rows) // total]
            assert torch.equal(part, converted[path])
            assert len(part) == modules[path].out_features
            reached.append(path)
    norms = {path for path in modules if path.rsplit(".", 1)[-1].startswith("norm_")}
    assert sorted(reached) == sorted(set(modules) - norms - {"norm_out.linear"})


def test_flux_back():
    for name in flux_oracle()[0]:
        flat = flattened(name)
        at = places("lora_unet", flat)
        for target, *rows in at:
            if len(at) == 1:
                assert fused(target.path) is None
                assert flat_name(target, "flux") == ("lora_unet", flat)
            else:
                assert fused(target.path) == (flat, *rows)
                with pytest.raises(FormatError, match=f"{target}: .* part of FLUX's {flat}"):
                    flat_name(target, "flux")


def test_flux_by_diffusers_names():
    for prefix in ("lora_unet", "lora_transformer"):
        for path in adaptable("flux"):
            assert places(prefix, flattened(path)) == (Place(Target("transformer", path)),)
    assert fused("norm_out.linear") is None and fused("blocks.0.to_q") is None
