"""`lora_add_`: the low-rank part alone, added in place to what another kernel computed."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora.ops._define import define_op, expect, expect_tensor, gate_dtype, kernels
from fastlora.ops._device import device_type, kernels_of
from fastlora.ops._routes import (
    EXTENDED,
    TILED,
    TINY_CUDA,
    accumulate,
    gpu_of,
    on_tensor_cores,
    pass_is_faster,
)
from fastlora.ops.lora_linear import _rows, check_low_rank

# Up to this many multiplications the loop beats the library calls (each about 2 µs).
TINY = 1 << 15


def lora_add_(
    y: Tensor,  # [..., out], changed in place
    x: Tensor,  # [..., in]; without down: [..., rank]
    down: Tensor | None,  # [rank, in]
    up: Tensor,  # [out, rank]
    gate: Tensor,  # [rank] or [batch, rank], batch = x.shape[0]
) -> None:
    """`y += ((x Dᵀ) ∘ g) Uᵀ`, for bases that are not plain linear layers.

    Without `down`, x is already the rank-r activation (a convolution's, an embedding's). Dtypes and
    errors as in `lora_linear`; y has x's dtype and leading dimensions. y's version counter rises.
    Where a gradient is needed, torch differentiates the reference.
    """
    wide = gate_dtype(x.dtype)
    h = x if down is None else x @ down.to(x.dtype).t()
    h = (h.to(wide) * _rows(gate, x)).to(x.dtype)
    y.add_(h @ up.to(x.dtype).t())


def _fake(y: Tensor, x: Tensor, down: Tensor | None, up: Tensor, gate: Tensor) -> None:
    op = "lora_add_"
    expect_tensor(op, "y", y)
    expect_tensor(op, "x", x)
    expect(y.dim() >= 1, op, "y", "[..., out]", y)
    check_low_rank(op, x, down, up, gate, y.shape[-1])
    expect(y.dtype == x.dtype, op, "y", str(x.dtype), y)
    expect(y.shape[:-1] == x.shape[:-1], op, "y", f"{list(x.shape[:-1])} + [out]", y)


def _plan(y: Tensor, x: Tensor, down: Tensor | None, up: Tensor, gate: Tensor) -> Any:
    out, rank = up.shape
    tokens, features = y.numel() // max(out, 1), x.shape[-1]
    work = tokens * rank * (out + (0 if down is None else features))
    plain = all(
        t is None or (t.is_contiguous() and (t is gate or t.dtype == x.dtype))
        for t in (y, x, down, up, gate)
    )
    device = device_type(x)
    if plain and work <= TINY and rank <= 1024 and features <= 4096 and device == "cpu":
        return lambda *operands: kernels.lora_add_(*operands, None)
    if device == "cuda" and x.dtype != torch.float64 and rows_of_a_matrix(y) and tokens > 0:
        form = chosen_form(x, down, up, tokens, work <= TINY_CUDA)
        if form is not None:
            return partial(_kernel, form=form)
    if y.dim() >= 3 and not y.is_contiguous() and y.movedim(-1, 1).is_contiguous():
        return _channels_first
    if pass_is_faster(y, tokens, 0 if down is None else features, out, rank):
        return partial(_products, by_pass=True)
    return _products


def rows_of_a_matrix(y: Tensor) -> bool:
    """Whether the leading dimensions of y are one, and a row's elements neighbours in memory."""
    shape, strides = y.shape, y.stride()
    leading = [d for d in range(y.dim() - 1) if shape[d] > 1]
    together = all(
        strides[a] == strides[b] * shape[b] for a, b in zip(leading, leading[1:], strict=False)
    )
    return together and (strides[-1] == 1 or shape[-1] == 1)


def chosen_form(x: Tensor, down: Tensor | None, up: Tensor, tokens: int, tiny: bool) -> int | None:
    """The kernels that csrc/heuristics.h predicts to be fastest; None: the library's products."""
    if not on_tensor_cores(x, up, *(() if down is None else (down,))):
        return TILED if tiny else None
    (out, rank), features = up.shape, 0 if down is None else x.shape[-1]
    capability, multiprocessors = gpu_of(x)
    products, kernel = kernels.predict_lora_add(
        tokens, features, out, rank, capability, multiprocessors
    )
    return EXTENDED if kernel <= products else None


def _kernel(
    y: Tensor, x: Tensor, down: Tensor | None, up: Tensor, gate: Tensor, form: int = TILED
) -> None:
    x2 = x.reshape(-1, x.shape[-1])
    h = x.new_empty(x2.shape[0], up.shape[1])
    if down is not None:
        down = down.to(x.dtype)
    kernels_of(x).lora_add_(y.view(-1, y.shape[-1]), x2, down, up.to(x.dtype), gate, h, form)


def _products(
    y: Tensor, x: Tensor, down: Tensor | None, up: Tensor, gate: Tensor, by_pass: bool = False
) -> None:
    x2 = x.reshape(-1, x.shape[-1])
    matrix = y.reshape(-1, y.shape[-1]).contiguous()  # y itself where it is contiguous
    accumulate(matrix, x2, down, up, gate, by_pass)
    if not y.is_contiguous():
        y.copy_(matrix.view(y.shape))


def _channels_first(y: Tensor, x: Tensor, down: Any, up: Tensor, gate: Tensor) -> None:
    """y is a convolution's output [batch, out, height, width], seen with its channels last."""
    y3, h = (t.movedim(-1, 1).flatten(2) for t in (y, x))  # [batch, out | in, positions]
    batch = y3.shape[0]
    if down is not None:
        h = torch.matmul(down.to(y.dtype), h)  # [batch, rank, positions]
    h = (h * gate[..., None]).to(y.dtype)
    y3.baddbmm_(up.to(y.dtype).expand(batch, *up.shape), h)


lora_add_ = define_op(lora_add_, fake=_fake, plan=_plan, mutates=("y",), autocast=("x",))
