"""sampler_step: one row of a solver's table, guidance to next model input, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _philox
from ._define import define_op

COLUMNS = ("k_x", "k_e", "c_x", "c_0", "c_e", "c_h", "c_n", "g_x", "g_0", "g_e", "m", "clip")
MAX_OUTPUTS = 16
_LOW = (torch.float32, torch.float16, torch.bfloat16)

Outputs = tuple[Tensor, Tensor, Tensor]


def sampler_step(
    x: Tensor,  # [B, ...] float32 | float64
    outputs: list[Tensor],  # n of [B, ...], float32 | float16 | bfloat16, or x's dtype
    weights: Tensor,  # [S | 1, n, B | 1] float32 | x's dtype
    table: Tensor,  # [S, 12] float32 | x's dtype, columns in the order of COLUMNS
    step: Tensor,  # [] int64, the row, read where the data is
    history: Tensor | None,  # [B, ...] x's dtype
    seeds: Tensor | None,  # [B] int64; None: no noise
    copies: int,
    input_dtype: torch.dtype,
) -> Outputs:
    """`x' = c_x x + c_0 x0 + c_e e + c_h h + c_n z`, `h' = g_x x + g_0 x0 + g_e e`, model input `m x'`.

    `e = sum_j w_j e_j` (guidance), `x0 = clip(k_x x + k_e e)`; z is standard normal noise, a function of
    (seed, step, element) alone (`_philox.py`). All arithmetic is in x's dtype.

    Returns x' [B, ...] and h' [B, ...] ([0] without history) in x's dtype, and the model input
    [copies * B, ...], tiled, in `input_dtype`. A step outside 0..S-1 raises on the CPU and gives NaN on CUDA.
    """
    column = dict(zip(COLUMNS, table.index_select(0, step.view(1))[0].to(x.dtype), strict=True))
    e, x0 = _guided(x, outputs, weights, table, step)
    x0 = x0.clamp(-column["clip"], column["clip"])
    x_next = column["c_x"] * x + column["c_0"] * x0 + column["c_e"] * e
    history_next = x.new_empty(0)
    if history is not None:
        x_next = x_next + column["c_h"] * history
        history_next = column["g_x"] * x + column["g_0"] * x0 + column["g_e"] * e
    if seeds is not None:
        z = _philox.normal(seeds, step, x[:1].numel(), x.dtype)
        x_next = x_next + column["c_n"] * z.view(x.shape)
    model_input = (column["m"] * x_next).to(input_dtype)
    return x_next, history_next, model_input.repeat(copies, *[1] * (x.ndim - 1))


def _guided(
    x: Tensor, outputs: list[Tensor], weights: Tensor, table: Tensor, step: Tensor
) -> tuple[Tensor, Tensor]:
    """e and the unclipped x0, both [B, ...]."""
    w = _weights(x, weights, step)
    e = sum((w_j * e_j.to(x.dtype) for w_j, e_j in zip(w, outputs, strict=True)), x.new_zeros(()))
    k_x, k_e = table.index_select(0, step.view(1))[0, :2].to(x.dtype)
    return e, k_x * x + k_e * e


def _weights(x: Tensor, weights: Tensor, step: Tensor) -> Tensor:
    """This step's weights [n, B | 1, 1, ...] in x's dtype."""
    row = step.view(1) if len(weights) > 1 else torch.zeros_like(step).view(1)
    w = weights.index_select(0, row)[0].to(x.dtype)
    return w.view(*w.shape, *[1] * (x.ndim - 1))


def _expect(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        if isinstance(got, Tensor):
            got = f"{str(got.dtype).removeprefix('torch.')} {list(got.shape)}"
        raise ValueError(f"sampler_step: {argument}: expected {expected}, got {got}")
