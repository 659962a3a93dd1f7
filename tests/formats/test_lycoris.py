"""Files of LyCORIS, against its formulas written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.formats import lycoris
from fastlora.formats.changes import Change, Dense, Hadamard, Kronecker, LowRank, Shift, Target
from fastlora.formats.files import FormatError

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
QUERY = Target("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
CONV = Target("unet", "down_blocks.0.resnets.0.conv1")
FUSED = "lora_unet_double_blocks_3_img_attn_qkv"
PARTS = [Target("transformer", f"transformer_blocks.3.attn.to_{x}") for x in "qkv"]


def drawn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {part: torch.randn(shape) for part, shape in shapes.items()}


def module(
    parts: dict[str, Tensor], alpha: float | None = None, name: str = NAME
) -> dict[str, Tensor]:
    more = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    return {f"{name}.{part}": tensor for part, tensor in (parts | more).items()}


def read(tensors: dict[str, Tensor]) -> dict[Target, Change]:
    file = lycoris.unpack(tensors, {})
    assert file.format == "lycoris" and not file.unused
    assert {key for change in file.changes.values() for key in change.keys} == set(tensors)
    return file.changes


def delta(change: Change, *shape: int) -> Tensor:
    return change.delta(shape, torch.float64)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij core[i, j] · a[i] ⊗ b[j]."""
    core, a, b = core.double(), a.double(), b.double()
    total = torch.zeros(a.shape[1], b.shape[1], *core.shape[2:], dtype=torch.float64)
    for i in range(a.shape[0]):
        for j in range(b.shape[0]):
            total += a[i].outer(b[j])[:, :, None, None] * core[i, j]
    return total


def kronecker(first: Tensor, second: Tensor) -> Tensor:
    """K[i·k + p, j·n + q, ...] = first[i, j] · second[p, q, ...]."""
    first, second = first.double(), second.double()
    blocks = [torch.cat([x * second for x in row], dim=1) for row in first]
    return torch.cat(blocks)


