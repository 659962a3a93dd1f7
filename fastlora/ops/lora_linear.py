"""`lora_linear`: a linear layer with any number of gated low-rank adapters, unmerged."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.ops._define import FLOATS, define_op, expect, expect_tensor, gate_dtype, kernels
from fastlora.ops._device import device_type, kernels_of

# Up to this many multiplications our own loop beats the library calls (each about 2 µs); it goes
# through W for every token, so that more than FEW of them come sooner to the end of it.
TINY, FEW = 1 << 15, 32
# Numbers of tokens for which our pass over x and y, which serves all dtypes alike, is faster than
# torch's two products: those have a price per call, and instructions for bfloat16 on some CPUs.
LOOP_TOKENS = {
    torch.float32: (FEW, 1 << 62),
    torch.float64: (FEW, 1 << 62),
    torch.float16: (0, 1 << 62),
    torch.bfloat16: (0, 512),
}
LOOP_RANK = 256
# The same for the CUDA kernels; a guess until it has been measured.
TINY_CUDA = 1 << 22
# The forms of the CUDA version (csrc/lora_linear.h); the last two need tensor cores.
TILED, EXTENDED, APPENDED = 0, 1, 2
APPENDED_RANK = 32


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


def _plan(x: Tensor, weight: Tensor, *rest: Any) -> Any:
    _, down, up, gate, row_scale = rest
    rank, (out, features) = up.shape[1], weight.shape
    tokens = x.numel() // max(features, 1)
    operands = (x, weight, *rest)
    plain = all(
        t is None or (t.is_contiguous() and (t is gate or t.dtype == x.dtype)) for t in operands
    )
    work = tokens * (out * features + rank * (out + features))
    tiny = work <= (TINY if tokens < FEW else TINY // 4) and rank <= 1024 and features <= 4096
    device = device_type(x)
    if plain and tiny and device == "cpu":
        return kernels.lora_linear_tiny
    if device == "cuda" and x.dtype != torch.float64 and tokens > 0:
        form = chosen_form(x, weight, down, up, tokens)
        if form is not None:
            return partial(_kernel, form=form)
    if row_scale is None and tokens > 0:
        if x.is_contiguous() and by_loop(x, tokens, rank):
            return _around
        if plain and x.dim() == 2 and gate.dim() == 1:
            return _few
    return _products


def chosen_form(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, tokens: int) -> int | None:
    """The form that csrc/heuristics.h predicts to be fastest; None: the library's products."""
    (out, features), rank = weight.shape, up.shape[1]
    tiny = tokens * (out * features + rank * (out + features)) <= TINY_CUDA
    capability, multiprocessors = gpu_of(x)
    # Tensor cores want 16-bit elements, and neighbours of a sum to be neighbours in memory.
    neighbours = all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (x, weight, down, up))
    if x.element_size() != 2 or capability < 80 or rank == 0 or not neighbours:
        return TILED if tiny else None
    _, products, extended, appended = kernels.predict_lora_linear(
        tokens, features, out, rank, capability, multiprocessors
    )
    forms = {None: products, EXTENDED: extended}
    if rank <= APPENDED_RANK:
        forms[APPENDED] = appended
    return min(forms, key=lambda form: forms[form])


def gpu_of(x: Tensor) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and multiprocessors; an emulated GPU is an H200."""
    if not x.is_cuda:
        return 90, 132
    properties = torch.cuda.get_device_properties(x.device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _kernel(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    down: Tensor,
    up: Tensor,
    gate: Tensor,
    row_scale: Any,
    form: int = TILED,
) -> Tensor:
    (out, features), dtype = weight.shape, x.dtype
    x2 = x.reshape(-1, features)
    y = x.new_empty(x2.shape[0], out)
    h = None if form == APPENDED else x.new_empty(x2.shape[0], up.shape[1])
    m = None if row_scale is None else row_scale.to(dtype)
    kernels_of(x).lora_linear(y, x2, weight, bias, down.to(dtype), up.to(dtype), gate, m, h, form)
    return y.view(*x.shape[:-1], out)


def _around(
    x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor, gate: Tensor, _: None
) -> Tensor:
    y = F.linear(x, weight, bias)
    kernels.lora_add_(y, x, down, up, gate, None)
    return y


def _few(
    x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor, gate: Tensor, _: None
) -> Tensor:
    y = F.linear(x, weight, bias)
    return y.addmm_(torch.mm(x, down.t()).mul_(gate), up.t())


def _products(
    x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor, gate: Tensor, row_scale: Any
) -> Tensor:
    """Torch's matrix products; around them one pass over h and, for DoRA, one over y."""
    x2 = x.reshape(-1, x.shape[-1])
    y = F.linear(x2, weight, bias if row_scale is None else None)
    accumulate(y, x2, down, up, gate)
    if row_scale is not None:
        m = row_scale.to(y.dtype)
        y = y.mul_(m) if bias is None else torch.addcmul(bias, y, m, out=y)
    return y.view(*x.shape[:-1], weight.shape[0])


def by_loop(like: Tensor, tokens: int, rank: int) -> bool:
    """Whether our pass over x and y adds the low-rank part faster than torch's products."""
    least, most = LOOP_TOKENS[like.dtype]
    return device_type(like) == "cpu" and least <= tokens < most and 0 < rank <= LOOP_RANK


def accumulate(y: Tensor, x: Tensor, down: Tensor | None, up: Tensor, gate: Tensor) -> None:
    """`y += ((x Dᵀ) ∘ g) Uᵀ` on matrices `y [tokens, out]`, `x [tokens, in]`."""
    tokens, dtype = y.shape[0], y.dtype
    if tokens == 0:
        return
    if by_loop(y, tokens, up.shape[1]):
        kernels.lora_add_(y, x, down, up, gate, None)
        return
    h = x if down is None else torch.mm(x, (down if down.dtype == dtype else down.to(dtype)).t())
    if gate.dim() == 1:
        h = h * gate if down is None else h.mul_(gate)
    else:
        rows = h.view(gate.shape[0], -1, gate.shape[1])
        h = torch.mul(rows, gate[:, None], out=None if down is None else rows).view(h.shape)
    up = up if up.dtype == dtype else up.to(dtype)
    y.addmm_(h if h.dtype == dtype else h.to(dtype), up.t())


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
    rows = (1, -1) if gate.dim() == 1 else (gate.shape[0], -1)
    shape = (*rows, gate.shape[-1]) if x.shape[0] else (rows[0], 0, gate.shape[-1])
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
