"""Names of kohya's and LyCORIS' files, against the modules of the real architectures.

The architectures are built on the meta device; what the original names mean is told by diffusers'
conversion of original checkpoints.
"""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastlora.formats.changes import Target
from fastlora.formats.files import FormatError
from fastlora.formats.names import Index, Place, dotted, family, flat_name, fused, places

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")

UNETS = {
    "sd": dict(
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768,
    ),
    "sdxl": dict(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}
CLIP = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
T5 = dict(d_model=8, d_kv=8, d_ff=8, num_layers=2, num_heads=1)
MODELS = {
    "flux": lambda: diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, guidance_embeds=True
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        num_layers=2, dual_attention_layers=(0,), qk_norm="rms_norm"
    ),
    "pixart": lambda: diffusers.PixArtTransformer2DModel(
        num_layers=1, caption_channels=16, use_additional_conditions=True
    ),
    "dit": lambda: diffusers.DiTTransformer2DModel(num_layers=1),
    "sd": lambda: diffusers.UNet2DConditionModel(**UNETS["sd"]),
    "sdxl": lambda: diffusers.UNet2DConditionModel(**UNETS["sdxl"]),
    "clip": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)),
    "clip with projection": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**CLIP)
    ),
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
    "t5 v1.1": lambda: transformers.T5EncoderModel(
        transformers.T5Config(**T5, feed_forward_proj="gated-gelu")
    ),
}
COMPONENTS = {"flux": "transformer", "sd": "unet", "sdxl": "unet"}


@cache
def model(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


def adaptable(name: str) -> dict[str, nn.Module]:
    """The modules that have weights of their own."""
    return {p: m for p, m in model(name).named_modules() if getattr(m, "weight", None) is not None}


def flattened(path: str) -> str:
    return path.replace(".", "_")


# -- dots


@pytest.mark.parametrize("name", MODELS)
def test_dotted_gives_back_every_path(name):
    paths = [path for path, _ in model(name).named_modules() if path]
    assert len(paths) > 25
    assert {p: dotted(flattened(p)) for p in paths} == {p: p for p in paths}


@pytest.mark.parametrize(
    "flat", ["", "_", "to", "to_x", "down_blocks_0_", "0", "00", "resnets_00", "proj_in_nowhere"]
)
def test_dotted_refuses_unknown_parts(flat):
    assert dotted(flat) is None


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


# -- text encoders, other prefixes


def test_text_encoders():
    names = {
        "lora_te": "text_encoder",
        "lora_te1": "text_encoder",
        "lora_te2": "text_encoder_2",
        "lora_te3": "text_encoder_3",
    }
    clip, t5 = "text_model.encoder.layers.1.mlp.fc1", "encoder.block.1.layer.0.SelfAttention.q"
    for prefix, component in names.items():
        for path in (clip, t5):
            assert places(prefix, flattened(path)) == (Place(Target(component, path)),)
        assert places(prefix, "model_a_b") == (Place(Target(component, "model_a_b", True)),)
    assert places("lora_te3", flattened(t5), "flux") == (Place(Target("text_encoder_2", t5)),)


@pytest.mark.parametrize(
    ("kind", "component", "path", "prefix"),
    [
        ("sd", "text_encoder", "text_model.encoder.layers.1.mlp.fc1", "lora_te"),
        ("sdxl", "text_encoder", "text_model.encoder.layers.1.self_attn.q_proj", "lora_te1"),
        ("sdxl", "text_encoder_2", "text_projection", "lora_te2"),
        ("flux", "text_encoder", "text_model.final_layer_norm", "lora_te1"),
        ("flux", "text_encoder_2", "encoder.block.1.layer.1.DenseReluDense.wi_0", "lora_te3"),
        ("sd", "text_encoder", "model.a_b", "lora_te"),
    ],
)
def test_text_encoders_back(kind, component, path, prefix):
    name = (prefix, flattened(path))
    assert flat_name(Target(component, path), kind) == name
    assert flat_name(Target(component, flattened(path), flat=True), kind) == name
    [(target, *_)] = places(*name, kind)
    assert target.component == component and Index([path]).find(target) == path


def test_clip_without_text_model_is_written_with_it():
    target = Target("text_encoder", "encoder.layers.0.mlp.fc1")
    assert flat_name(target, "sd") == ("lora_te", "text_model_encoder_layers_0_mlp_fc1")


def test_lycoris_means_the_model_itself():
    assert places("lycoris", "transformer_blocks_0_attn_to_q") == (
        Place(Target("", "transformer_blocks.0.attn.to_q")),
    )
    assert [p.target for p in places("lycoris", "single_blocks_0_linear2")] == [
        Target("", "single_transformer_blocks.0.proj_out")
    ]
    assert places("lycoris", "blocks_0_lin") == (Place(Target("", "blocks_0_lin", True)),)


def test_other_prefixes():
    assert places("lora_transformer", "mid_block_attentions_0_proj_in") == ()
    assert places("lora_prior", "mid_block_attentions_0_proj_in") == ()
    assert places("lora_te", "") == ()


WORDS = st.sampled_from("input output blocks block middle down 0 1 00 op conv to q out".split())


@given(st.sampled_from(["lora_unet", "lora_te", "lycoris"]), st.lists(WORDS).map("_".join))
def test_any_name_is_read(prefix, flat):
    path = dotted(flat)
    assert path is None or flattened(path) == flat
    assert all(isinstance(place, Place) for place in places(prefix, flat))


# -- errors of the way back


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        (Target("unet", "mid_block.attentions.0.proj_in"), "sd4", "family: expected one of sd, "),
        (Target("unet", "mid_block.attentions.0.proj_in"), "flux", "unet.mid_block"),
        (Target("text_encoder_2", "text_projection"), "sd", "text_encoder_2.text_projection"),
        (Target("text_encoder_3", "encoder.final_layer_norm"), "flux", "text_encoder_3"),
        (Target("unet", "a.b_c"), "sd", "no name"),
        (Target("unet", "a.b_c"), "sdxl", "no name"),
        (Target("", "a_b_c", flat=True), "sd", "no name"),
        (Target("unet", "mid_block.downsamplers.0.conv"), "sdxl", "no name"),
        (Target("unet", "mid_block.attentions.2.proj_in"), "sdxl", "no name"),
        (Target("unet", "down_blocks.0.resnets.0.conv9"), "sdxl", "no name"),
        (Target("unet", "down_blocks.0.resnets.2.conv1"), "sdxl", "no name"),
        (Target("unet", "down_blocks.0.upsamplers.0.conv"), "sdxl", "no name"),
        (Target("transformer", "norm_out.linear"), "flux", "no name"),
        (Target("transformer", "transformer_blocks.0.attn2.to_q"), "flux", "no name"),
        (Target("text_encoder", "self.attn"), "sd", "no name"),  # read back: self_attn
    ],
)
def test_no_name(target, kind, message):
    with pytest.raises(FormatError, match=message):
        flat_name(target, kind)


