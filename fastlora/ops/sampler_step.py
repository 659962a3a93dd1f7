"""`sampler_step`: guidance, one row of a solver's table and the next model input in one pass."""

from typing import Any

import torch
from torch import Tensor

from fastlora.ops import _philox
from fastlora.ops._define import FLOATS, define_op, expect, expect_tensor
from fastlora.ops._device import device_type, kernels_of

COLUMNS = ("k_x", "k_e", "c_x", "c_0", "c_e", "c_h", "c_n", "g_x", "g_0", "g_e", "m", "clip")
MAX_OUTPUTS = 16  # kMaxOutputs of csrc/sampler_step.h


def sampler_step(
    x: Tensor,  # [B, ...] float32 or float64
    outputs: list[Tensor],  # n of [B, ...], or one of [n * B, ...]
    weights: Tensor,  # [S or 1, n, B or 1]
    table: Tensor,  # [S, 12], columns in the order of COLUMNS
    step: Tensor,  # [] int64, the row of the table, read where x is
    history: Tensor | None = None,  # [B, ...]
    seeds: Tensor | None = None,  # [B] int64
    copies: int = 1,
    input_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, ...], [B, ...] or [0], [copies * B, ...]
    """`x' = c_x x + c_0 x̂0 + c_e ê + c_h h + c_n z`, `h' = g_x x + g_0 x̂0 + g_e ê`, input `m x'`.

    `ê = Σ_j w_j e_j` is the guided output (one tensor may hold all e_j, one batch after the other),
    `x̂0 = clip(k_x x + k_e ê)`, z standard normal noise that is a function of (seed, step, element)
    alone (see `_philox.py`). Without history h is 0 and h' empty; without seeds z is 0. All
    arithmetic is in x's dtype, which x', h and h' have; weights and table have it too or float32.
    The outputs and `input_dtype` may be float32, float16, bfloat16, and float64 where x is. The
    model input holds `copies` times the batch, tiled.

    Differentiable in x, outputs, weights and history. Raises ContractError (a ValueError) naming
    argument, expected, got; a step outside 0..S-1 raises on the CPU and gives NaN on CUDA.
    """
    column = dict(zip(COLUMNS, _row(table, step, x), strict=True))
    e = _guided(x, _each(x, outputs, weights), _weights(weights, step, x))
    x0 = (column["k_x"] * x + column["k_e"] * e).clamp(-column["clip"], column["clip"])
    x_next = column["c_x"] * x + column["c_0"] * x0 + column["c_e"] * e
    history_next = x.new_empty(0)
    if history is not None:
        x_next = x_next + column["c_h"] * history
        history_next = column["g_x"] * x + column["g_0"] * x0 + column["g_e"] * e
    if seeds is not None:
        z = _philox.normal(seeds, step, x.shape[1:].numel(), x.dtype)
        x_next = x_next + column["c_n"] * z.view(x.shape)
    model_input = (column["m"] * x_next).to(input_dtype)
    return x_next, history_next, model_input.repeat(copies, *[1] * (x.dim() - 1))


def _row(table: Tensor, step: Tensor, x: Tensor) -> Tensor:
    return table.index_select(0, step.view(1))[0].to(x.dtype)


def _weights(weights: Tensor, step: Tensor, x: Tensor) -> Tensor:
    """This step's weights [n, B or 1, 1, ...] in x's dtype."""
    row = step if weights.shape[0] > 1 else torch.zeros_like(step)
    return _row(weights, row, x).view(*weights.shape[1:], *[1] * (x.dim() - 1))


