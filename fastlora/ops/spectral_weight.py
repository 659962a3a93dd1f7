"""`spectral_weight`: a weight with shifted singular values (SVDiff); `spectral_weights`: many."""

from typing import Any

import torch
from torch import Tensor

from fastlora.ops._define import FLOATS, define_op, expect, expect_tensor, gate_dtype, kernels
from fastlora.ops._device import device_type, kernels_of
from fastlora.ops._spectral import coefficients, shift_gradients
from fastlora.ops.spectral_dots import spectral_dots

# On the CPU torch's product takes over from our loop beyond so many multiplications; the loop
# serves all dtypes alike. float16 stays with it: few CPUs can multiply halves.
LOOP = {torch.float32: 1 << 23, torch.float64: 1 << 23, torch.bfloat16: 1 << 24}
# Components of U diag(c) that are alive at a time before that product; in 16 bits all of them are,
# because the sum over them is to be rounded once.
COMPONENTS = 640
# On CUDA the library's float32 product takes over from our kernel's plain arithmetic.
LOOP_CUDA = 1 << 26


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
    c = coefficients(s, shift, strength)
    return weight + (u.to(wide) * c).to(weight.dtype) @ vh.to(weight.dtype)


def spectral_weights(
    weights: list[Tensor],  # each [out, in]
    us: list[Tensor],  # each [out, rank]
    ss: list[Tensor],  # each [rank]
    vhs: list[Tensor],  # each [rank, in]
    shifts: list[Tensor],  # each [rank]
    strengths: list[Tensor],  # each []
    outs: list[Tensor],  # each [out, in], written
) -> None:
    """`spectral_weight` of every layer of a model, each with a rank, shape and dtype of its own.

    `outs[i]` is `weights[i]` itself or memory of its own; the bits are those of the layer alone.
    On CUDA the layers of one dtype are one launch, up to 303 of them in 16 bits. Not
    differentiable: it runs as under `no_grad`, and the version counters of `outs` rise. Raises
    ContractError (a ValueError) naming argument, expected, got.
    """
    with torch.no_grad():
        for *layer, out in zip(weights, us, ss, vhs, shifts, strengths, outs, strict=True):
            out.copy_(_reference(*layer))


def _fake(
    weight: Tensor, u: Tensor, s: Tensor, vh: Tensor, shift: Tensor, strength: Tensor
) -> Tensor:
    if not _holds(weight, u, s, vh, shift, strength):
        _explain("spectral_weight", "{}", weight, u, s, vh, shift, strength)
    return weight.new_empty(weight.shape)


def _fake_all(
    weights: list[Tensor],
    us: list[Tensor],
    ss: list[Tensor],
    vhs: list[Tensor],
    shifts: list[Tensor],
    strengths: list[Tensor],
    outs: list[Tensor],
) -> None:
    op = "spectral_weights"
    lists = {"us": us, "ss": ss, "vhs": vhs, "shifts": shifts, "strengths": strengths, "outs": outs}
    for name, tensors in lists.items():
        count = f"a list of {len(weights)} tensors, one for each layer"
        expect(len(tensors) == len(weights), op, name, count, f"{len(tensors)} tensors")
    for i, (*layer, out) in enumerate(zip(weights, *lists.values(), strict=True)):
        if not _holds(*layer):
            _explain(op, f"{{}}s[{i}]", *layer)
        weight = layer[0]
        if not (
            isinstance(out, Tensor) and out.shape == weight.shape and out.dtype == weight.dtype
        ):
            expect_tensor(op, f"outs[{i}]", out)
            dtype = str(weight.dtype).removeprefix("torch.")
            expect(False, op, f"outs[{i}]", f"{dtype} {list(weight.shape)}", out)


