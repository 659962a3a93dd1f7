"""`spectral_linear`: a linear layer with shifted singular values, in the activation domain."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastlora.ops._define import FLOATS, define_op, expect, expect_tensor, gate_dtype
from fastlora.ops._device import device_type
from fastlora.ops._spectral import coefficients, shift_gradients
from fastlora.ops.lora_add import lora_add_
from fastlora.ops.lora_linear import lora_linear, low_rank_gradients


def spectral_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    u: Tensor,  # [out, rank]
    s: Tensor,  # [rank]
    vh: Tensor,  # [rank, in]
    shift: Tensor,  # [rank], δ
    strength: Tensor,  # []
) -> Tensor:  # [..., out]
    """`y = x Wᵀ + b + ((x V) ∘ c) Uᵀ` with `c = relu(s + strength·δ) - s`: what a linear layer with
    `spectral_weight`'s W' computes, without W'. For few tokens (`activations_are_cheaper`).

    x, weight, bias and the result share one dtype: float32, float16, bfloat16 or float64. `u` and
    `vh` have it too, or float32; `s` and `shift` too; `strength` is float32 (float64 beside
    float64). Singular values are not negative. At δ = 0 the result is `F.linear`'s, bit for bit (on
    a GPU -0 becomes 0). No temporary is larger than x or y with `rank` features. Differentiable in
    x, weight, bias, shift and strength; the factors are constants. Raises ContractError (a
    ValueError) naming argument, expected, got.

    SVDiff: Han et al. 2023, arXiv 2303.11305.
    """
    h = F.linear(x, vh.to(x.dtype)).to(gate_dtype(x.dtype))  # [..., rank]
    change = (h * coefficients(s, shift, strength)).to(x.dtype)
    return F.linear(x, weight, bias) + F.linear(change, u.to(x.dtype))


def activations_are_cheaper(
    tokens: int, features: int, out: int, rank: int, *, backward: bool = False
) -> bool:
    """Whether `spectral_linear` takes fewer multiplications than `spectral_weight` and `F.linear`.

    `M R (K + N)` against `N K R`: M tokens, K features, N outputs, rank R. With the backward pass
    `3 M R (K + N)` (the two products of the forward pass; for dx and dδ those of dY and U, x and V,
    and dx's own) against `3 N K R + M N K`: W', W' once more for dx, `G = dYᵀ x`, and the dots
    `u_iᵀ G v_i`. What both have in common, `x Wᵀ` and `dY W`, is left out.
    """
    activations, weights = tokens * rank * (features + out), out * features * rank
    if backward:
        activations, weights = 3 * activations, 3 * weights + tokens * out * features
    return activations < weights


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    shift: Tensor,
    strength: Tensor,
) -> Tensor:
    op = "spectral_linear"
    tensors = {"x": x, "weight": weight, "u": u, "s": s, "vh": vh, "shift": shift}
    for name, value in {**tensors, "strength": strength}.items():
        expect_tensor(op, name, value)
    expect_tensor(op, "bias", bias, optional=True)
    expect(x.dtype in FLOATS, op, "x", "float32, float16, bfloat16 or float64", x)
    expect(weight.dim() == 2, op, "weight", "[out, in]", weight)
    (out, features), wide = weight.shape, gate_dtype(x.dtype)
    expect(x.dim() >= 1 and x.shape[-1] == features, op, "x", f"[..., {features}]", x)
    expect(s.dim() == 1, op, "s", "[rank]", s)
    rank, own, either = s.shape[0], (x.dtype,), (x.dtype, wide)
    for name, value, shape, dtypes in (
        ("weight", weight, (out, features), own),
        ("bias", bias, (out,), own),
        ("u", u, (out, rank), either),
        ("s", s, (rank,), either),
        ("vh", vh, (rank, features), either),
        ("shift", shift, (rank,), either),
        ("strength", strength, (), (wide,)),
    ):
        if value is not None:
            allowed = " or ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))
            good = tuple(value.shape) == shape and value.dtype in dtypes
            expect(good, op, name, f"{allowed} {list(shape)}", value)
    return x.new_empty((*x.shape[:-1], out))


def _plan(x: Tensor, *rest: Any) -> Any:
    return _on_cpu if device_type(x) == "cpu" else _in_two_parts


def _on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    shift: Tensor,
    strength: Tensor,
) -> Tensor:
    """A gated low-rank linear layer, by whichever route of it is fastest."""
    c = coefficients(s, shift, strength)
    if not c.any():
        return F.linear(x, weight, bias)
    return lora_linear.eager(x, weight, bias, vh, u, c, None)  # type: ignore[attr-defined]


def _in_two_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    shift: Tensor,
    strength: Tensor,
) -> Tensor:
    """Without a look at the coefficients, which would wait for the GPU. Base and change are summed
    apart: `lora_linear`'s kernels, which have one sum, would not give `F.linear`'s bits at δ = 0.
    """
    y = F.linear(x, weight, bias)
    if x.numel() and y.numel():
        c = coefficients(s, shift, strength)
        lora_add_.eager(y, x, vh, u, c)  # type: ignore[attr-defined]
    return y


def _matrix(x: Tensor) -> Tensor:
    """x as `[tokens, features]`, of which both may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *operands, strength = inputs
    # As in lora_linear: a strength may be changed in place between forward and backward.
    strength = strength if strength.requires_grad else strength.clone()
    ctx.save_for_backward(*operands, strength)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dX is the same operator with W, U, V read the other way; that of the singular values is
    `p_i = Σ (dY U)_i (x V)_i` over the tokens."""
    x, weight, bias, u, s, vh, shift, strength = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = d_weight = d_bias = d_shift = d_strength = None
    x2, dy2 = _matrix(x), _matrix(dy)
    if needs[0]:
        dx = spectral_linear(dy, weight.t(), None, vh.t(), s, u.t(), shift, strength)
    if needs[1]:
        d_weight = dy2.t() @ x2
    if needs[2]:
        d_bias = dy2.sum(0)
    if needs[6] or needs[7]:
        c = coefficients(s, shift, strength)
        _, _, dots = low_rank_gradients(x2, dy2, vh, u, c, (False, False, True))
        assert dots is not None
        d_shift, d_strength = shift_gradients(dots, s, shift, strength)
    return dx, d_weight, d_bias, None, None, None, d_shift, d_strength


spectral_linear = define_op(
    spectral_linear,
    fake=_fake,
    plan=_plan,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "weight", "bias"),
)
