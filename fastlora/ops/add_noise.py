"""`add_noise`: the noisy sample of training and its target, in one pass."""

from typing import Any

import torch
from torch import Tensor

from fastlora.ops import _philox
from fastlora.ops._define import FLOATS, define_op, expect, expect_tensor, gate_dtype
from fastlora.ops._device import device_type, kernels_of


def add_noise(
    x0: Tensor,  # [B, ...] T
    noise: Tensor | None,  # [B, ...] T
    seeds: Tensor | None,  # [B] int64
    t: Tensor,  # [B] int64, rows of the table
    table: Tensor,  # [steps, 4]: alpha, sigma, p_0, p_e
) -> tuple[Tensor, Tensor]:  # [B, ...], [B, ...]
    """`x_t = α x0 + σ ε`, `target = p_0 x0 + p_e ε`, with each sample's own row of the table.

    ε is `noise`, or standard normal noise from `seeds` at the step `_philox.START`, a function of
    (seed, element) alone; exactly one of the two is given. Targets: ε (0, 1), x0 (1, 0), v (-σ, α),
    flow (-1, 1); `Schedule.noise_table` makes the table, float32 (or float64 beside float64).
    Arithmetic in float32 (float64), one rounding to x0's dtype.

    Differentiable in x0 and noise. Raises ContractError (a ValueError) naming argument, expected,
    got; a t outside the table raises on the CPU and gives NaN on CUDA.
    """
    wide = gate_dtype(x0.dtype)
    alpha, sigma, p_0, p_e = _rows(table, t, x0)
    if noise is None:
        assert seeds is not None
        noise = _philox.normal(seeds, _philox.START, x0.shape[1:].numel(), wide).view(x0.shape)
    clean, eps = x0.to(wide), noise.to(wide)
    return (alpha * clean + sigma * eps).to(x0.dtype), (p_0 * clean + p_e * eps).to(x0.dtype)


def _rows(table: Tensor, t: Tensor, x0: Tensor) -> Any:
    """The columns, each [B, 1, ...]."""
    rows = table.index_select(0, t).to(gate_dtype(x0.dtype))
    return rows.t().reshape(4, -1, *[1] * (x0.dim() - 1)).unbind()


def _fake(
    x0: Tensor, noise: Tensor | None, seeds: Tensor | None, t: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    op = "add_noise"
    for name, value in (("x0", x0), ("t", t), ("table", table)):
        expect_tensor(op, name, value)
    expect_tensor(op, "noise", noise, optional=True)
    expect_tensor(op, "seeds", seeds, optional=True)
    expect(x0.dtype in FLOATS, op, "x0", "float32, float16, bfloat16 or float64", x0)
    expect(x0.dim() >= 1, op, "x0", "at least one dimension [B, ...]", x0)
    batch = x0.shape[0]
    given = "both" if noise is not None and seeds is not None else "neither"
    expect((noise is None) != (seeds is None), op, "noise", "either noise or seeds", given)
    if noise is not None:
        expect(noise.shape == x0.shape, op, "noise", f"x0's shape {list(x0.shape)}", noise)
        expect(noise.dtype == x0.dtype, op, "noise", f"x0's dtype {x0.dtype}", noise)
    for name, value in (("seeds", seeds), ("t", t)):
        if value is not None:
            right = value.dtype == torch.int64 and tuple(value.shape) == (batch,)
            expect(right, op, name, f"int64 [{batch}]", value)
    rows = table.dim() == 2 and table.shape[0] >= 1 and table.shape[1] == 4
    expect(rows, op, "table", "[steps, 4] with steps >= 1", table)
    wide = (torch.float32, gate_dtype(x0.dtype))
    expect(table.dtype in wide, op, "table", " or ".join(map(str, dict.fromkeys(wide))), table)
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape)


_reference = add_noise


def _plan(x0: Tensor, *rest: Tensor | None) -> Any:
    device = device_type(x0)
    if not (device == "cpu" or (device == "cuda" and x0.dtype != torch.float64)):
        return _reference  # float64 and other devices: exactness, not speed
    shape, kernel = x0.shape, kernels_of(x0).add_noise
    contiguous = all(t is None or t.is_contiguous() for t in (x0, *rest))

    def route(x0: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        if not contiguous:
            x0, rest = x0.contiguous(), tuple(t if t is None else t.contiguous() for t in rest)
        x_t, target = x0.new_empty(shape), x0.new_empty(shape)
        kernel(x_t, target, x0, *rest)
        return x_t, target

    return route


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x0, noise, _, t, table = inputs
    if table.requires_grad:
        raise ValueError("add_noise: table: expected constants, got a tensor that requires grad")
    ctx.save_for_backward(x0, t, table)
    ctx.has_noise = noise is not None


def _backward(ctx: Any, d_noisy: Tensor, d_target: Tensor) -> tuple[Tensor | None, ...]:
    x0, t, table = ctx.saved_tensors
    wide = gate_dtype(x0.dtype)
    alpha, sigma, p_0, p_e = _rows(table, t, x0)
    d_noisy, d_target = d_noisy.to(wide), d_target.to(wide)
    d_noise = (sigma * d_noisy + p_e * d_target).to(x0.dtype) if ctx.has_noise else None
    return (alpha * d_noisy + p_0 * d_target).to(x0.dtype), d_noise, None, None, None


add_noise = define_op(
    add_noise, fake=_fake, plan=_plan, setup_context=_setup_context, backward=_backward
)