# -- families


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_family_of_whole_models(name):
    for component in (COMPONENTS[name], ""):
        assert family(Target(component, path) for path in adaptable(name)) == name
        flat = [Target(component, flattened(path), True) for path in adaptable(name)]
        assert family(flat) == name


def test_one_family_at_most_has_a_path():
    for name in ("sd", "sdxl", "flux"):
        for path in adaptable(name):
            try:
                assert family([Target(COMPONENTS[name], path)]) == name
            except FormatError as error:
                assert "none of them" in str(error)


def test_family_by_components():
    proj = Target("unet", "mid_block.attentions.0.proj_in")
    assert family([proj, Target("text_encoder_2", "text_projection")]) == "sdxl"
    assert family([Target("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q")]) == "flux"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "none"),
        ([Target("unet", "mid_block.attentions.0.proj_in")], "unet.mid_block.attentions.0.proj_in"),
        ([Target("transformer", "transformer_blocks.0.attn.to_q")], "none of them"),  # or SD3
        (
            [
                Target("unet", "add_embedding.linear_1"),
                Target("unet", "down_blocks.3.resnets.0.conv1"),
            ],
            "sd and sdxl",
        ),
    ],
)
def test_family_is_not_told(targets, message):
    with pytest.raises(FormatError, match=message):
        family(targets)


# -- the modules of a live model


def test_index_finds_every_module_by_both_names():
    for name in MODELS:
        paths = [path for path, _ in model(name).named_modules() if path]
        index = Index(paths)
        for path in paths:
            assert index.find(Target("", path)) == path
            assert index.find(Target("unet", flattened(path), flat=True)) == path


def test_index_reports_what_it_does_not_decide():
    index = Index(["a.b_c", "a_b.c", "d"])
    assert index.find(Target("", "a.b_c")) == "a.b_c"
    assert index.find(Target("", "a_b.c")) == "a_b.c"
    with pytest.raises(FormatError, match=r"lora.a_b_c: .* a\.b_c, a_b\.c"):
        index.find(Target("lora", "a_b_c", flat=True))
    assert index.find(Target("", "a.b.c")) is None
    assert index.find(Target("", "e", flat=True)) is None
    assert index.find(Target("", "d", flat=True)) == "d"


@pytest.mark.parametrize("name", ["clip", "clip with projection"])
@pytest.mark.parametrize(
    "path", ["encoder.layers.1.mlp.fc1", "text_model.encoder.layers.1.mlp.fc1"]
)
def test_index_with_and_without_text_model(name, path):
    index = Index(path for path, _ in model(name).named_modules())
    [found] = {index.find(Target("", path)), index.find(Target("", flattened(path), flat=True))}
    assert isinstance(model(name).get_submodule(found), nn.Linear)
