"""Writing kohya's files: what is read back is the same, and what would not be is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.formats import kohya
from fastlora.formats.changes import Change, Dense, Kronecker, LowRank, Shift, Target
from fastlora.formats.files import FormatError

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
QUERY = Target("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
KEY = Target("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k")
RESNET = Target("unet", "down_blocks.0.resnets.0.conv1")
DOUBLE = "lora_unet_double_blocks_3_img_attn_qkv"


def double(x: str) -> Target:
    return Target("transformer", f"transformer_blocks.3.attn.to_{x}")


def delta(change: Change) -> Tensor:
    """Of a matrix [4, 4]."""
    return change.delta((4, 4), torch.float64)


def low_rank(out: int = 6, width: int = 4, rank: int = 2, alpha: float | None = 1.0) -> LowRank:
    return LowRank(torch.randn(rank, width), torch.randn(out, rank), alpha)


def same(change: Change, other: Change) -> bool:
    """Equal in all but the keys; no alpha is alpha = rank."""
    mine, others = vars(change.weight or Change(None)), vars(other.weight or Change(None))
    for key, value in mine.items():
        theirs = others[key]
        if isinstance(value, Tensor):
            if value.dtype != theirs.dtype or not torch.equal(value, theirs):
                return False
        elif value != theirs:
            return False
    for a, b in ((change.bias, other.bias), (change.magnitude, other.magnitude)):
        if (a is None) != (b is None) or (a is not None and not torch.equal(a, b)):
            return False
    return (change.axis, change.rows) == (other.axis, other.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_unpacking_what_was_packed_gives_the_same(dtype: torch.dtype) -> None:
    conv = LowRank(torch.randn(2, 5, 3, 3), torch.randn(6, 2, 1, 1), 1.5)
    tucker = LowRank(
        torch.randn(2, 5, 1, 1), torch.randn(6, 2, 1, 1), 3.0, mid=torch.randn(2, 2, 3, 3)
    )
    changes = {
        QUERY: Change(low_rank(alpha=0.3), magnitude=torch.rand(6)),
        RESNET: Change(conv, magnitude=torch.rand(5), axis="in"),
        RESNET._replace(path="down_blocks.0.resnets.0.conv2"): Change(tucker),
        Target("text_encoder", "text_model.encoder.layers.0.mlp.fc1"): Change(low_rank()),
        Target("text_encoder", "my_own_layer", flat=True): Change(low_rank()),
    }
    for target, change in changes.items():
        assert isinstance(change.weight, LowRank)
        cast: Any = {key: t.to(dtype) for key, t in change.weight.tensors().items()}
        alpha = float(torch.tensor(change.weight.alpha))
        weight = LowRank(**cast, alpha=alpha)
        changes[target] = Change(weight, None, change.magnitude, change.axis)
    packed = kohya.pack(changes, "sd")
    file = kohya.unpack(packed.tensors, packed.metadata)
    assert file.format == "kohya" and not file.unused
    assert file.changes.keys() == changes.keys()
    assert all(same(change, file.changes[target]) for target, change in changes.items())


def test_alpha_is_always_written_as_one_float32() -> None:
    changes = {
        QUERY: Change(low_rank(rank=4, alpha=None)),
        KEY: Change(
            LowRank(torch.ones(3, 4).half(), torch.ones(6, 3).half(), 5.0, rank_stabilized=True)
        ),
    }
    packed = kohya.pack(changes, "sd").tensors
    alphas = [packed[f"{ATTENTION}{x}.alpha"] for x in "qk"]
    # So that alpha / 3 is 5 / √3.
    assert [alpha.item() for alpha in alphas] == pytest.approx([4.0, 5.0 * math.sqrt(3)], rel=1e-7)
    assert all(alpha.dtype == torch.float32 and alpha.dim() == 0 for alpha in alphas)


def test_metadata_say_rank_alpha_and_network() -> None:
    one = kohya.pack({QUERY: Change(low_rank()), KEY: Change(low_rank())}, "sd").metadata
    two = kohya.pack({QUERY: Change(low_rank()), KEY: Change(low_rank(rank=3))}, "sd").metadata
    assert one == {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1.0",
    }
    assert (two["ss_network_dim"], two["ss_network_alpha"]) == ("Dynamic", "1.0")


def fused(changes: dict[Target, Change]) -> tuple[dict[str, Tensor], dict[Target, Change]]:
    packed = kohya.pack(changes, "flux")
    assert packed.metadata["ss_network_module"] == "networks.lora_flux"
    assert {key.partition(".")[0] for key in packed.tensors} == {DOUBLE}
    return packed.tensors, kohya.unpack(packed.tensors, packed.metadata).changes


def test_parts_with_the_same_down_become_one_lora() -> None:
    tensors = {
        f"{DOUBLE}.lora_down.weight": torch.randn(2, 4),
        f"{DOUBLE}.lora_up.weight": torch.randn(12, 2),
        f"{DOUBLE}.alpha": torch.tensor(1.0),
        f"{DOUBLE}.dora_scale": torch.rand(12, 1),
    }
    changes = kohya.unpack(tensors, {}).changes
    copies = {
        target: Change(
            LowRank(change.weight.down.clone(), change.weight.up, change.weight.alpha),
            magnitude=change.magnitude,
        )
        for target, change in reversed(changes.items())
        if isinstance(change.weight, LowRank)
    }
    for given in (changes, copies):
        packed, _ = fused(given)
        assert packed.keys() == tensors.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in packed.items())


def test_parts_of_other_ranks_and_scales_become_blocks_and_missing_ones_zeros() -> None:
    changes = {
        double("k"): Change(low_rank(4, rank=3, alpha=1.0)),
        double("q"): Change(low_rank(4, rank=2, alpha=0.7)),
    }
    packed, found = fused(changes)
    assert packed[f"{DOUBLE}.lora_down.weight"].shape == (5, 4)
    assert packed[f"{DOUBLE}.lora_up.weight"].shape == (12, 5)
    for target, change in changes.items():
        wanted = delta(change)
        torch.testing.assert_close(delta(found[target]), wanted, rtol=1e-6, atol=1e-6)
    assert delta(found[double("v")]).abs().max() == 0


@pytest.mark.parametrize("alpha", [4.0, 3.0])
def test_blocks_keep_their_dtype_where_it_holds_the_other_scale(alpha: float) -> None:
    changes = {
        double(x): Change(
            LowRank(torch.randn(2, 4).half(), torch.randn(4, 2).half(), 1.0 if x == "q" else alpha)
        )
        for x in "qkv"
    }
    packed, found = fused(changes)
    for target, change in changes.items():
        torch.testing.assert_close(delta(found[target]), delta(change), rtol=1e-14, atol=1e-14)
    assert packed[f"{DOUBLE}.lora_down.weight"].dtype == torch.float16
    dtype = torch.float16 if alpha == 4 else torch.float32
    assert packed[f"{DOUBLE}.lora_up.weight"].dtype == dtype


def embedding() -> Change:
    return Change(LowRank(torch.ones(2, 9), torch.ones(4, 2), embedding=True))


def magnitude(axis: Any) -> Change:
    return Change(low_rank(4), magnitude=torch.ones(4), axis=axis)


REFUSED: dict[str, tuple[dict[Target, Change], str]] = {
    "full": ({QUERY: Change(Dense(torch.ones(6, 4)))}, "LyCORIS"),
    "bias": ({QUERY: Change(low_rank(), torch.ones(6))}, "lora with a bias; write a LyCORIS"),
    "bias alone": ({QUERY: Change(None, torch.ones(6))}, "got bias; write a LyCORIS"),
    "shifts": ({QUERY: Change(Shift(torch.ones(4)))}, "extract a LoRA"),
    "LoKr": ({QUERY: Change(Kronecker(torch.ones(2, 2), w2=torch.ones(3, 2)))}, "LyCORIS"),
    "embedding": ({QUERY: embedding()}, "PEFT"),
    "groups": (
        {RESNET: Change(LowRank(torch.ones(4, 2, 3, 3), torch.ones(6, 2, 1, 1)))},
        "groups.*PEFT",
    ),
    "alpha 0": ({QUERY: Change(low_rank(alpha=0.0))}, "alpha 0"),
    "no name": ({Target("unet", "my.own.layer"): Change(low_rank())}, "my.own.layer"),
    "some magnitudes": (
        {double("q"): magnitude("out"), double("k"): Change(low_rank(4))},
        "magnitude of all.*extract",
    ),
    "a magnitude is missing": ({double("q"): magnitude("out")}, "magnitude of all.*extract"),
    "magnitudes of inputs": ({double(x): magnitude("in") for x in "qkv"}, "inputs.*extract"),
    "widths": (
        {double("q"): Change(low_rank(4)), double("k"): Change(low_rank(5))},
        "equal parts.*to_q 4.*to_k 5",
    ),
    "inputs": (
        {double("q"): Change(low_rank(4, 4)), double("k"): Change(low_rank(4, 5))},
        r"same inputs.*\[4\], \[5\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_such_a_file_cannot_have_is_refused_with_the_way_out(case: str) -> None:
    changes, message = REFUSED[case]
    family = "flux" if any(target.component == "transformer" for target in changes) else "sd"
    with pytest.raises(FormatError, match=message) as error:
        kohya.pack(changes, family)
    assert any(str(target) in str(error.value) for target in changes)


def test_the_family_is_told_by_the_targets() -> None:
    xl = Target("unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q")
    packed = kohya.pack({xl: Change(low_rank())})
    assert "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.alpha" in packed.tensors
    assert list(kohya.unpack(packed.tensors, {}).changes) == [xl]
