"""`fold`: every layer's adapters written into weights of their own, in one grouped operator."""

from typing import Any

import torch
from torch import Tensor

from fastlora.ops._define import FLOATS, define_op, expect, expect_tensor, gate_dtype, kernels
from fastlora.ops._device import device_type, kernels_of


def fold(
    weights: list[Tensor],  # each [out, in]
    downs: list[Tensor],  # each [rank, in]
    ups: list[Tensor],  # each [out, rank]
    gates: list[Tensor],  # each [rank]
    outs: list[Tensor],  # each [out, in], written
) -> None:
    """`W' = W + U diag(g) D` for every layer, with a rank, shape and dtype of its own.

    A layer's weight and result share one dtype: float32, float16, bfloat16 or float64 (the CPU
    only); `downs` and `ups` have it too, or float32; gates are float32 (float64 beside float64).
    The sum is accumulated in float32 and rounded once. Components whose gate is 0 are left out:
    with all of them off W' is W bit for bit, whatever U and D hold. On CUDA the layers of one dtype
    are one launch, up to 327 of them; strides are below 2^31 elements there. Tensor cores (16-bit
    weights, sm_80 and newer) take factors in two parts: before it is rounded the sum is off by
    2^-16 of `Σ |u g d|` at most.

    `outs[i]` is `weights[i]` itself or memory of its own; convolutions pass `[out, in * kh * kw]`
    views. Not differentiable: it runs as under `no_grad`, and the version counters of `outs` rise.
    Raises ContractError (a ValueError) naming argument, expected, got.
    """
    with torch.no_grad():
        for weight, down, up, gate, out in zip(weights, downs, ups, gates, outs, strict=True):
            wide, active = gate_dtype(weight.dtype), gate != 0
            if active.any():
                factors = (up[:, active].to(wide) * gate[active]).to(weight.dtype)
                out.copy_(weight + factors @ down[active].to(weight.dtype))
            else:
                out.copy_(weight)


def _fake(
    weights: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    gates: list[Tensor],
    outs: list[Tensor],
) -> None:
    lists = {"weights": weights, "downs": downs, "ups": ups, "gates": gates, "outs": outs}
    for name, tensors in lists.items():
        count = f"a list of {len(weights)} tensors, one for each layer"
        expect(len(tensors) == len(weights), "fold", name, count, f"{len(tensors)} tensors")
    for i, layer in enumerate(zip(weights, downs, ups, gates, outs, strict=True)):
        if not _holds(*layer):
            _explain(i, *layer)


def _holds(weight: Any, down: Any, up: Any, gate: Any, out: Any) -> bool:
    """The contract of one layer without its messages: a model has hundreds of them."""
    try:
        rows, features = shape = weight.shape
        (rank,) = gate.shape
        dtype = weight.dtype
        wide = gate_dtype(dtype)
        return (
            out.shape == shape
            and up.shape == (rows, rank)
            and down.shape == (rank, features)
            and dtype in FLOATS
            and out.dtype == dtype
            and gate.dtype == wide
            and down.dtype in (dtype, wide)
            and up.dtype in (dtype, wide)
        )
    except (AttributeError, TypeError, ValueError):
        return False


def _explain(i: int, weight: Any, down: Any, up: Any, gate: Any, out: Any) -> None:
    op = "fold"
    named = {"weights": weight, "downs": down, "ups": up, "gates": gate, "outs": out}
    for name, value in named.items():
        expect_tensor(op, f"{name}[{i}]", value)
    expect(weight.dim() == 2, op, f"weights[{i}]", "[out, in]", weight)
    floats = "float32, float16, bfloat16 or float64"
    expect(weight.dtype in FLOATS, op, f"weights[{i}]", floats, weight)
    (rows, features), dtype, wide = weight.shape, weight.dtype, gate_dtype(weight.dtype)
    rank = up.shape[1] if up.dim() == 2 else -1
    one_row = "[rank]; a strength that differs per sample cannot be folded"
    expect(gate.dim() == 1, op, f"gates[{i}]", one_row, gate)
    for name, value, shape, dtypes in (
        ("ups", up, (rows, max(rank, 0)), (dtype, wide)),
        ("downs", down, (rank, features), (dtype, wide)),
        ("gates", gate, (rank,), (wide,)),
        ("outs", out, (rows, features), (dtype,)),
    ):
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))
        good = tuple(value.shape) == shape and value.dtype in dtypes
        expect(good, op, f"{name}[{i}]", f"{allowed} {list(shape)}", value)


def _plan(weights: list[Tensor], *rest: Any) -> Any:
    for i, weight in enumerate(weights):
        if device_type(weight) == "cuda" and weight.dtype == torch.float64:
            expect(False, "fold", f"weights[{i}]", "float32, float16 or bfloat16 on CUDA", weight)
    return kernels_of(weights[0]).fold if weights else kernels.fold


fold = define_op(fold, fake=_fake, plan=_plan, mutates=("outs",), differentiable=False)
