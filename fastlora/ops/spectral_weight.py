"""`spectral_weight`: a weight with shifted singular values (SVDiff)."""

from typing import Any

import torch
from torch import Tensor

from fastlora.ops._define import FLOATS, define_op, expect, expect_tensor, gate_dtype, kernels
from fastlora.ops._device import device_type, kernels_of

# Beyond so many multiplications torch's product takes over from our loop, which serves all dtypes
# alike. float16 stays with the loop: few CPUs can multiply halves.
LOOP = {torch.float32: 1 << 32, torch.float64: 1 << 32, torch.bfloat16: 1 << 24}
# The same for the first CUDA kernel; a guess until it has been measured.
LOOP_CUDA = 1 << 26
# Elements of G Vᵀ that are alive at a time in the backward.
BLOCK, BLOCK_CUDA = 1 << 18, 1 << 24


def spectral_weight(
    weight: Tensor,  # [out, in]
    u: Tensor,  # [out, rank]
    s: Tensor,  # [rank]
    vh: Tensor,  # [rank, in]
    shift: Tensor,  # [rank], δ
    strength: Tensor,  # []
) -> Tensor:  # [out, in]
    """`W' = W + U diag(relu(s + strength·δ) - s) Vᵀ`; W itself, bit for bit, at δ = 0.

    W keeps what the decomposition `U diag(s) Vᵀ` leaves of it. `u` and `vh` have the weight's dtype
    (float32, float16, bfloat16, float64) or float32; `s` and `shift` too; `strength` is float32
    (float64 beside float64). Singular values are not negative. Differentiable in weight, shift and
    strength; the factors are constants. Raises ContractError (a ValueError) naming argument,
    expected, got.

    SVDiff: Han et al. 2023, arXiv 2303.11305.
    """
    wide = gate_dtype(weight.dtype)
    # relu(s + x) - s = max(x, -s), without the cancellation
    c = torch.maximum(strength * shift.to(wide), -s.to(wide))
    return weight + (u.to(wide) * c).to(weight.dtype) @ vh.to(weight.dtype)


def _fake(
    weight: Tensor, u: Tensor, s: Tensor, vh: Tensor, shift: Tensor, strength: Tensor
) -> Tensor:
    op = "spectral_weight"
    tensors = {"weight": weight, "u": u, "s": s, "vh": vh, "shift": shift, "strength": strength}
    for name, value in tensors.items():
        expect_tensor(op, name, value)
    expect(weight.dim() == 2, op, "weight", "[out, in]", weight)
    expect(weight.dtype in FLOATS, op, "weight", "float32, float16, bfloat16 or float64", weight)
    (out, features), wide = weight.shape, gate_dtype(weight.dtype)
    expect(s.dim() == 1, op, "s", "[rank]", s)
    rank = s.shape[0]
    for name, shape, dtypes in (
        ("u", (out, rank), (weight.dtype, wide)),
        ("s", (rank,), (weight.dtype, wide)),
        ("vh", (rank, features), (weight.dtype, wide)),
        ("shift", (rank,), (weight.dtype, wide)),
        ("strength", (), (wide,)),
    ):
        value = tensors[name]
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))
        good = tuple(value.shape) == shape and value.dtype in dtypes
        expect(good, op, name, f"{allowed} {list(shape)}", value)
    return weight.new_empty(weight.shape)


def _plan(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor, shift: Tensor, _: Tensor) -> Any:
    dtype, device = weight.dtype, device_type(weight)
    work = u.numel() * weight.shape[1]
    if device == "cpu":
        same = u.dtype == vh.dtype == dtype
        return _product if same and work > LOOP.get(dtype, work) else _loop
    if device == "cuda" and dtype == torch.float64:
        expect(False, "spectral_weight", "weight", "float32, float16 or bfloat16 on CUDA", weight)
    if device == "cuda":
        return _loop if work <= LOOP_CUDA or u.dtype != dtype or vh.dtype != dtype else _cublas
    return _reference


