"""Sums and low-rank approximations of changes, against dense float64 arithmetic and PEFT."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastlora.formats.changes import (
    Change,
    Dense,
    Hadamard,
    Kronecker,
    LowRank,
    Shift,
    Target,
)
from fastlora.formats.combining import concatenate, times
from fastlora.formats.compressing import compress
from fastlora.formats.files import FormatError
from fastlora.formats.measures import norm, shape_of

AT = Target("unet", "mid_block.attentions.0.proj_in")
CONVOLUTION = Target("unet", "mid_block.resnets.0.conv1")
r = torch.randn


def parts(kind: str, rank: int = 3) -> LowRank | Hadamard | Kronecker | Dense:
    """Weights [24, 20]; of convolutions [24, 20, 3, 3]; of an embedding [50, 12]."""
    makers = {
        "lora": lambda: LowRank(r(rank, 20), r(24, rank), 2.0),
        "rank stabilised": lambda: LowRank(r(rank, 20), r(24, rank), 2.0, rank_stabilized=True),
        "convolution": lambda: LowRank(r(rank, 20, 3, 3), r(24, rank, 1, 1), 5.0),
        "groups": lambda: LowRank(r(2 * rank, 10, 3, 3), r(24, rank, 1, 1), 5.0),
        "tucker": lambda: LowRank(
            r(rank, 20, 1, 1), r(24, rank, 1, 1), 2.0, mid=r(rank, rank, 3, 3)
        ),
        "embedding": lambda: LowRank(r(rank, 50), r(12, rank), 1.0, embedding=True),
        "loha": lambda: Hadamard(r(24, rank), r(rank, 20), r(24, rank), r(rank, 20), 1.5),
        "loha of a convolution": lambda: Hadamard(
            r(24, rank), r(rank, 180), r(24, rank), r(rank, 180), 1.5
        ),
        "loha, tucker": lambda: Hadamard(
            *(r(rank, 24), r(rank, 20), r(rank, 24), r(rank, 20), 1.5),
            *(r(rank, rank, 3, 3), r(rank, rank, 3, 3)),
        ),
        "lokr": lambda: Kronecker(r(4, 5), w2=r(6, 4)),
        "lokr of factors": lambda: Kronecker(
            w1_a=r(4, 2), w1_b=r(2, 5), w2_a=r(6, rank), w2_b=r(rank, 4), alpha=-2.0
        ),
        "lokr, tucker": lambda: Kronecker(
            r(4, 5), w2_a=r(rank, 6), w2_b=r(rank, 4), t2=r(rank, rank, 3, 3), alpha=2.0
        ),
        "full": lambda: Dense(r(24, 20)),
    }
    return makers[kind]()


LINEAR = ("lora", "rank stabilised", "loha", "lokr", "lokr of factors", "full")
SPATIAL = ("convolution", "tucker", "loha of a convolution", "loha, tucker", "lokr, tucker")
ALL = (*LINEAR, *SPATIAL, "groups", "embedding")


def dense(change: Change, shape: tuple[int, ...]) -> Tensor:
    """ΔW in float64."""
    return change.delta(shape, torch.float64)


def weight_shape(kind: str) -> tuple[int, ...]:
    if kind == "groups":
        return (24, 10, 3, 3)
    return (50, 12) if kind == "embedding" else (24, 20, 3, 3) if kind in SPATIAL else (24, 20)


def same(got: Tensor, expected: Tensor, relative: float = 1e-6) -> bool:
    return float((got - expected).norm()) <= relative * float(expected.norm())


def in_dtype(
    weight: LowRank | Hadamard | Kronecker | Dense, dtype: torch.dtype
) -> LowRank | Hadamard | Kronecker | Dense:
    fields = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in vars(weight).items()}
    return type(weight)(**fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lora", "rank stabilised", "convolution", "groups", "embedding"])
def test_ranks_are_put_beside_each_other(kind, dtype):
    files = [{AT: Change(in_dtype(parts(kind, rank), dtype))} for rank in (3, 1, 4)]
    strengths = [0.8, -0.5, 1.7]
    (found,) = concatenate(files, strengths).values()
    shape = weight_shape(kind)
    expected = sum(s * dense(f[AT], shape) for f, s in zip(files, strengths, strict=True))
    assert isinstance(found.weight, LowRank)
    assert found.weight.rank == 8 * (2 if kind == "groups" else 1)
    assert found.weight.down.dtype == found.weight.up.dtype == torch.float32
    assert same(dense(found, shape), expected)


@pytest.mark.parametrize("other", LINEAR)
@pytest.mark.parametrize("one", LINEAR)
def test_any_two_linear_changes_are_added(one, other):
    files = [{AT: Change(parts(one))}, {AT: Change(parts(other))}]
    (found,) = concatenate(files, [0.3, -2.0]).values()
    expected = 0.3 * dense(files[0][AT], (24, 20)) - 2.0 * dense(files[1][AT], (24, 20))
    assert same(dense(found, (24, 20)), expected)
    low_rank = {"lora", "rank stabilised", "loha"}  # the last one of rank 9
    assert isinstance(found.weight, LowRank) == ({one, other} <= low_rank)


@pytest.mark.parametrize("other", SPATIAL)
@pytest.mark.parametrize("one", SPATIAL)
def test_any_two_convolutions_are_added_in_the_weights_shape(one, other):
    shape = (24, 20, 3, 3)
    files = [{CONVOLUTION: Change(parts(one))}, {CONVOLUTION: Change(parts(other))}]
    (found,) = concatenate(files, [0.3, -2.0]).values()
    expected = 0.3 * dense(files[0][CONVOLUTION], shape) - 2.0 * dense(files[1][CONVOLUTION], shape)
    assert shape_of(found) == shape
    assert same(dense(found, shape), expected)


@pytest.mark.parametrize("strength", [0.7, -3.0])
@pytest.mark.parametrize("kind", ALL)
def test_a_change_of_one_file_keeps_its_form(kind, strength):
    change = Change(parts(kind), bias=r(24))
    (found,) = concatenate([{AT: change}, {}], [strength, 1.0]).values()
    shape = weight_shape(kind)
    assert type(found.weight) is type(change.weight)
    assert same(dense(found, shape), strength * dense(change, shape))
    assert torch.allclose(found.bias, strength * change.bias)


@pytest.mark.parametrize("kind", ["lora", "tucker", "loha", "lokr of factors"])
def test_a_strength_goes_into_alpha_where_there_is_one(kind):
    weight = in_dtype(parts(kind), torch.float16)
    (found,) = concatenate([{AT: Change(weight)}], [0.7]).values()
    for name, tensor in weight.tensors().items():
        assert getattr(found.weight, name) is tensor


def test_nothing_is_rounded_where_alpha_can_have_the_factor():
    """Of float16: equal factors, and those whose quotients are powers of two."""
    one = LowRank(r(4, 20).half(), r(24, 4).half(), 2.0)
    other = LowRank(r(2, 20).half(), r(24, 2).half(), 1.0)
    for strengths, quotient in (([0.7, 0.7], 1.0), ([0.7, -0.35], -0.5)):
        (found,) = concatenate([{AT: Change(one)}, {AT: Change(other)}], strengths).values()
        assert found.weight.up.dtype == found.weight.down.dtype == torch.float16
        assert torch.equal(found.weight.up, torch.cat([one.up, other.up * quotient], 1))
        assert torch.equal(found.weight.down, torch.cat([one.down, other.down]))
        assert found.weight.ratio == pytest.approx(0.35)


def test_times_leaves_the_dtype_only_where_something_would_be_lost():
    half = torch.tensor([1.5, 6e-8], dtype=torch.float16)  # the second is the smallest there is
    assert times(half, 1.0) is half
    assert times(half, 2.0).dtype == torch.float16
    assert times(half, 0.5).dtype == torch.float32
    assert times(half[:1], 0.5).dtype == torch.float16
    assert times(half, 60000.0).dtype == torch.float32
    assert times(torch.ones(1, dtype=torch.float64), 0.1).dtype == torch.float64


def test_rows_of_fused_modules():
    """Equal rows stay rows; others are cut out before they are added."""
    fused, own = LowRank(r(3, 20), r(72, 3)), LowRank(r(2, 20), r(24, 2))
    query = Change(fused, rows=(24, 48, 72))
    (found,) = concatenate([{AT: query}, {AT: Change(own)}], [0.5, 0.3]).values()
    expected = 0.5 * dense(query, (24, 20)) + 0.3 * dense(Change(own), (24, 20))
    assert found.rows is None and same(dense(found, (24, 20)), expected)
    (found,) = concatenate([{AT: query}, {AT: query}], [0.5, 0.3]).values()
    assert found.rows == (24, 48, 72)
    assert same(dense(found, (24, 20)), 0.8 * dense(query, (24, 20)))


def test_biases_are_added_also_beside_modules_without():
    weight, bias, more = LowRank(r(3, 20), r(24, 3)), r(24), r(24)
    files = [{AT: Change(weight, bias)}, {AT: Change(None, more)}, {AT: Change(weight)}]
    (found,) = concatenate(files, [0.5, 2.0, 1.0]).values()
    assert torch.allclose(found.bias, 0.5 * bias + 2.0 * more)
    assert same(dense(found, (24, 20)), 1.5 * dense(Change(weight), (24, 20)))


def test_flat_names_meet_those_with_dots():
    flat = Target("unet", "mid_block_attentions_0_proj_in", flat=True)
    change = Change(LowRank(r(3, 20), r(24, 3)))
    assert list(concatenate([{flat: change}, {AT: change}], [1.0, 1.0])) == [AT]
    assert list(concatenate([{flat: change}, {flat: change}], [1.0, 1.0])) == [flat]


def test_dora_alone_has_a_strength():
    change = Change(LowRank(r(3, 20), r(24, 3), 2.0), magnitude=torch.rand(24) + 1)
    (found,) = concatenate([{AT: change}], [0.6]).values()
    weight = r(24, 20, dtype=torch.float64)
    assert torch.allclose(found.changed(weight), change.changed(weight, 0.6))


def test_what_needs_the_model_is_refused_by_name():
    plain = Change(LowRank(r(3, 20), r(24, 3)))
    dora = Change(LowRank(r(3, 20), r(24, 3)), magnitude=torch.ones(24))
    with pytest.raises(FormatError, match=r"unet\.mid_block.*DoRA.*without the model"):
        concatenate([{AT: plain}, {AT: dora}], [1.0, 1.0])
    with pytest.raises(FormatError, match=r"unet\.mid_block.*spectral shifts"):
        concatenate([{AT: Change(Shift(r(20)))}] * 2, [1.0, 1.0])


def test_what_cannot_be_meant_is_refused():
    one, other = Change(LowRank(r(3, 20), r(24, 3))), Change(LowRank(r(3, 30), r(24, 3)))
    with pytest.raises(FormatError, match=r"unet\.mid_block.*\[24, 20\] and \[24, 30\]"):
        concatenate([{AT: one}, {AT: other}], [1.0, 1.0])
    for strength in (0.0, math.nan, math.inf):
        with pytest.raises(FormatError, match="strength"):
            concatenate([{AT: one}], [strength])
    with pytest.raises(FormatError, match="--component"):
        concatenate([{AT: one}, {AT._replace(component=""): one}], [1.0, 1.0])


def test_an_alpha_of_zero_adds_nothing():
    change, zero = Change(LowRank(r(3, 20), r(24, 3))), Change(LowRank(r(1, 20), r(24, 1), 0.0))
    (found,) = concatenate([{AT: zero}, {AT: change}], [0.5, 0.5]).values()
    assert same(dense(found, (24, 20)), 0.5 * dense(change, (24, 20)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [k for k in ALL if k != "groups"])
def test_a_truncated_decomposition_is_the_best_one_and_says_what_it_lost(kind, dtype):
    """Eckart and Young: no matrix of this rank is nearer than the rest of the singular values."""
    change = Change(in_dtype(parts(kind, rank=5), dtype))
    shape = weight_shape(kind)
    whole = dense(change, shape).flatten(1)
    found = compress(change, 2, kernel=shape[2:])
    made = dense(Change(found.weight), shape).flatten(1)
    best = float(torch.linalg.svdvals(whole)[2:].norm() / whole.norm())
    error = float((whole - made).norm() / whole.norm())
    assert found.weight.rank == 2 and found.weight.down.dtype == dtype
    assert error == pytest.approx(best, rel=1e-5)
    assert found.error == pytest.approx(error, rel=1e-5)
    assert found.norm == pytest.approx(float(whole.norm()), rel=1e-5)
    assert shape_of(Change(found.weight)) == shape


def test_the_error_has_the_rounding_in_it():
    change = Change(Dense(r(24, 20)))
    found = compress(change, 20, torch.bfloat16)
    whole = dense(change, (24, 20))
    error = float((whole - dense(Change(found.weight), (24, 20))).norm() / whole.norm())
    assert error > 1e-3 and found.error == pytest.approx(error, rel=1e-3)


def test_large_products_are_decomposed_without_the_matrix():
    """A matrix of these sizes would have 40 GB."""
    n = 100_000
    lora = Change(LowRank(r(4, n), r(n, 4)))
    lokr = Change(Kronecker(r(250, 200), w2=r(400, 500)))
    loha = Change(Hadamard(r(n, 2), r(2, n), r(n, 2), r(2, n)))
    for change in (lora, lokr, loha):
        found = compress(change, 2)
        assert found.weight.up.shape == (n, 2) and found.weight.down.shape == (2, n)
        assert found.norm == pytest.approx(norm_of_factors(change), rel=1e-4)
        assert 0 < found.error < 1


def norm_of_factors(change: Change) -> float:
    weight = change.weight
    if isinstance(weight, Kronecker):
        return float(weight.w1.norm() * weight.w2.norm())
    if isinstance(weight, LowRank):
        return float(torch.linalg.qr(weight.up)[1].mm(torch.linalg.qr(weight.down.T)[1].T).norm())
    up = (weight.w1_a[:, :, None] * weight.w2_a[:, None]).flatten(1)
    down = (weight.w1_b[:, None] * weight.w2_b[None]).flatten(0, 1)
    return float(torch.linalg.qr(up)[1].mm(torch.linalg.qr(down.T)[1].T).norm())


def test_a_lora_of_small_enough_rank_stays_as_it_is():
    weight = LowRank(r(3, 20).half(), r(24, 3).half(), 2.0)
    found = compress(Change(weight), 3)
    assert found.weight is weight and found.error == 0
    assert found.norm == pytest.approx(float(dense(Change(weight), (24, 20)).norm()), rel=1e-3)


def test_an_update_of_zero_has_no_error():
    assert compress(Change(Dense(torch.zeros(6, 5))), 2).error == 0


@pytest.mark.parametrize(
    "change",
    [Change(Shift(torch.ones(4))), Change(None, torch.ones(4)), Change(Dense(torch.ones(4)))],
    ids=["shift", "bias", "vector"],
)
def test_what_has_no_low_rank_form(change):
    with pytest.raises(FormatError, match="no low-rank form"):
        compress(change, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ALL)
def test_norms_are_those_of_the_dense_update(kind, dtype):
    change = Change(in_dtype(parts(kind), dtype))
    assert norm(change) == pytest.approx(float(dense(change, weight_shape(kind)).norm()), rel=1e-5)


def test_norms_of_rows_of_shifts_and_of_biases():
    fused = Change(LowRank(r(3, 20), r(72, 3)), rows=(24, 48, 72))
    assert norm(fused) == pytest.approx(float(dense(fused, (24, 20)).norm()), rel=1e-5)
    u, s, v = torch.linalg.svd(r(24, 20), full_matrices=False)
    shift = r(20) * s.min() / 10
    assert norm(Change(Shift(shift))) == pytest.approx(float((u * shift @ v).norm()), rel=1e-5)
    assert norm(Change(None, r(24))) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_against_peft(combination):
    """PEFT's add_weighted_adapter of the same two adapters: the sum, and its truncation."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(20, 24)),
        peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"]),
        "one",
    )
    model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    layer = model.base_model.model[0]
    for name in ("one", "other"):
        nn.init.normal_(layer.lora_B[name].weight)
    extra = {"svd_rank": 3} if combination == "svd" else {}
    model.add_weighted_adapter(["one", "other"], [0.8, 0.5], "sum", combination, **extra)
    files = [
        {AT: Change(LowRank(layer.lora_A[n].weight.data, layer.lora_B[n].weight.data, alpha))}
        for n, alpha in (("one", 2.0), ("other", 6.0))
    ]
    (found,) = concatenate(files, [0.8, 0.5]).values()
    if combination == "svd":
        found = Change(compress(found, 3).weight)
    assert same(dense(found, (24, 20)), layer.get_delta_weight("sum").detach().double(), 1e-5)
