"""`spectral_dots`: the gradients of singular values, for every layer of a model at once."""

from typing import Any

import torch
from torch import Tensor

from fastlora.ops._define import FLOATS, define_op, expect, expect_tensor, gate_dtype, kernels
from fastlora.ops._device import device_type, kernels_of

# Elements of G V that are alive at a time on the CPU.
BLOCK = 1 << 20
# On a GPU: what so many rows contribute is summed before anything is written.
ROWS = 32


def spectral_dots(
    grads: list[Tensor],  # each [out, in]
    us: list[Tensor],  # each [out, rank]
    vhs: list[Tensor],  # each [rank, in]
) -> list[Tensor]:  # each [rank]
    """`p_i = u_iᵀ G v_i` for every layer: the gradient of `⟨G, U diag(c) Vᵀ⟩` by c.

    Layers have ranks, shapes and dtypes of their own, and lie on one device: G in float32, float16,
    bfloat16 or float64 (the CPU only), `us` and `vhs` too, or float32. The result is float32
    (float64 beside float64), the same bits every time, alone and in a list. The product `G V`
    is never stored: on the CPU a block of its rows is; on CUDA each block of threads sums its tile
    in float32, and a second kernel adds what the tiles of a column have found, in order. Not
    differentiable. Raises ContractError (a ValueError) naming argument, expected, got.
    """
    found = []
    with torch.no_grad():
        for grad, u, vh in zip(grads, us, vhs, strict=True):
            product = grad.to(vh.dtype) @ vh.t()
            found.append((product.to(u.dtype) * u).sum(0).to(gate_dtype(grad.dtype)))
    return found


def _fake(grads: list[Tensor], us: list[Tensor], vhs: list[Tensor]) -> list[Tensor]:
    op = "spectral_dots"
    for name, tensors in (("us", us), ("vhs", vhs)):
        count = f"a list of {len(grads)} tensors, one for each layer"
        expect(len(tensors) == len(grads), op, name, count, f"{len(tensors)} tensors")
    for i, layer in enumerate(zip(grads, us, vhs, strict=True)):
        if not _holds(*layer):
            _explain(i, *layer)
    layers = zip(grads, us, strict=True)
    return [g.new_empty(u.shape[1], dtype=gate_dtype(g.dtype)) for g, u in layers]


def _holds(grad: Any, u: Any, vh: Any) -> bool:
    """The contract of one layer without its messages: a model has hundreds of them."""
    try:
        rows, features = grad.shape
        _, rank = u.shape
        dtypes = (grad.dtype, gate_dtype(grad.dtype))
        return (
            u.shape[0] == rows
            and vh.shape == (rank, features)
            and grad.dtype in FLOATS
            and u.dtype in dtypes
            and vh.dtype in dtypes
        )
    except (AttributeError, TypeError, ValueError):
        return False


def _explain(i: int, grad: Any, u: Any, vh: Any) -> None:
    op = "spectral_dots"
    for name, value in (("grads", grad), ("us", u), ("vhs", vh)):
        expect_tensor(op, f"{name}[{i}]", value)
    expect(grad.dim() == 2, op, f"grads[{i}]", "[out, in]", grad)
    floats = "float32, float16, bfloat16 or float64"
    expect(grad.dtype in FLOATS, op, f"grads[{i}]", floats, grad)
    (rows, features), wide = grad.shape, gate_dtype(grad.dtype)
    rank = u.shape[1] if u.dim() == 2 else -1
    for name, value, shape in (("us", u, (rows, rank)), ("vhs", vh, (rank, features))):
        dtypes = dict.fromkeys((grad.dtype, wide))
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        good = rank >= 0 and tuple(value.shape) == shape and value.dtype in dtypes
        expect(good, op, f"{name}[{i}]", f"{allowed} {list(shape)}", value)


def _plan(grads: list[Tensor], us: list[Tensor], vhs: list[Tensor]) -> Any:
    kinds = {device_type(g) for g in grads}
    if kinds == {"cpu"}:
        ways = [_way(*layer) for layer in zip(grads, us, vhs, strict=True)]
        return lambda *lists: [way(*layer) for way, *layer in zip(ways, *lists, strict=True)]
    if kinds != {"cuda"}:
        return _reference
    for i, grad in enumerate(grads):
        good = grad.dtype != torch.float64
        expect(good, "spectral_dots", f"grads[{i}]", "float32, float16 or bfloat16 on CUDA", grad)
    kernel = kernels_of(grads[0]).spectral_dots
    room = sum(-(-u.shape[0] // ROWS) * u.shape[1] for u in us)

    def route(grads: list[Tensor], us: list[Tensor], vhs: list[Tensor]) -> list[Tensor]:
        at: dict[str, Any] = {"dtype": torch.float32, "device": grads[0].device}
        sums = [torch.empty(u.shape[1], **at) for u in us]
        kernel(sums, torch.empty(room, **at), grads, us, vhs)
        return sums

    return route


def _way(grad: Tensor, u: Tensor, vh: Tensor) -> Any:
    same = grad.dtype == u.dtype == vh.dtype
    return _at_once if same and u.numel() <= BLOCK else _by_blocks


def _at_once(grad: Tensor, u: Tensor, vh: Tensor) -> Tensor:
    """As few calls of torch as possible: a product of 320 x 320 leaves nothing of them in the
    processor's caches, and each one costs some percent of it."""
    sums = torch.zeros(u.shape[1], dtype=gate_dtype(grad.dtype))
    product = torch.mm(
        grad, vh.t(), out=u.new_empty(u.shape)
    )  # `out` is not for autocast to change
    kernels.dots_of_product(sums, product, u)
    return sums


def _by_blocks(grad: Tensor, u: Tensor, vh: Tensor) -> Tensor:
    (out, rank), sums = u.shape, torch.zeros(u.shape[1], dtype=torch.float64)
    blocks = -(-u.numel() // BLOCK)
    rows = -(-out // max(blocks, 1))
    products = vh.new_empty(rows, rank)
    for first in range(0, out, max(rows, 1)):
        part = grad[first : first + rows].to(vh.dtype)
        product = torch.mm(part, vh.t(), out=products[: len(part)])
        kernels.dots_of_product(sums, product, u[first : first + rows].to(vh.dtype))
    return sums.to(gate_dtype(grad.dtype))


_reference = spectral_dots
spectral_dots = define_op(spectral_dots, fake=_fake, plan=_plan, differentiable=False)
