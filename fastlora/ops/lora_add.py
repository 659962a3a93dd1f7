"""`lora_add_`: the low-rank part alone, added in place to what another kernel computed."""

from typing import Any

from torch import Tensor

from fastlora.ops._define import define_op, expect, expect_tensor, gate_dtype, kernels
from fastlora.ops.lora_linear import TINY, TINY_CUDA, _rows, accumulate, check_low_rank


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
    if plain and work <= TINY and rank <= 1024 and features <= 4096 and x.device.type == "cpu":
        return lambda *operands: kernels.lora_add_(*operands, None)
    if work <= TINY_CUDA and x.is_cuda and y.is_contiguous():
        return _kernel
    return _products


def _kernel(y: Tensor, x: Tensor, down: Tensor | None, up: Tensor, gate: Tensor) -> None:
    x2 = x.reshape(-1, x.shape[-1])
    h = x.new_empty(x2.shape[0], up.shape[1])
    if down is not None:
        down = down.to(x.dtype)
    kernels.lora_add_(y.view(-1, y.shape[-1]), x2, down, up.to(x.dtype), gate, h)


def _products(y: Tensor, x: Tensor, down: Tensor | None, up: Tensor, gate: Tensor) -> None:
    if y.is_contiguous():
        accumulate(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), down, up, gate)
    else:  # a view such as a convolution's output with its channels last
        copy = y.reshape(-1, y.shape[-1])
        accumulate(copy, x.reshape(-1, x.shape[-1]), down, up, gate)
        if copy.data_ptr() != y.data_ptr():
            y.copy_(copy.view(y.shape))


lora_add_ = define_op(lora_add_, fake=_fake, plan=_plan, mutates=("y",), autocast=("x",))