def _holds(weight: Any, u: Any, s: Any, vh: Any, shift: Any, strength: Any) -> bool:
    """The contract of one layer without its messages: a model has hundreds of them."""
    try:
        rows, features = weight.shape
        (rank,) = s.shape
        dtype = weight.dtype
        wide = gate_dtype(dtype)
        either = (dtype, wide)
        return (
            u.shape == (rows, rank)
            and vh.shape == (rank, features)
            and shift.shape == (rank,)
            and strength.shape == ()
            and dtype in FLOATS
            and strength.dtype == wide
            and u.dtype in either
            and s.dtype in either
            and vh.dtype in either
            and shift.dtype in either
        )
    except (AttributeError, TypeError, ValueError):
        return False


def _explain(op: str, names: str, *layer: Any) -> None:
    """`names` makes an argument's name of that of `spectral_weight`'s."""
    parts = ("weight", "u", "s", "vh", "shift", "strength")
    tensors: dict[str, Any] = dict(zip(parts, layer, strict=True))
    for name, value in tensors.items():
        expect_tensor(op, names.format(name), value)
    weight, s = tensors["weight"], tensors["s"]
    expect(weight.dim() == 2, op, names.format("weight"), "[out, in]", weight)
    floats = "float32, float16, bfloat16 or float64"
    expect(weight.dtype in FLOATS, op, names.format("weight"), floats, weight)
    (out, features), wide = weight.shape, gate_dtype(weight.dtype)
    expect(s.dim() == 1, op, names.format("s"), "[rank]", s)
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
        expect(good, op, names.format(name), f"{allowed} {list(shape)}", value)


def _plan(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor, shift: Tensor, _: Tensor) -> Any:
    device = device_type(weight)
    if device == "cpu":
        return _product if _by_products(weight, u, vh) else _alone(_kernel)
    if device != "cuda":
        return _reference
    _refuse_float64("weight", weight)
    large = u.numel() * weight.shape[1] > LOOP_CUDA
    library = large and u.dtype == vh.dtype == weight.dtype == torch.float32
    return _cublas if library else _alone(_kernel)


def _plan_all(weights: list[Tensor], us: list[Tensor], ss: Any, vhs: list[Tensor], *_: Any) -> Any:
    kinds = [device_type(w) for w in weights]
    if not {"cpu", "cuda"}.issuperset(kinds):
        return _reference_all
    products, others = [], []
    for i, (kind, weight) in enumerate(zip(kinds, weights, strict=True)):
        if kind == "cuda" and weight.dtype == torch.float64:
            _refuse_float64(f"weights[{i}]", weight)
        by_products = kind == "cpu" and _by_products(weight, us[i], vhs[i])
        (products if by_products else others).append(i)
    if not products:
        return _kernels

    def route(*lists: list[Tensor]) -> None:
        kernels.check_spectral_results(*lists)
        for i in products:
            _product(*[tensors[i] for tensors in lists])
        if others:
            _kernels(*[[tensors[i] for i in others] for tensors in lists])

    return route


def _refuse_float64(name: str, weight: Tensor) -> None:
    op = "spectral_weights" if "[" in name else "spectral_weight"
    good = weight.dtype != torch.float64
    expect(good, op, name, "float32, float16 or bfloat16 on CUDA", weight)


def _by_products(weight: Tensor, u: Tensor, vh: Tensor) -> bool:
    """Whether torch's product is the faster way on the CPU."""
    work, dtype = u.numel() * weight.shape[1], weight.dtype
    return u.dtype == vh.dtype == dtype and work > LOOP.get(dtype, work)


def _alone(write: Any) -> Any:
    """A route of one layer that returns its result."""

    def route(*layer: Tensor) -> Tensor:
        out = layer[0].new_empty(layer[0].shape)
        write(*layer, out)
        return out

    return route


def _kernel(
    weight: Tensor, u: Tensor, s: Tensor, vh: Tensor, shift: Tensor, a: Tensor, out: Tensor
) -> None:
    s, shift = _as_coefficient(s, a), _as_coefficient(shift, a)
    kernels_of(weight).spectral_weights([weight], [u], [s], [vh], [shift], [a], [out])