@pytest.mark.parametrize(("alpha", "ratio"), [(None, 1.0), (0.0, 1.0), (3.0, 1.5)])
def test_loha_is_the_elementwise_product_of_two_loras(alpha: float | None, ratio: float) -> None:
    p = drawn(hada_w1_a=(6, 2), hada_w1_b=(2, 4), hada_w2_a=(6, 2), hada_w2_b=(2, 4))
    (change,) = read(module(p, alpha)).values()
    d = {part: tensor.double() for part, tensor in p.items()}
    wanted = (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"]) * ratio
    torch.testing.assert_close(delta(change, 6, 4), wanted)
    assert change.kind == "loha"


def test_loha_of_a_convolution_with_and_without_cores() -> None:
    flat = drawn(hada_w1_a=(6, 2), hada_w1_b=(2, 36), hada_w2_a=(6, 2), hada_w2_b=(2, 36))
    (change,) = read(module(flat, 1.0)).values()
    d = {part: tensor.double() for part, tensor in flat.items()}
    wanted = (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"]) / 2
    torch.testing.assert_close(delta(change, 6, 4, 3, 3), wanted.view(6, 4, 3, 3))
    p = drawn(hada_w1_a=(2, 6), hada_w1_b=(2, 4), hada_w2_a=(2, 6), hada_w2_b=(2, 4))
    p |= drawn(hada_t1=(2, 2, 3, 3), hada_t2=(2, 2, 3, 3))
    (change,) = read(module(p, 1.0)).values()
    first = tucker(p["hada_t1"], p["hada_w1_a"], p["hada_w1_b"])
    second = tucker(p["hada_t2"], p["hada_w2_a"], p["hada_w2_b"])
    torch.testing.assert_close(delta(change, 6, 4, 3, 3), first * second / 2)


WHOLE1, LOW1 = {"lokr_w1": (2, 3)}, {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 3)}
WHOLE2, LOW2 = {"lokr_w2": (5, 4)}, {"lokr_w2_a": (5, 2), "lokr_w2_b": (2, 4)}


@pytest.mark.parametrize(
    ("shapes", "ratio"),
    [
        (WHOLE1 | WHOLE2, 1.0),  # whatever alpha says
        (WHOLE1 | LOW2, 1.5),
        (LOW1 | WHOLE2, 3.0),
        (LOW1 | LOW2, 1.5),
    ],
    ids=["whole", "w2 low", "w1 low", "both low"],
)
def test_lokr_is_a_kronecker_product(shapes: dict[str, Any], ratio: float) -> None:
    p = drawn(**shapes)
    (change,) = read(module(p, 3.0)).values()
    first, second = (
        p[f"lokr_{x}"].double()
        if f"lokr_{x}" in p
        else p[f"lokr_{x}_a"].double() @ p[f"lokr_{x}_b"].double()
        for x in ("w1", "w2")
    )
    torch.testing.assert_close(delta(change, 10, 12), kronecker(first, second) * ratio)
    assert change.kind == "lokr"


def test_lokr_of_a_convolution_is_whole_flattened_or_has_a_core() -> None:
    first = drawn(lokr_w1=(2, 3))
    whole = first | drawn(lokr_w2=(5, 4, 3, 3))
    flat = first | drawn(lokr_w2_a=(5, 2), lokr_w2_b=(2, 36))
    core = first | drawn(lokr_w2_a=(2, 5), lokr_w2_b=(2, 4), lokr_t2=(2, 2, 3, 3))
    second = (flat["lokr_w2_a"].double() @ flat["lokr_w2_b"].double()).view(5, 4, 3, 3)
    for p, w2, ratio in (
        (whole, whole["lokr_w2"], 1.0),
        (flat, second, 1.5),
        (core, tucker(core["lokr_t2"], core["lokr_w2_a"], core["lokr_w2_b"]), 1.5),
    ):
        (change,) = read(module(p, 3.0)).values()
        wanted = kronecker(first["lokr_w1"], w2) * ratio
        torch.testing.assert_close(delta(change, 10, 12, 3, 3), wanted)


def test_full_updates_norms_and_biases_are_what_they_are() -> None:
    p = drawn(diff=(6, 4, 3, 3), diff_b=(6,))
    (change,) = read(module(p, 3.0)).values()  # an alpha that means nothing
    assert torch.equal(delta(change, 6, 4, 3, 3), p["diff"].double())
    assert torch.equal(change.bias, p["diff_b"]) and change.kind == "full"
    p = drawn(w_norm=(6,), b_norm=(6,))
    (change,) = read(module(p)).values()
    assert torch.equal(delta(change, 6), p["w_norm"].double())
    assert torch.equal(change.bias, p["b_norm"])
    for part in ("diff_b", "b_norm"):
        p = drawn(**{part: (6,)})
        (change,) = read(module(p)).values()
        assert torch.equal(change.bias, p[part]) and change.kind == "bias"
    p = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(6, 2)}
    (change,) = read(module(p | drawn(diff_b=(6,)), 1.0)).values()
    assert isinstance(change.weight, LowRank) and change.bias is not None


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2)}, "no hada_w2_b"),
        (
            {f"hada_w{i}_{x}": (2, n) for i in (1, 2) for x, n in (("a", 6), ("b", 4))}
            | {"hada_t1": (2, 2, 3, 3)},
            "no hada_t2",
        ),
        (
            {"hada_w1_a": (6, 2), "hada_w1_b": (3, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)},
            r"hada_w1_a.*\[6, 2\] and \[3, 4\]",
        ),
        (
            {"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)},
            r"\[6, 4\] and hada_w2 \[6, 5\]",
        ),
        ({"lokr_w1": (2, 3)}, "no lokr_w2"),
        (LOW1, "no lokr_w2"),
        (WHOLE2, "no lokr_w1"),
        (WHOLE1 | {"lokr_w2_a": (5, 2)}, "no lokr_w2_b"),
        (WHOLE1 | WHOLE2 | LOW2, "lokr_w2 or its factors, got both"),
        (WHOLE1 | {"lokr_w2_a": (5, 2), "lokr_w2_b": (3, 4)}, r"\[5, 2\] and \[3, 4\]"),
        (
            WHOLE1 | {"lokr_w2_a": (2, 5), "lokr_w2_b": (2, 4), "lokr_t2": (3, 2, 3, 3)},
            r"\[2, 5\] and \[2, 4\] and \[3, 2, 3, 3\]",
        ),
        ({"lokr_w1": (2, 3, 1), "lokr_w2": (5, 4)}, r"lokr_w1 \[n, m\], got \[2, 3, 1\]"),
        ({"lokr_w1": (2, 3), "lokr_w2": (5,)}, r"lokr_w2 \[n, m, ...\], got \[5\]"),
        ({"diff": (6, 4), "diff_b": (5,)}, r"diff_b: expected \[6\], got \[5\]"),
        ({"diff": ()}, "got one number"),
        ({"w_norm": (6,), "diff": (6,)}, "parts of a norm"),
        ({"diff": (6, 4), "lora_up.bias": (6,)}, "one algorithm"),
        (WHOLE1 | WHOLE2 | {"dora_scale": (1, 5)}, r"dora_scale.*got \[1, 5\]"),
    ],
)
def test_parts_that_are_missing_or_contradict_are_refused(
    shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(FormatError, match=f"{NAME}: .*{message}"):
        lycoris.unpack(module({part: torch.ones(shape) for part, shape in shapes.items()}), {})


LOHA = dict(hada_w1_a=(12, 2), hada_w1_b=(2, 4), hada_w2_a=(12, 2), hada_w2_b=(2, 4))
LOKR = dict(lokr_w1=(3, 2), lokr_w2=(4, 2))


@pytest.mark.parametrize("shapes", [LOHA, LOKR, dict(diff=(12, 4))], ids=["loha", "lokr", "full"])
def test_modules_of_a_fused_name_have_its_rows(shapes: dict[str, Any]) -> None:
    p = drawn(**shapes) | drawn(dora_scale=(12, 1), diff_b=(12,))
    tensors = module(p, 1.0, FUSED)
    whole = module(p, 1.0)
    changes = read(tensors)
    wanted = delta(read(whole)[QUERY], 12, 4)
    for i, target in enumerate(PARTS):
        rows = slice(4 * i, 4 * i + 4)
        assert torch.equal(delta(changes[target], 4, 4), wanted[rows])
        assert torch.equal(changes[target].bias, p["diff_b"][rows])
        assert torch.equal(changes[target].magnitude, p["dora_scale"][rows, 0])
        assert changes[target].rows == (4 * i, 4 * i + 4, 12)
    if "diff" not in p:  # LyCORIS has no DoRA of full updates
        written = lycoris.pack(changes, "flux").tensors
        assert written.keys() == tensors.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in written.items())


