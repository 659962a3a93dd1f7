"""Cases shared by the operators' tests and benchmarks."""

from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

# (leading shape of x, in, out, rank): 0, 1 and odd sizes, around the limits of tiles and vectors
LINEAR_SHAPES = [
    ((1,), 1, 1, 1),
    ((3,), 7, 5, 2),
    ((0,), 4, 3, 2),
    ((2, 0), 4, 3, 2),
    ((2, 3), 8, 8, 4),
    ((2, 5), 33, 17, 3),
    ((2, 65), 129, 151, 5),
    ((2, 3, 4), 40, 24, 16),
    ((4,), 16, 16, 33),
]


def identify(value: Any) -> str:
    """Readable test ids."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value).replace(" ", "")


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def linear_arguments(
    lead: tuple[int, ...],
    features: int,
    out: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    rows: bool = False,
    bias: bool = True,
    scale: bool = False,
) -> list[Any]:
    """x, weight, bias, down, up, gate, row_scale of `lora_linear`."""
    gate_shape = (lead[0], rank) if rows else (rank,)
    return [
        randn(*lead, features, dtype=dtype, seed=1),
        randn(out, features, dtype=dtype, seed=2) / max(features, 1) ** 0.5,
        randn(out, dtype=dtype, seed=3) if bias else None,
        randn(rank, features, dtype=dtype, seed=4) / max(features, 1) ** 0.5,
        randn(out, rank, dtype=dtype, seed=5),
        randn(*gate_shape, dtype=wide(dtype), seed=6),
        randn(out, dtype=dtype, seed=7) if scale else None,
    ]


# (out, in, rank): 0, 1, odd sizes, more than one task and strip of the packed operands
FOLD_SHAPES = [
    (1, 1, 1),
    (0, 5, 2),
    (5, 0, 2),
    (3, 7, 0),
    (8, 32, 16),
    (17, 33, 3),
    (49, 31, 5),
    (151, 129, 33),
    (100, 2065, 40),
    (9, 11, 1024),
]


def fold_layer(
    out: int,
    features: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    factors: torch.dtype | None = None,
) -> list[Tensor]:
    """weight, down, up, gate, out of one layer of `fold`."""
    factors = factors or dtype
    return [
        randn(out, features, dtype=dtype, seed=1),
        randn(rank, features, dtype=factors, seed=2) / max(rank, 1) ** 0.5,
        randn(out, rank, dtype=factors, seed=3),
        randn(rank, dtype=wide(dtype), seed=4),
        torch.full((out, features), float("nan"), dtype=dtype),
    ]


def widened(args: list[Any]) -> list[Any]:
    """The same arguments in float64: what the oracle is given."""
    return [
        [t.double() for t in a]
        if isinstance(a, list)
        else a.double()
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in args
    ]


def strided(t: Tensor) -> Tensor:
    """The same values, in memory that is neither contiguous nor aligned."""
    wider = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1] + 1))
    view = wider[..., 1::2]
    view.copy_(t)
    return view


def assert_twofold(ours: Tensor, exact: Tensor, low: Tensor) -> None:
    """The error is at most twice that of the same PyTorch expression in the same dtype; where that
    is closer than one rounding of the largest value, twice that rounding. Errors are root mean
    squares: the largest of a few is a matter of luck, and one wrong element still shows.

    In float64 the oracle rounds as well: a few roundings of the largest value are allowed.
    """
    assert ours.shape == exact.shape
    if not exact.numel():
        return
    assert not ours.isnan().any()
    error = (ours.double() - exact).square().mean().sqrt().item()
    theirs = (low.double() - exact).square().mean().sqrt().item()
    rounding = torch.finfo(ours.dtype).eps / 2 * exact.abs().max().item()
    if ours.dtype == torch.float64:
        rounding *= 8
    assert error <= 2 * max(theirs, rounding), f"{error:.3g} > 2 max({theirs:.3g}, {rounding:.3g})"
