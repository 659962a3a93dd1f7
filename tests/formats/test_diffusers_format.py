"""diffusers' files, against diffusers itself: what it saves is read, what is written it loads."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora.formats import detect, diffusers, files
from fastlora.formats.changes import Change, Kronecker, LowRank, Target
from fastlora.formats.files import FormatError
from tests.formats.nets import changed_output, random_lora, randomize

oracle = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
ATTENTION = [f"{BLOCK}.attn{i}.{layer}" for i in (1, 2) for layer in ("to_q", "to_k", "to_out.0")]
UNET = [*ATTENTION, f"{BLOCK}.ff.net.2", "mid_block.resnets.0.conv1", "conv_out"]
TEXT = [f"encoder.layers.0.{p}" for p in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]


@pytest.fixture(autouse=True)
def one_thread(fixed_seed: None) -> None:
    """Tiny tensors: threads would cost more than they bring."""
    torch.set_num_threads(1)  # fixed_seed puts back what it was


def parts() -> tuple[nn.Module, nn.Module]:
    """A UNet and a text encoder of Stable Diffusion's kind, float64."""
    unet = oracle.UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    config = transformers.CLIPTextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    return unet.double().eval(), transformers.CLIPTextModel(config).double().eval()


def pipeline(unet: nn.Module, text_encoder: nn.Module) -> Any:
    others = ("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    return oracle.StableDiffusionPipeline(
        unet=copy.deepcopy(unet),
        text_encoder=copy.deepcopy(text_encoder),
        requires_safety_checker=False,
        **dict.fromkeys(others),
    )


def text_paths(text_encoder: nn.Module) -> list[str]:
    """With "text_model." in front or not, as the version of transformers has them."""
    names = [name for name, _ in text_encoder.named_modules()]
    return [name for name in names if name.endswith(tuple(TEXT))]


def output(
    unet: nn.Module, text_encoder: nn.Module, changes: dict[Target, Change] | None = None
) -> Tensor:
    own = {
        name: {t: c for t, c in (changes or {}).items() if t.component == name}
        for name in ("unet", "text_encoder")
    }
    ids = torch.tensor([[0, 5, 9, 1]])
    hidden = changed_output(text_encoder, own["text_encoder"], ids).last_hidden_state  # type: ignore[attr-defined]
    sample = torch.linspace(-1, 1, 64).double().reshape(1, 4, 4, 4)
    return changed_output(unet, own["unet"], sample, 7, hidden).sample  # type: ignore[attr-defined]


def some_changes(
    unet: nn.Module,
    text_encoder: nn.Module,
    paths: list[str],
    text: bool,
    bias: bool = False,
    **fields: Any,
) -> dict[Target, Change]:
    """With another rank and alpha in the first of each component than in the others."""
    changes: dict[Target, Change] = {}
    for component, model, own in (
        ("unet", unet, paths),
        ("text_encoder", text_encoder, text_paths(text_encoder) if text else []),
    ):
        for i, path in enumerate(own):
            settings = {"rank": 3 if i == 0 else 4, "alpha": 1.0 if i == 1 else 2.0, **fields}
            change = random_lora(model.get_submodule(path), **settings)
            if bias:
                change = replace(change, bias=torch.randn(len(change.weight.up)).double())  # type: ignore[union-attr]
            changes[Target(component, path)] = change
    return changes


def write(folder: Path, packed: Any) -> Path:
    path = folder / "pytorch_lora_weights.safetensors"
    files.write(path, packed.tensors, packed.metadata)
    return path


WRITTEN: dict[str, tuple[diffusers.Style, list[str], bool, dict[str, Any]]] = {
    "peft": ("peft", UNET, True, {}),
    "peft, rank stabilised": ("peft", UNET, True, {"rank_stabilized": True}),
    "peft, DoRA": ("peft", UNET, True, {"dora": True}),
    "peft, bias": ("peft", UNET[-3:], False, {"bias": True}),
    "lora": ("lora", UNET, True, {}),
    "lora, DoRA": ("lora", UNET, False, {"dora": True}),
    "old": ("old", ATTENTION, False, {}),
    "old, DoRA": ("old", ATTENTION, False, {"dora": True}),
}