def _kernels(
    weights: list[Tensor],
    us: list[Tensor],
    ss: list[Tensor],
    vhs: list[Tensor],
    shifts: list[Tensor],
    strengths: list[Tensor],
    outs: list[Tensor],
) -> None:
    if weights:
        ss = [_as_coefficient(s, a) for s, a in zip(ss, strengths, strict=True)]
        shifts = [_as_coefficient(shift, a) for shift, a in zip(shifts, strengths, strict=True)]
        kernels_of(weights[0]).spectral_weights(weights, us, ss, vhs, shifts, strengths, outs)


def _as_coefficient(t: Tensor, strength: Tensor) -> Tensor:
    """In the strength's dtype and without gaps."""
    if t.dtype == strength.dtype and t.is_contiguous():  # a model has hundreds of them
        return t
    return t.to(strength.dtype).contiguous()


def _product(
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    vh: Tensor,
    shift: Tensor,
    a: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """W' in `out` or in new memory, in as few calls of torch as possible: a product of 320 x 320
    leaves nothing of them in the processor's caches, and each one costs some percent of it."""
    s, shift = _as_coefficient(s, a), _as_coefficient(shift, a)
    out = weight.new_empty(weight.shape) if out is None else out  # not for autocast to change
    blocks = 1 if weight.dtype == torch.bfloat16 else -(-s.shape[0] // COMPONENTS)
    if blocks == 1:
        scaled = torch.empty_like(u, memory_format=torch.contiguous_format)
        if kernels.spectral_scale(scaled, u, s, shift, a):
            return torch.addmm(weight, scaled, vh, out=out)
    out.copy_(weight)
    if blocks > 1:
        _add_blocks(out, u, s, vh, shift, a, -(-s.shape[0] // blocks))
    return out


def _add_blocks(
    out: Tensor, u: Tensor, s: Tensor, vh: Tensor, shift: Tensor, a: Tensor, most: int
) -> None:
    """In blocks of components, so that little of U diag(c) is alive at a time: blocks of rows would
    have the library rearrange Vᵀ for each of them."""
    memory = u.new_empty(len(u) * most)
    for first in range(0, len(s), most):
        part = slice(first, first + most)
        block = u[:, part]
        scaled = memory[: block.numel()].view(block.shape)
        if kernels.spectral_scale(scaled, block, s[part], shift[part], a):
            out.addmm_(scaled, vh[part])


def _cublas(weight: Tensor, u: Tensor, s: Tensor, vh: Tensor, shift: Tensor, a: Tensor) -> Tensor:
    """Without a look at the coefficients, which would wait for the GPU: at δ = 0 a -0 becomes 0."""
    return torch.addmm(weight, (u * coefficients(s, shift, a)).to(u.dtype), vh)


def dots_of(d: Tensor, u: Tensor, vh: Tensor) -> Tensor:
    """`p_i = u_iᵀ G v_i` of one layer in a backward pass; where that is recorded in its turn
    (`create_graph`), by torch, which can differentiate it."""
    if not torch.is_grad_enabled():
        return spectral_dots([d], [u], [vh])[0]
    wide = gate_dtype(d.dtype)
    with torch.autocast(d.device.type, enabled=False):
        return ((d.to(wide) @ vh.to(wide).t()) * u).sum(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *factors = inputs
    ctx.save_for_backward(*factors)


def _backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the singular values is `p_i = u_iᵀ G v_i`."""
    u, s, vh, shift, strength = ctx.saved_tensors
    d_shift = d_strength = None
    if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
        d_shift, d_strength = shift_gradients(dots_of(d, u, vh), s, shift, strength)
    return d if ctx.needs_input_grad[0] else None, None, None, None, d_shift, d_strength


_reference, _reference_all = spectral_weight, spectral_weights
spectral_weight = define_op(
    spectral_weight,
    fake=_fake,
    plan=_plan,
    setup_context=_setup_context,
    backward=_backward,
)
spectral_weights = define_op(
    spectral_weights, fake=_fake_all, plan=_plan_all, mutates=("outs",), differentiable=False
)