def test_full_updates_of_some_parts_are_joined_with_zeros() -> None:
    diff = torch.randn(4, 4)
    tensors = lycoris.pack({PARTS[1]: Change(Dense(diff), torch.ones(4))}, "flux").tensors
    zeros = torch.zeros(4, 4)
    assert torch.equal(tensors[f"{FUSED}.diff"], torch.cat([zeros, diff, zeros]))
    assert tensors[f"{FUSED}.diff_b"].tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 4


def loha(rows: tuple[int, int, int] | None = None) -> Change:
    """Of factors that no other one has."""
    return Change(hadamard(), torch.randn(2 if rows else 6), rows=rows)


@pytest.mark.parametrize(
    "case", ["trained", "lokr", "rows of one", "whole modules", "one alone", "kinds", "float64"]
)
def test_shares_that_are_no_longer_of_one_are_a_full_difference(case: str) -> None:
    """What training, or another program, makes of a fused module's parts."""
    lora = Change(LowRank(torch.randn(2, 4), torch.randn(6, 2), 1.0))
    rows = [(2 * i, 2 * i + 2, 6) for i in range(3)]
    changes = {
        "trained": dict(zip(PARTS, map(loha, rows), strict=True)),
        "lokr": {
            p: Change(Kronecker(w1=torch.randn(3, 2), w2=torch.randn(2, 2)), rows=r)
            for p, r in zip(PARTS, rows, strict=True)
        },
        "rows of one": {PARTS[0]: loha(rows[0])},
        "whole modules": {p: loha() for p in PARTS},
        "one alone": {PARTS[2]: loha()},
        "kinds": {PARTS[0]: lora, PARTS[1]: loha(), PARTS[2]: Change(Dense(torch.randn(6, 4)))},
        "float64": {PARTS[1]: Change(Dense(torch.randn(6, 4).double())), PARTS[0]: loha()},
    }[case]
    packed = lycoris.pack(changes, "flux")
    height = 6 if any(change.rows is None for change in changes.values()) else 2
    whole, bias = torch.zeros(3 * height, 4, dtype=torch.float64), torch.zeros(3 * height)
    for i, part in enumerate(PARTS):
        if (change := changes.get(part)) is not None:
            own = slice(i * height, (i + 1) * height)
            whole[own] = change.delta((height, 4), torch.float64)
            bias[own] = 0 if change.bias is None else change.bias
    diff = packed.tensors[f"{FUSED}.diff"]
    assert diff.dtype == (torch.float64 if case == "float64" else torch.float32)
    torch.testing.assert_close(diff.double(), whole, rtol=1e-6, atol=1e-6)
    if bias.any():
        assert torch.equal(packed.tensors[f"{FUSED}.diff_b"], bias)
    read_back = lycoris.unpack(packed.tensors, packed.metadata).changes
    for target, change in changes.items():
        found = read_back[target].delta((height, 4), torch.float64)
        wanted = change.delta((height, 4), torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_rows_of_a_fused_module_are_written_for_a_model_that_has_not_fused_it() -> None:
    change, alone = loha((2, 4, 6)), Target("", PARTS[1].path)
    tensors = lycoris.pack({alone: change}).tensors
    (key,) = (key for key in tensors if key.endswith(".diff"))
    wanted = change.delta((2, 4), torch.float64)
    torch.testing.assert_close(tensors[key].double(), wanted, rtol=1e-6, atol=1e-6)


# Writing


def same(change: Change, other: Change) -> bool:
    def equal(mine: Any, others: Any) -> bool:
        if isinstance(mine, Tensor) and isinstance(others, Tensor):
            return mine.dtype == others.dtype and torch.equal(mine, others)
        return type(mine) is type(others) and mine == others

    mine, others = vars(change).copy(), vars(other).copy()
    for fields in (mine, others):
        weight = fields.pop("weight")
        fields.update(kind=type(weight).__name__, keys=(), **(vars(weight) if weight else {}))
    return mine.keys() == others.keys() and all(equal(mine[key], others[key]) for key in mine)


def hadamard(**more: Any) -> Hadamard:
    a, b = torch.randn(2, 6, 2), torch.randn(2, 2, 4)
    return Hadamard(a[0], b[0], a[1], b[1], **{"alpha": 1.5, **more})


def updates() -> dict[str, Change]:
    low = {"w2_a": torch.randn(5, 2), "w2_b": torch.randn(2, 36)}
    core = {"w2_a": torch.randn(2, 5), "w2_b": torch.randn(2, 4), "t2": torch.randn(2, 2, 3, 3)}
    half = Kronecker(w1=torch.randn(2, 3).half(), w2=torch.randn(5, 4).half(), alpha=4.0)
    cores = Hadamard(
        *(torch.randn(2, n) for n in (6, 4, 6, 4)),
        alpha=2.0,
        t1=torch.randn(2, 2, 3, 3),
        t2=torch.randn(2, 2, 3, 3),
    )
    lora = LowRank(torch.randn(2, 4), torch.randn(6, 2), 1.0)
    return {
        "lora": Change(lora),
        "lora, bias": Change(lora, torch.randn(6)),
        "lora, dora": Change(lora, magnitude=torch.rand(4), axis="in"),
        "loha": Change(hadamard()),
        "loha, dora": Change(hadamard(), magnitude=torch.rand(6)),
        "loha, dora of inputs": Change(hadamard(), magnitude=torch.rand(4), axis="in"),
        "loha, cores": Change(cores, magnitude=torch.rand(6)),
        "lokr": Change(half, magnitude=torch.rand(10)),
        "lokr, low": Change(
            Kronecker(w1_a=torch.randn(2, 1), w1_b=torch.randn(1, 3), alpha=0.5, **low)
        ),
        "lokr, core": Change(Kronecker(w1=torch.randn(2, 3), alpha=0.5, **core)),
        "full": Change(Dense(torch.randn(6, 4)), torch.randn(6)),
        "norm": Change(Dense(torch.randn(6)), torch.randn(6)),
        "bias": Change(None, torch.randn(6)),
    }


@pytest.mark.parametrize("kind", updates(), ids=str)
def test_unpacking_what_was_packed_gives_the_same(kind: str) -> None:
    changes = {QUERY: updates()[kind], Target("text_encoder", "own", flat=True): updates()["full"]}
    packed = lycoris.pack(changes, "sd")
    assert packed.metadata["ss_network_module"] == "lycoris.kohya"
    found = lycoris.unpack(packed.tensors, packed.metadata)
    assert not found.unused and found.changes.keys() == changes.keys()
    assert all(same(found.changes[target], change) for target, change in changes.items())


def test_a_model_by_itself_has_lycoris_names() -> None:
    target = Target("", "down_blocks.0.resnets.0.conv1")
    own = Target("", "my_own_layer", flat=True)
    packed = lycoris.pack({target: updates()["full"], own: updates()["loha"]})
    names = {key.partition(".")[0] for key in packed.tensors}
    assert names == {"lycoris_down_blocks_0_resnets_0_conv1", "lycoris_my_own_layer"}
    assert list(lycoris.unpack(packed.tensors, packed.metadata).changes) == [target, own]


def test_a_magnitude_is_written_in_the_dimensions_of_the_weight() -> None:
    change = Change(hadamard(), magnitude=torch.rand(6))
    packed = lycoris.pack({QUERY: change, CONV: change}, "sd").tensors
    shapes = {key: list(t.shape) for key, t in packed.items() if key.endswith(".dora_scale")}
    assert list(shapes.values()) == [[6, 1], [6, 1, 1, 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({QUERY: Change(Shift(torch.ones(4)))}, "extract a LoRA"),
        ({QUERY: Change(hadamard(alpha=0.0))}, "alpha 0"),
        ({QUERY: Change(Dense(torch.ones(6, 4)), None, torch.ones(6))}, "to_q.*DoRA of factors"),
        ({QUERY: Change(Dense(torch.ones(6)), None, torch.ones(6))}, "to_q.*DoRA of factors"),
        ({QUERY: Change(None, torch.ones(6), torch.ones(6))}, "to_q.*DoRA of factors"),
        (
            {
                Target("unet", "down_blocks.0.attentions.0.proj_in"): Change(
                    hadamard(), magnitude=torch.ones(6)
                )
            },
            "proj_in.*whether its weight is a matrix",
        ),
        ({Target("", "a.b"): Change(hadamard(), magnitude=torch.ones(6))}, "a.b.*is a matrix"),
        (
            {QUERY: Change(hadamard(), magnitude=torch.ones(2), rows=(0, 2, 6))},
            "to_q.*DoRA of factors.*fold",
        ),
        (
            {
                p: Change(hadamard(), magnitude=torch.ones(2), rows=(2 * i, 2 * i + 2, 6))
                for i, p in enumerate(PARTS)
            },
            "to_q.*DoRA of factors.*fold",
        ),
        (
            {PARTS[0]: Change(Dense(torch.ones(4, 4))), PARTS[1]: Change(Dense(torch.ones(4, 5)))},
            r"same inputs of.*to_q.*\[4\], \[5\]",
        ),
    ],
)
def test_what_such_a_file_cannot_have_is_refused_with_the_way_out(
    changes: dict[Target, Change], message: str
) -> None:
    family = "flux" if any(target.component == "transformer" for target in changes) else "sd"
    with pytest.raises(FormatError, match=message):
        lycoris.pack(changes, family)