def _loop(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor, shift: Tensor, a: Tensor) -> Tensor:
    out = weight.new_empty(weight.shape)
    kernels_of(weight).spectral_weight(out, weight, u, s.to(a.dtype), vh, shift.to(a.dtype), a)
    return out


def _product(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor, shift: Tensor, a: Tensor) -> Tensor:
    scaled = u.new_empty(u.shape)
    if not kernels.spectral_scale(scaled, u, s.to(a.dtype), shift.to(a.dtype), a):
        return weight.clone(memory_format=torch.contiguous_format)
    return torch.addmm(weight, scaled, vh)


def _cublas(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor, shift: Tensor, a: Tensor) -> Tensor:
    """Without a look at the coefficients, which would wait for the GPU: at δ = 0 a -0 becomes 0."""
    c = torch.maximum(a * shift, -s.to(a.dtype))
    return torch.addmm(weight, (u * c).to(u.dtype), vh)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *factors = inputs
    ctx.save_for_backward(*factors)


def _backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    """With `p_i = u_iᵀ G v_i` where `s_i + strength δ_i > 0`, else 0: `dδ = strength p`,
    `dstrength = Σ δ_i p_i`."""
    u, s, vh, shift, strength = ctx.saved_tensors
    d_shift = d_strength = None
    if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
        x = shift.to(strength.dtype)
        dots = spectral_dots(d, u, vh)
        dots = torch.where(strength * x > -s.to(strength.dtype), dots, 0)
        d_shift = (strength * dots).to(shift.dtype)
        d_strength = (dots * x).sum()
    return d if ctx.needs_input_grad[0] else None, None, None, None, d_shift, d_strength


def spectral_dots(
    grad: Tensor,  # [out, in]
    u: Tensor,  # [out, rank]
    vh: Tensor,  # [rank, in]
) -> Tensor:  # [rank]
    """`p_i = u_iᵀ G v_i`, the gradient of the singular values; float32 (float64 beside float64).

    `G Vᵀ` is formed for a block of rows at a time, the sums run over them in a fixed order. Not
    differentiable a second time.
    """
    product = grad.to(vh.dtype) @ vh.t()
    return (product.to(u.dtype) * u).sum(0).to(gate_dtype(grad.dtype))


def _fake_dots(grad: Tensor, u: Tensor, vh: Tensor) -> Tensor:
    op = "spectral_dots"
    for name, value in (("grad", grad), ("u", u), ("vh", vh)):
        expect_tensor(op, name, value)
        expect(value.dim() == 2 and value.dtype in FLOATS, op, name, "a floating matrix", value)
    rank = u.shape[1]
    expect(u.shape[0] == grad.shape[0], op, "u", f"[{grad.shape[0]}, rank]", u)
    expect(tuple(vh.shape) == (rank, grad.shape[1]), op, "vh", f"[{rank}, {grad.shape[1]}]", vh)
    return grad.new_empty(rank, dtype=gate_dtype(grad.dtype))


def _plan_dots(grad: Tensor, u: Tensor, vh: Tensor) -> Any:
    device = device_type(grad)
    if device not in ("cpu", "cuda") or (device == "cuda" and vh.dtype == torch.float64):
        return _reference_dots
    kernel = kernels_of(grad).spectral_dots
    rank, wide = u.shape[1], gate_dtype(grad.dtype)
    rows = max((BLOCK_CUDA if device == "cuda" else BLOCK) // max(rank, 1), 16)

    def route(grad: Tensor, u: Tensor, vh: Tensor) -> Tensor:
        sums = torch.zeros(rank, dtype=torch.float64, device=grad.device)
        for first in range(0, grad.shape[0], rows):
            product = grad[first : first + rows].to(vh.dtype) @ vh.t()
            kernel(sums, product, u[first : first + rows].to(product.dtype))
        return sums.to(wide)

    return route


_reference, _reference_dots = spectral_weight, spectral_dots
spectral_dots = define_op(spectral_dots, fake=_fake_dots, plan=_plan_dots, differentiable=False)
spectral_weight = define_op(
    spectral_weight,
    fake=_fake,
    plan=_plan,
    setup_context=_setup_context,
    backward=_backward,
)