@pytest.mark.filterwarnings("ignore:Passing `state_dict`")
@pytest.mark.parametrize(("style", "paths", "text", "fields"), WRITTEN.values(), ids=WRITTEN)
def test_what_is_written_diffusers_loads(
    tmp_path: Path, style: diffusers.Style, paths: list[str], text: bool, fields: dict[str, Any]
) -> None:
    unet, text_encoder = parts()
    changes = some_changes(unet, text_encoder, paths, text, **fields)
    path = write(tmp_path, diffusers.pack(changes, style))
    expected = output(unet, text_encoder, changes)
    assert (expected - output(unet, text_encoder)).abs().max() > 1e-3

    pipe = pipeline(unet, text_encoder)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(pipe.unet, pipe.text_encoder), expected, **CLOSE)

    file = detect.read(path)
    assert file.format == "diffusers" and not file.unused and file.changes.keys() == changes.keys()
    torch.testing.assert_close(output(unet, text_encoder, file.changes), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:Passing `state_dict`")
def test_a_models_file(tmp_path: Path) -> None:
    unet, text_encoder = parts()
    changes = some_changes(unet, text_encoder, UNET, text=False)
    bare = {Target("", t.path): change for t, change in changes.items()}
    write(tmp_path, diffusers.pack(bare))
    model = copy.deepcopy(unet)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    expected = output(unet, text_encoder, changes)
    torch.testing.assert_close(output(model, text_encoder), expected, **CLOSE)


CONFIG = {
    "target_modules": UNET,
    "r": 4,
    "lora_alpha": 3,
    "rank_pattern": {"^conv_out": 2, "attn1.to_q": 6},
    "alpha_pattern": {r".*attn2\.to_.": 8, "conv1": 0.5},
}


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_what_diffusers_saves_is_read(tmp_path: Path, more: dict[str, Any]) -> None:
    unet, text_encoder = parts()
    pipe = pipeline(unet, text_encoder)
    pipe.unet.add_adapter(peft.LoraConfig(**CONFIG, **more))
    text = peft.LoraConfig(target_modules=text_paths(text_encoder), r=2, lora_alpha=5)
    pipe.text_encoder.add_adapter(text)
    for model in (pipe.unet, pipe.text_encoder):
        randomize(model.double().eval(), ("lora_",))
    pipe.save_lora_weights(
        tmp_path / "pipeline",
        unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
    )
    file = detect.read(tmp_path / "pipeline")
    assert file.format == "diffusers" and not file.unused
    assert len(file.changes) == len(UNET) + len(TEXT)
    found = output(unet, text_encoder, file.changes)
    torch.testing.assert_close(found, output(pipe.unet, pipe.text_encoder), **CLOSE)

    pipe.unet.save_lora_adapter(tmp_path / "model")
    alone = detect.read(tmp_path / "model")
    assert {t.component for t in alone.changes} == {""}
    named = {Target("unet", t.path): change for t, change in alone.changes.items()}
    found = output(unet, text_encoder, named)
    torch.testing.assert_close(found, output(pipe.unet, text_encoder), **CLOSE)


def pair(down: str, up: str) -> dict[str, Tensor]:
    return {down: torch.randn(2, 3), up: torch.randn(5, 2)}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("unet.a.attn1.to_q.lora_{}.weight", Target("unet", "a.attn1.to_q")),
        ("a.attn1.to_q.lora_{}.mine.weight", Target("", "a.attn1.to_q")),
        ("transformer.blocks.0.ff.lora_{}.weight", Target("transformer", "blocks.0.ff")),
        ("transformer_2.x.lora.{}.weight", Target("transformer_2", "x")),
        ("unet.a.attn1.to_out.0.lora.{}.weight", Target("unet", "a.attn1.to_out.0")),
        ("unet.a.attn1.processor.to_out_lora.{}.weight", Target("unet", "a.attn1.to_out.0")),
        ("a.attn1.processor.add_k_proj_lora.{}.weight", Target("", "a.attn1.add_k_proj")),
        ("a.attn1.processor.to_q.lora.{}.weight", Target("", "a.attn1.to_q")),
        ("text_encoder_2.q_proj.lora_linear_layer.{}.weight", Target("text_encoder_2", "q_proj")),
        ("text_encoder.l.attn.to_out_lora.{}.weight", Target("text_encoder", "l.attn.out_proj")),
        ("text_encoder.l.attn.to_q_lora.{}.weight", Target("text_encoder", "l.attn.q_proj")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stated", [False, True], ids=["no alpha", "alpha"])
def test_names_of_every_style(name: str, target: Target, stated: bool) -> None:
    down, up = ("A", "B") if "lora_{}" in name else ("down", "up")
    tensors = pair(name.format(down), name.format(up))
    if stated:
        tensors[name.split(".lora")[0].split(".{}")[0] + ".alpha"] = torch.tensor(0.5).half()
    file = detect.unpack(tensors, {})
    (change,) = file.changes.values()
    assert list(file.changes) == [target] and sorted(change.keys) == sorted(tensors)
    product = tensors[name.format(up)].double() @ tensors[name.format(down)].double()
    expected = product * (0.25 if stated else 1)
    torch.testing.assert_close(change.delta((5, 3), torch.float64), expected)


def test_kohyas_words_with_dots() -> None:
    tensors = pair("transformer.a.0.lora_down.weight", "transformer.a.0.lora_up.weight")
    file = detect.unpack({**tensors, "transformer.a.0.alpha": torch.tensor(0)}, {})
    assert list(file.changes) == [Target("transformer", "a.0")]
    assert file.changes[Target("transformer", "a.0")].weight.ratio == 1  # type: ignore[union-attr]


def test_components_come_from_the_header_too() -> None:
    tensors = pair("controlnet.a.lora_A.weight", "controlnet.a.lora_B.weight")
    header = {"controlnet.r": 2, "controlnet.lora_alpha": 6}
    file = diffusers.unpack(tensors, {"lora_adapter_metadata": json.dumps(header)})
    change = file.changes[Target("controlnet", "a")]
    assert isinstance(change.weight, LowRank) and change.weight.ratio == 3


def test_a_models_own_module_is_no_component() -> None:
    tensors = pair("transformer.a.lora_A.weight", "transformer.a.lora_B.weight")
    header = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 6})}
    assert list(diffusers.unpack(tensors, header).changes) == [Target("", "transformer.a")]
    assert list(diffusers.unpack(tensors, {}).changes) == [Target("transformer", "a")]


