"""Names of kohya's and LyCORIS' files, against the modules of real architectures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastlora.formats.changes import Target
from fastlora.formats.files import FormatError
from fastlora.formats.names import Index, Place, dotted, family, flat_name, places
from tests.formats.architectures import MODELS, adaptable, flattened, model

COMPONENTS = {"flux": "transformer", "sd": "unet", "sdxl": "unet"}


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