def _each(x: Tensor, outputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    """The n model outputs [B, ...], taken apart where they come in one tensor."""
    n = weights.shape[1]
    return outputs if len(outputs) == n else list(outputs[0].reshape(n, *x.shape).unbind())


def _guided(x: Tensor, outputs: list[Tensor], w: Tensor) -> Tensor:
    e = w[0] * outputs[0].to(x.dtype)
    for j in range(1, len(outputs)):
        e = e + w[j] * outputs[j].to(x.dtype)
    return e


def _fake(
    x: Tensor,
    outputs: list[Tensor],
    weights: Tensor,
    table: Tensor,
    step: Tensor,
    history: Tensor | None = None,
    seeds: Tensor | None = None,
    copies: int = 1,
    input_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "sampler_step"
    for name, value in (("x", x), ("weights", weights), ("table", table), ("step", step)):
        expect_tensor(op, name, value)
    expect_tensor(op, "history", history, optional=True)
    expect_tensor(op, "seeds", seeds, optional=True)
    expect(x.dtype in (torch.float32, torch.float64), op, "x", "float32 or float64", x)
    expect(x.dim() >= 1, op, "x", "at least one dimension [B, ...]", x)
    floats = FLOATS if x.dtype == torch.float64 else FLOATS[:3]
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in floats)
    wide = (torch.float32, x.dtype)
    batch = x.shape[0]
    rows = table.dim() == 2 and table.shape[0] >= 1 and table.shape[1] == len(COLUMNS)
    expect(rows, op, "table", f"[S, {len(COLUMNS)}] with S >= 1", table)
    expect(table.dtype in wide, op, "table", "float32 or x's dtype", table)
    steps = table.shape[0]
    right = weights.dim() == 3 and weights.shape[0] in (1, steps) and weights.shape[2] in (1, batch)
    right = right and 1 <= weights.shape[1] <= MAX_OUTPUTS
    shape = f"[{steps} or 1, n, {batch} or 1] with n from 1 to {MAX_OUTPUTS}"
    expect(right, op, "weights", shape, weights)
    expect(weights.dtype in wide, op, "weights", "float32 or x's dtype", weights)
    n = weights.shape[1]
    count = f"{n} tensors, as weights has, or all of them in one"
    expect(len(outputs) in (1, n), op, "outputs", count, f"{len(outputs)} tensors")
    each = (n // len(outputs) * batch, *x.shape[1:])
    for j, output in enumerate(outputs):
        name = f"outputs[{j}]"
        expect_tensor(op, name, output)
        expect(tuple(output.shape) == each, op, name, str(list(each)), output)
        expect(output.dtype in floats, op, name, f"one of {allowed}", output)
        expect(output.dtype == outputs[0].dtype, op, name, f"{outputs[0].dtype} as others", output)
    expect(step.dim() == 0 and step.dtype == torch.int64, op, "step", "int64 []", step)
    history_next = x.new_empty(0)
    if history is not None:
        expect(history.shape == x.shape, op, "history", f"x's shape {list(x.shape)}", history)
        expect(history.dtype == x.dtype, op, "history", f"x's dtype {x.dtype}", history)
        history_next = x.new_empty(x.shape)
    if seeds is not None:
        expect(seeds.dtype == torch.int64, op, "seeds", f"int64 [{batch}]", seeds)
        expect(tuple(seeds.shape) == (batch,), op, "seeds", f"int64 [{batch}]", seeds)
    expect(copies >= 0, op, "copies", "0 or more", copies)
    expect(input_dtype in floats, op, "input_dtype", f"one of {allowed}", input_dtype)
    model_input = x.new_empty((copies * batch, *x.shape[1:]), dtype=input_dtype)
    return x.new_empty(x.shape), history_next, model_input


_reference = sampler_step


def _plan(x: Tensor, outputs: list[Tensor], *rest: Any) -> Any:
    device = device_type(x)
    if not (device == "cpu" or (device == "cuda" and x.dtype == torch.float32)):
        return _reference  # float64 and other devices: exactness, not speed
    *tensors, copies, input_dtype = rest
    kernel, empty_like = kernels_of(x).sampler_step, torch.empty_like
    # One element that stands for the whole model input: `empty_like` is the cheapest allocation
    like_input = torch.empty((), dtype=input_dtype, device=x.device)
    like_input = like_input.expand(copies * x.shape[0], *x.shape[1:])

    def route(x: Any, outputs: Any, weights: Any, table: Any, step: Any, history: Any, *rest: Any):
        x_next, model_input = empty_like(x), empty_like(like_input)
        h_next = x.new_empty(0) if history is None else empty_like(x)
        operands = (x, outputs, weights, table, step, history, rest[0], copies)
        kernel(x_next, h_next, model_input, *operands)
        return x_next, h_next, model_input

    def copying(x: Any, outputs: Any, *rest: Any):
        rest = tuple(t.contiguous() if isinstance(t, Tensor) else t for t in rest)
        return route(x.contiguous(), [t.contiguous() for t in outputs], *rest)

    plain = all(t is None or t.is_contiguous() for t in (x, *outputs, *tensors))
    return route if plain else copying


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, outputs, weights, table, step, history, _, ctx.copies, _ = inputs
    if table.requires_grad:
        raise ValueError(
            "sampler_step: table: expected constants, got a tensor that requires grad"
            " (weights, outputs, x and history are differentiable)"
        )
    ctx.has_history = history is not None
    ctx.save_for_backward(x, weights, table, step, *outputs)


def _backward(ctx: Any, d_next: Tensor, d_history: Tensor, d_input: Tensor) -> tuple[Any, ...]:
    """The step is linear in x, ê and h but for the clip, which lets pass what it does not cut."""
    x, weights, table, step, *given = ctx.saved_tensors
    outputs = _each(x, given, weights)
    column = dict(zip(COLUMNS, _row(table, step, x), strict=True))
    w = _weights(weights, step, x)
    e = _guided(x, outputs, w)
    d = d_next + column["m"] * d_input.view(ctx.copies, *x.shape).to(x.dtype).sum(0)
    d_h = d_history if ctx.has_history else torch.zeros_like(x)
    cut = (column["k_x"] * x + column["k_e"] * e).abs() > column["clip"]
    d_x0 = (column["c_0"] * d + column["g_0"] * d_h).masked_fill(cut, 0)
    d_e = column["c_e"] * d + column["g_e"] * d_h + column["k_e"] * d_x0
    d_x = column["c_x"] * d + column["g_x"] * d_h + column["k_x"] * d_x0
    d_outputs = [(w[j] * d_e).to(output.dtype) for j, output in enumerate(outputs)]
    if len(given) < len(outputs):
        d_outputs = [torch.cat(d_outputs)]
    d_weights = None
    if ctx.needs_input_grad[2]:
        products = [(d_e * output.to(x.dtype))[..., None].flatten(1) for output in outputs]
        this = torch.stack([product.sum(1) for product in products])  # [n, B]
        this = this if weights.shape[2] == x.shape[0] else this.sum(1, keepdim=True)
        row = step if weights.shape[0] > 1 else torch.zeros_like(step)
        d_weights = torch.zeros_like(weights)
        d_weights = d_weights.index_add(0, row.view(1), this[None].to(weights.dtype))
    d_last = column["c_h"] * d if ctx.has_history else None
    gradients = (d_x, d_outputs, d_weights, None, None, d_last, None, None, None)
    # The dispatcher leaves out arguments that equal their defaults, and wants no gradient for them
    return gradients[: len(ctx.needs_input_grad)]


sampler_step = define_op(
    sampler_step, fake=_fake, plan=_plan, setup_context=_setup_context, backward=_backward
)
