"""Reading kohya's files, against products written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora.formats import kohya
from fastlora.formats.changes import (
    AdapterFile,
    Change,
    LowRank,
    Target,
)
from fastlora.formats.files import FormatError

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
QUERY = Target("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
RESNET = Target("unet", "down_blocks.0.resnets.0.conv1")
DOUBLE = "lora_unet_double_blocks_3_img_attn_qkv"
SINGLE = "lora_unet_single_blocks_7_linear1"


def double(x: str) -> Target:
    return Target("transformer", f"transformer_blocks.3.attn.to_{x}")


def lora(
    name: str, out: int = 6, width: int = 4, rank: int = 2, **more: Tensor
) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": torch.randn(rank, width),
        f"{name}.lora_up.weight": torch.randn(out, rank),
        **{f"{name}.{part.replace('__', '.')}": tensor for part, tensor in more.items()},
    }


def product(tensors: dict[str, Tensor], name: str) -> Tensor:
    up, down = (tensors[f"{name}.lora_{x}.weight"].double().flatten(1) for x in ("up", "down"))
    return up @ down


def read(tensors: dict[str, Tensor], **metadata: str) -> dict[Target, Change]:
    """The Changes of a file of which every key is used."""
    file = kohya.unpack(tensors, metadata)
    assert not file.unused
    assert {key for change in file.changes.values() for key in change.keys} == set(tensors)
    return file.changes


def delta(change: Change, *shape: int) -> Tensor:
    return change.delta(shape, torch.float64)


def test_every_module_has_its_own_scale() -> None:
    alphas = {"q": 1.0, "k": 4.0, "v": 0.5}
    tensors: dict[str, Tensor] = {}
    for x, alpha in alphas.items():
        tensors |= lora(f"{ATTENTION}{x}", rank=4, alpha=torch.tensor(alpha))
    changes = read(tensors)
    for x, alpha in alphas.items():
        target = QUERY._replace(path=QUERY.path[:-1] + x)
        wanted = product(tensors, f"{ATTENTION}{x}") * (alpha / 4)
        torch.testing.assert_close(delta(changes[target], 6, 4), wanted)


@pytest.mark.parametrize(
    ("alpha", "ratio"),
    [
        (None, 1),
        (torch.tensor(0.0), 1),
        (torch.tensor(3), 1.5),
        (torch.tensor([3.0]), 1.5),
        (torch.tensor(0.5, dtype=torch.float16), 0.25),
        (torch.tensor(-3.0, dtype=torch.bfloat16), -1.5),
        (torch.tensor(0.5).to(torch.float8_e4m3fn), 0.25),
    ],
    ids=str,
)
def test_alpha_is_any_number_and_rank_if_missing_or_zero(
    alpha: Tensor | None, ratio: float
) -> None:
    tensors = lora(f"{ATTENTION}q", **({} if alpha is None else {"alpha": alpha}))
    change = read(tensors)[QUERY]
    torch.testing.assert_close(delta(change, 6, 4), product(tensors, f"{ATTENTION}q") * ratio)
    assert isinstance(change.weight, LowRank)
    assert change.weight.down is tensors[f"{ATTENTION}q.lora_down.weight"]


def test_convolutions_with_and_without_a_middle() -> None:
    name = "lora_unet_down_blocks_0_resnets_0_conv"
    plain = {
        f"{name}1.lora_down.weight": torch.randn(2, 5, 3, 3),
        f"{name}1.lora_up.weight": torch.randn(6, 2, 1, 1),
        f"{name}1.alpha": torch.tensor(1.0),
    }
    tucker = {
        f"{name}2.lora_down.weight": torch.randn(2, 5, 1, 1),
        f"{name}2.lora_mid.weight": torch.randn(2, 2, 3, 3),
        f"{name}2.lora_up.weight": torch.randn(6, 2, 1, 1),
        f"{name}2.alpha": torch.tensor(1.0),
    }
    changes = read(plain | tucker)
    wanted = product(plain, f"{name}1").view(6, 5, 3, 3) * 0.5
    torch.testing.assert_close(delta(changes[RESNET], 6, 5, 3, 3), wanted)
    down, mid, up = (tucker[f"{name}2.lora_{x}.weight"].double() for x in ("down", "mid", "up"))
    wanted = torch.zeros(6, 5, 3, 3, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            outer = up[:, i, 0, 0].outer(down[j, :, 0, 0])
            wanted += 0.5 * outer[:, :, None, None] * mid[i, j]
    second = changes[RESNET._replace(path=RESNET.path[:-1] + "2")]
    torch.testing.assert_close(delta(second, 6, 5, 3, 3), wanted)


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 1), "out"), ((6,), "out"), ((1, 4), "in")], ids=str
)
@pytest.mark.parametrize("width", [4, 6])
def test_the_ones_of_dora_scale_tell_its_axis(
    shape: tuple[int, ...], axis: str, width: int
) -> None:
    scale = torch.rand(tuple(width if n == 4 else n for n in shape))
    tensors = lora(f"{ATTENTION}q", width=width, dora_scale=scale)
    change = read(tensors)[QUERY]
    assert change.axis == axis and change.magnitude is not None and change.magnitude.dim() == 1
    base = torch.randn(6, width, dtype=torch.float64)
    sum_ = base + product(tensors, f"{ATTENTION}q")
    wanted = sum_ / sum_.norm(dim=1 if axis == "out" else 0, keepdim=True)
    wanted = wanted * scale.double().view((6, 1) if axis == "out" else (1, width))
    torch.testing.assert_close(change.changed(base), wanted)


def test_a_convolutions_magnitude_has_four_dimensions() -> None:
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    weights = {
        f"{name}.lora_down.weight": torch.randn(2, 5, 3, 3),
        f"{name}.lora_up.weight": torch.randn(6, 2, 1, 1),
        f"{name}.alpha": torch.tensor(2.0),
    }
    for shape in ((1, 5, 1, 1), (6, 1, 1, 1)):
        tensors = weights | {f"{name}.dora_scale": torch.rand(shape)}
        packed = kohya.pack(read(tensors), "sd").tensors
        assert packed[f"{name}.dora_scale"].shape == shape


def test_bias_of_up_goes_through_the_scale_as_its_product_does() -> None:
    bias = torch.randn(6)
    tensors = lora(f"{ATTENTION}q", alpha=torch.tensor(1.0), lora_up__bias=bias)
    torch.testing.assert_close(read(tensors)[QUERY].bias, bias * 0.5)


def target_of(name: str, **metadata: str) -> Target:
    (target,) = read(lora(name), **metadata)
    return target


def test_names_that_are_known_become_paths_and_others_stay_flat() -> None:
    clip, t5 = "layers_0_self_attn_q_proj", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert target_of("lora_unet_input_blocks_4_1_proj_in") == Target(
        "unet", "down_blocks.1.attentions.0.proj_in"
    )
    assert target_of(f"lora_te_text_model_encoder_{clip}").component == "text_encoder"
    assert target_of(f"lora_te2_text_model_encoder_{clip}").component == "text_encoder_2"
    assert target_of(t5).component == "text_encoder_3"
    assert target_of("lycoris_my_own_layer") == Target("", "my_own_layer", flat=True)
    for prefix, component in {
        "lora_unet": "unet",
        "lora_transformer": "transformer",
        "lora_te1": "text_encoder",
        "lycoris_unet": "unet",
        "lycoris_te2": "text_encoder_2",
    }.items():
        assert target_of(f"{prefix}_my_own_layer") == Target(component, "my_own_layer", flat=True)


def test_flux_is_told_by_metadata_or_other_names() -> None:
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert target_of(t5, ss_base_model_version="flux1").component == "text_encoder_2"
    both = read(lora(t5) | lora(DOUBLE))
    assert {target.component for target in both} == {"transformer", "text_encoder_2"}
    own = target_of("lora_unet_my_own_layer", ss_base_model_version="flux1")
    assert own == Target("transformer", "my_own_layer", flat=True)


def test_flux_has_several_modules_by_one_name() -> None:
    tensors = lora(DOUBLE, out=12, alpha=torch.tensor(1.0), dora_scale=torch.rand(12, 1))
    tensors |= lora(SINGLE, out=14, lora_up__bias=torch.randn(14))
    changes = read(tensors)
    qkv, linear1 = product(tensors, DOUBLE) * 0.5, product(tensors, SINGLE)
    for i, x in enumerate("qkv"):
        change = changes[double(x)]
        assert isinstance(change.weight, LowRank) and change.rows is None
        assert change.weight.down is tensors[f"{DOUBLE}.lora_down.weight"]
        assert change.weight.up.untyped_storage().data_ptr() == (
            tensors[f"{DOUBLE}.lora_up.weight"].untyped_storage().data_ptr()
        )
        rows = slice(4 * i, 4 * i + 4)
        torch.testing.assert_close(delta(change, 4, 4), qkv[rows])
        assert torch.equal(change.magnitude, tensors[f"{DOUBLE}.dora_scale"][rows, 0])
        assert len(change.keys) == 4
    bias = tensors[f"{SINGLE}.lora_up.bias"]
    for path, rows in {
        "attn.to_q": slice(0, 2),
        "attn.to_k": slice(2, 4),
        "attn.to_v": slice(4, 6),
        "proj_mlp": slice(6, 14),
    }.items():
        change = changes[Target("transformer", f"single_transformer_blocks.7.{path}")]
        torch.testing.assert_close(delta(change, len(bias[rows]), 4), linear1[rows])
        assert torch.equal(change.bias, bias[rows])


def test_what_cannot_be_split_is_unused_and_says_why() -> None:
    inputs = kohya.unpack(lora(DOUBLE, out=12, dora_scale=torch.rand(1, 4)), {})
    odd = kohya.unpack(lora(DOUBLE, out=13), {})
    for file, reason in ((inputs, "norms over the rows"), (odd, "13 rows")):
        assert not file.changes and all(reason in text for text in file.unused.values())
        assert len(file.unused) in (2, 3)


def unused(tensors: dict[str, Tensor]) -> dict[str, str]:
    file: AdapterFile = kohya.unpack(lora(f"{ATTENTION}q") | tensors, {"ss_network_dim": "2"})
    assert list(file.changes) == [QUERY] and file.metadata == {"ss_network_dim": "2"}
    return file.unused


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("oft_blocks", "OFT"),
        ("oft_diag", "OFT"),
        ("a1.weight", "GLoRA"),
        ("on_input", "IA3"),
        ("scalar", "scalar"),
        ("alpha", "without weights"),
        ("surprise.weight", "not a part"),
    ],
)
def test_algorithms_that_are_not_supported_are_unused_with_a_reason(part: str, reason: str) -> None:
    key = f"{ATTENTION}k.{part}"
    beside = lora(f"{ATTENTION}k") if part == "scalar" else {}
    found = unused(beside | {key: torch.ones(1)})
    assert found.keys() == {key, *beside} and all(reason in text for text in found.values())


def test_foreign_keys_and_parts_are_unused_with_a_reason() -> None:
    keys = ("first_stage_model.bias", "lora_unet", f"{ATTENTION}q", f"{ATTENTION}q.rest", "")
    found = unused({key: torch.ones(1) for key in keys})
    assert found.keys() == set(keys)


BROKEN: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "down alone": ({"lora_down.weight": (2, 4)}, "no lora_up.weight"),
    "up alone": ({"lora_up.weight": (6, 2)}, "no lora_down.weight"),
    "ranks": (
        {"lora_down.weight": (2, 4), "lora_up.weight": (6, 3)},
        r"\[6, 3\] and \[2, 4\]",
    ),
    "a vector": ({"lora_down.weight": (2,), "lora_up.weight": (6, 2)}, r"got \[2\]"),
    "a number": ({"lora_down.weight": (), "lora_up.weight": (6, 2)}, r"got \[\]"),
    "no rank": ({"lora_down.weight": (0, 4), "lora_up.weight": (6, 0)}, r"got \[0, 4\]"),
    "up with a kernel": (
        {"lora_down.weight": (2, 4, 1, 1), "lora_up.weight": (6, 2, 3, 3)},
        r"\[6, 2, 3, 3\]",
    ),
    "mid": (
        {
            "lora_down.weight": (2, 4, 1, 1),
            "lora_up.weight": (6, 2, 1, 1),
            "lora_mid.weight": (3, 2, 3, 3),
        },
        r"\[3, 2, 3, 3\] and \[2, 4, 1, 1\]",
    ),
    "two alphas": (
        {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2), "alpha": (2,)},
        "one number as alpha",
    ),
    "magnitude of other rows": (
        {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2), "dora_scale": (5, 1)},
        r"dora_scale.*got \[5, 1\]",
    ),
    "magnitude of other inputs": (
        {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2), "dora_scale": (1, 2)},
        r"dora_scale.*got \[1, 2\]",
    ),
    "magnitude that is a matrix": (
        {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2), "dora_scale": (6, 4)},
        r"dora_scale.*got \[6, 4\]",
    ),
    "magnitude alone": ({"dora_scale": (6, 1)}, "no weights"),
    "bias of other rows": (
        {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2), "lora_up.bias": (5,)},
        r"expected \[6\], got \[5\]",
    ),
    "two algorithms": (
        {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2), "diff": (6, 4)},
        "one algorithm",
    ),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_parts_that_are_missing_or_contradict_each_other_are_refused(case: str) -> None:
    shapes, message = BROKEN[case]
    name = f"{ATTENTION}q"
    with pytest.raises(FormatError, match=f"{name}: .*{message}"):
        kohya.unpack({f"{name}.{part}": torch.ones(shape) for part, shape in shapes.items()}, {})


def test_two_names_of_one_module_are_refused() -> None:
    original = lora("lora_unet_input_blocks_4_1_proj_in")
    diffusers = lora("lora_unet_down_blocks_1_attentions_0_proj_in")
    with pytest.raises(FormatError, match="input_blocks_4_1_proj_in as well"):
        kohya.unpack(original | diffusers, {})


def test_only_alphas_are_looked_at() -> None:
    tensors = lora(DOUBLE, out=12, dora_scale=torch.rand(12, 1), lora_up__bias=torch.rand(12))
    meta = {key: tensor.to("meta") for key, tensor in tensors.items()}
    changes = read(meta | {f"{DOUBLE}.alpha": torch.tensor(1.0)})
    assert list(changes) == [double(x) for x in "qkv"]
