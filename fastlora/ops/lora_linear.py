"""`lora_linear`: a linear layer with any number of gated low-rank adapters, unmerged."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastlora.ops._define import FLOATS, define_op, expect, expect_tensor, gate_dtype
from fastlora.ops._routes import chosen


def lora_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    down: Tensor,  # [rank, in]
    up: Tensor,  # [out, rank]
    gate: Tensor,  # [rank] or [batch, rank], batch = x.shape[0]
    row_scale: Tensor | None = None,  # [out]
) -> Tensor:  # [..., out]
    """`y = m ∘ (x Wᵀ + ((x Dᵀ) ∘ g) Uᵀ) + b`: D is `down`, U `up`, g `gate`, m `row_scale`.

    x, weight, bias and the result share one dtype: float32, float16, bfloat16 or float64. `down`,
    `up` and `row_scale` have it too, or float32 (trainable adapters on a low-precision base); the
    gate is float32 (float64 beside float64). A gate of `[batch, rank]` holds one row for each
    leading index of x. Accumulation in float32. Raises ContractError (a ValueError) naming
    argument, expected, got.

    LoRA: Hu et al. 2021, arXiv 2106.09685; the row scale is DoRA's, arXiv 2402.09353.
    """
    wide = gate_dtype(x.dtype)
    h = F.linear(x, down.to(x.dtype)).to(wide)  # [..., rank]
    y = F.linear(x, weight) + F.linear(
        (h * _rows(gate, x)).to(x.dtype), up.to(x.dtype)
    )  # [..., out]
    if row_scale is not None:
        y = (y.to(wide) * row_scale.to(wide)).to(x.dtype)
    return y if bias is None else y + bias


def _rows(gate: Tensor, x: Tensor) -> Tensor:
    """The gate, broadcastable over the tokens between x's first and last dimension."""
    if gate.dim() == 1:
        return gate
    return gate.view(gate.shape[0], *([1] * (x.dim() - 2)), gate.shape[1])


def check_low_rank(
    op: str, x: Tensor, down: Tensor | None, up: Tensor, gate: Tensor, out: int
) -> None:
    """The contract of x, down, up and gate; `out` is what up must have as rows."""
    for name, value in (("x", x), ("up", up), ("gate", gate)):
        expect_tensor(op, name, value)
    expect_tensor(op, "down", down, optional=True)
    expect(x.dtype in FLOATS, op, "x", "float32, float16, bfloat16 or float64", x)
    expect(x.dim() >= 1, op, "x", "at least one dimension [..., in]", x)
    wide = gate_dtype(x.dtype)
    features = x.shape[-1]
    rank = features if down is None else down.shape[0] if down.dim() == 2 else -1
    if down is not None:
        expect(
            down.dim() == 2 and down.shape[1] == features, op, "down", f"[rank, {features}]", down
        )
        expect(down.dtype in (x.dtype, wide), op, "down", f"{x.dtype} or {wide}", down)
    expect(up.dim() == 2 and tuple(up.shape) == (out, rank), op, "up", f"[{out}, {rank}]", up)
    expect(up.dtype in (x.dtype, wide), op, "up", f"{x.dtype} or {wide}", up)
    expect(gate.dtype == wide, op, "gate", str(wide), gate)
    if gate.dim() == 2:
        expect(x.dim() >= 2, op, "gate", f"[{rank}] for an x without a batch dimension", gate)
        expect(tuple(gate.shape) == (x.shape[0], rank), op, "gate", f"[{x.shape[0]}, {rank}]", gate)
    else:
        expect(tuple(gate.shape) == (rank,), op, "gate", f"[{rank}] or [batch, {rank}]", gate)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    gate: Tensor,
    row_scale: Tensor | None = None,
) -> Tensor:
    op = "lora_linear"
    expect_tensor(op, "x", x)
    expect_tensor(op, "weight", weight)
    expect_tensor(op, "down", down)
    expect(weight.dim() == 2, op, "weight", "[out, in]", weight)
    out, features = weight.shape
    expect(x.dim() >= 1 and x.shape[-1] == features, op, "x", f"[..., {features}]", x)
    expect(weight.dtype == x.dtype, op, "weight", str(x.dtype), weight)
    check_low_rank(op, x, down, up, gate, out)
    wide = gate_dtype(x.dtype)
    for name, vector, dtypes in (
        ("bias", bias, (x.dtype,)),
        ("row_scale", row_scale, (x.dtype, wide)),
    ):
        expect_tensor(op, name, vector, optional=True)
        if vector is not None:
            expect(tuple(vector.shape) == (out,), op, name, f"[{out}]", vector)
            expect(vector.dtype in dtypes, op, name, " or ".join(map(str, dtypes)), vector)
    return x.new_empty((*x.shape[:-1], out))