def test_lokr_in_pefts_names() -> None:
    """diffusers takes a scale of 1 for it, as its conversions have multiplied by alpha."""
    w1, w2 = torch.randn(2, 2), torch.randn(3, 4)
    tensors = {"transformer.a.lokr_w1": w1, "transformer.a.lokr_w2": w2}
    change = detect.unpack(tensors, {}).changes[Target("transformer", "a")]
    assert isinstance(change.weight, Kronecker)
    expected = torch.einsum("ij,kl->ikjl", w1.double(), w2.double()).reshape(6, 8)
    torch.testing.assert_close(change.delta((6, 8), torch.float64), expected)


def test_alpha_in_the_dtype_of_up_is_exact_for_powers_of_two() -> None:
    low = LowRank(torch.randn(4, 3).bfloat16(), torch.randn(5, 4).bfloat16(), alpha=1.0)
    packed = diffusers.pack({Target("unet", "a"): Change(low)}, "lora")
    up = packed.tensors["unet.a.lora.up.weight"]
    assert up.dtype == torch.bfloat16 and torch.equal(up * 4, low.up)


def lora(**fields: Any) -> Change:
    return Change(LowRank(torch.ones(2, 3), torch.ones(4, 2)), **fields)


Q, FF = Target("unet", "a.attn1.to_q"), Target("unet", "a.ff")
NOT_WRITTEN: dict[str, tuple[dict[Target, Change], str, str]] = {
    "a style": ({Q: lora()}, "kohya", "style: expected one of .'peft', 'lora', 'old'., got"),
    "some components": ({Q: lora(), Target("", "a"): lora()}, "peft", "for all modules or"),
    "old, not attention": ({FF: lora()}, "old", "unet.a.ff: diffusers-old has only"),
    "old, text": ({Target("text_encoder", "a.to_q"): lora()}, "old", "a.to_q: .* write diffusers"),
    "lora, bias": ({FF: lora(bias=torch.ones(4))}, "lora", "unet.a.ff: diffusers-lora has no bias"),
    "some DoRA": ({Q: lora(magnitude=torch.ones(4)), FF: lora()}, "peft", "unet.a.ff: .*two files"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "style", "message"), NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_what_cannot_be_written(changes: dict[Target, Change], style: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        diffusers.pack(changes, style)


PAIR = {"unet.a.lora_A.weight": torch.ones(2, 3), "unet.a.lora_B.weight": torch.ones(4, 2)}
REFUSED: dict[str, tuple[dict[str, Tensor], str | None, str]] = {
    "no JSON": ({}, "{", "lora_adapter_metadata: expected JSON"),
    "a list": ({}, "[]", "lora_adapter_metadata: expected an object"),
    "another rank": ({}, '{"unet.r": 4}', "unet.a: the settings say rank 4, the tensors have 2"),
    "a setting": ({}, '{"unet.r": "4"}', "lora_adapter_metadata: unet.r: expected a finite number"),
    "another method": ({}, '{"unet.peft_type": "OFT"}', "unet.peft_type: expected LORA"),
    "two alphas": (
        {"unet.a.alpha": torch.tensor(4.0)},
        '{"unet.r": 2, "unet.lora_alpha": 8}',
        "unet.a: alpha: the settings say 8, the tensor beside 4",
    ),
    "alphas": ({"unet.a.alpha": torch.ones(2)}, None, r"alpha: expected one number, got .* \[2\]"),
    "an alpha alone": ({"unet.b.alpha": torch.ones(1)}, None, "unet.b: expected tensors of one"),
    "two styles": ({"unet.a.lora.down.weight": torch.ones(2, 3)}, None, "are the same tensor"),
}


@pytest.mark.parametrize(("own", "header", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(own: dict[str, Tensor], header: str | None, message: str) -> None:
    metadata = {} if header is None else {"lora_adapter_metadata": header}
    with pytest.raises(FormatError, match=message):
        diffusers.unpack({**PAIR, **own}, metadata)