def _plan(*args: Any) -> Any:
    return chosen(*args)[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, gate, row_scale = inputs
    # A strength may be changed in place between forward and backward: keep the one that was used.
    # (Not a learned one: whoever differentiates twice needs its graph.)
    gate = gate if gate.requires_grad else gate.clone()
    ctx.save_for_backward(*operands, gate, row_scale)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dX is the same operator with W, D, U read the other way; the rest are small products.

    `dD = ((dY U) ∘ g)ᵀ x`, `dU = dYᵀ ((x Dᵀ) ∘ g)`, `dg = Σ (dY U) ∘ (x Dᵀ)` over the tokens of g.
    """
    x, weight, bias, down, up, gate, row_scale = ctx.saved_tensors
    needs, wide = ctx.needs_input_grad, gate_dtype(x.dtype)
    d_row_scale = None
    d_bias = dy.reshape(-1, dy.shape[-1]).sum(0) if needs[2] else None
    if row_scale is not None:
        if needs[6]:
            z = lora_linear(x, weight, None, down, up, gate, None)
            products = (dy.to(wide) * z.to(wide)).reshape(-1, dy.shape[-1])
            d_row_scale = products.sum(0).to(row_scale.dtype)
        dy = (dy.to(wide) * row_scale.to(wide)).to(dy.dtype)
    dx = lora_linear(dy, weight.t(), None, up.t(), down.t(), gate, None) if needs[0] else None
    x2, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    d_weight = dy2.t() @ x2 if needs[1] else None
    d_down, d_up, d_gate = low_rank_gradients(x2, dy2, down, up, gate, needs[3:6])
    return dx, d_weight, d_bias, d_down, d_up, d_gate, d_row_scale


def low_rank_gradients(
    x: Tensor, dy: Tensor, down: Tensor, up: Tensor, gate: Tensor, needs: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `((x Dᵀ) ∘ g) Uᵀ` for `x [tokens, in]`, `dy [tokens, out]`: (dD, dU, dg)."""
    dtype, wide = x.dtype, gate_dtype(x.dtype)
    g = gate if gate.dim() == 1 else gate[:, None]  # beside [batch, tokens of a sample, rank]
    rows = 1 if gate.dim() == 1 else gate.shape[0]
    shape = (rows, x.shape[0] // max(rows, 1), gate.shape[-1])
    d_down = d_up = d_gate = None
    p = (dy @ up.to(dtype)).to(wide).view(shape) if needs[0] or needs[2] else None
    q = (x @ down.to(dtype).t()).to(wide).view(shape) if needs[1] or needs[2] else None
    if needs[0] and p is not None:
        d_down = ((p * g).flatten(0, 1).to(dtype).t() @ x).to(down.dtype)
    if needs[1] and q is not None:
        d_up = (dy.t() @ (q * g).flatten(0, 1).to(dtype)).to(up.dtype)
    if needs[2] and p is not None and q is not None:
        d_gate = (p * q).sum(1).view(gate.shape)
    return d_down, d_up, d_gate


lora_linear = define_op(
    lora_linear,
    fake=_fake,
    plan=_plan,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "weight", "bias"),
)
