"""Which shapes the parts of an update have to have, and the size of the weight that they tell."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fastlora.formats.changes import Dense, Hadamard, Kronecker, LowRank
from fastlora.formats.files import FormatError

Weight = LowRank | Hadamard | Kronecker | Dense


def check(name: str, kind: type[Weight], parts: Mapping[str, Tensor]) -> None:
    """Raises FormatError naming the module where parts of `kind` are missing or do not fit."""
    if kind is LowRank:
        _check_low_rank(name, parts)
    elif kind is Hadamard:
        _check_hadamard(name, parts)
    elif kind is Kronecker:
        _check_kronecker(name, parts)
    elif parts["diff"].dim() == 0:
        raise FormatError(f"{name}: expected an update with dimensions, got one number")


def rows(weight: Weight) -> int:
    """The first dimension of the weight that is updated."""
    if isinstance(weight, LowRank):
        return weight.up.shape[0]
    if isinstance(weight, Hadamard):
        return weight.w1_a.shape[0 if weight.t1 is None else 1]
    if isinstance(weight, Dense):
        return weight.diff.shape[0]
    return _left(weight)[0] * _right(weight)[0]


def has_inputs(weight: Weight, count: int) -> bool:
    """Whether the weight's second dimension may be `count`; a matrix may have a kernel in it."""
    if isinstance(weight, LowRank):
        return weight.down.shape[1] == count
    if isinstance(weight, Dense):
        return weight.diff.shape[1:2] == (count,)
    if isinstance(weight, Kronecker):
        columns = _left(weight)[1] * math.prod(_right(weight)[1:])
    else:
        columns = weight.w1_b.shape[1]
    return count > 0 and columns % count == 0


def dims(weight: Weight) -> int | None:
    """The number of the weight's dimensions; None where a kernel may have been flattened."""
    if isinstance(weight, LowRank):
        return weight.down.dim() if weight.mid is None else weight.mid.dim()
    if isinstance(weight, Dense):
        return weight.diff.dim()
    core = weight.t1 if isinstance(weight, Hadamard) else weight.t2
    if core is None and isinstance(weight, Kronecker):
        core = weight.w2
    return None if core is None else core.dim()


def _left(weight: Kronecker) -> tuple[int, ...]:
    if weight.w1 is not None:
        return tuple(weight.w1.shape)
    assert weight.w1_a is not None and weight.w1_b is not None
    return (weight.w1_a.shape[0], weight.w1_b.shape[1])


def _right(weight: Kronecker) -> tuple[int, ...]:
    if weight.w2 is not None:
        return tuple(weight.w2.shape)
    assert weight.w2_a is not None and weight.w2_b is not None
    if weight.t2 is None:
        return (weight.w2_a.shape[0], weight.w2_b.shape[1])
    return (weight.w2_a.shape[1], weight.w2_b.shape[1], *weight.t2.shape[2:])


def _check_low_rank(name: str, parts: Mapping[str, Tensor]) -> None:
    _need(name, parts, "lora_down.weight", "lora_up.weight")
    down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    mid = parts.get("lora_mid.weight")
    rank = down.shape[0] if down.dim() else 0
    _expect(name, down.dim() > 1 and rank > 0, "lora_down.weight [rank, in, ...]", down)
    fits = up.dim() > 1 and up.shape[1] == rank and set(up.shape[2:]) <= {1}
    _expect(name, fits, f"lora_up.weight [out, {rank}, 1, ...] for lora_down.weight", up, down)
    if mid is not None:
        fits = mid.dim() > 2 and tuple(mid.shape[:2]) == (rank, rank)
        fits = fits and set(down.shape[2:]) <= {1}
        wanted = f"lora_mid.weight [{rank}, {rank}, ...] for lora_down.weight [{rank}, in, 1, ...]"
        _expect(name, fits, wanted, mid, down)


def _check_hadamard(name: str, parts: Mapping[str, Tensor]) -> None:
    cores = ("hada_t1", "hada_t2") if "hada_t1" in parts or "hada_t2" in parts else ()
    _need(name, parts, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *cores)
    first = _product(name, parts, "hada_w1", "hada_t1")
    second = _product(name, parts, "hada_w2", "hada_t2")
    if first != second:
        raise FormatError(
            f"{name}: expected two factors of one shape, got hada_w1 {list(first)} and hada_w2 "
            f"{list(second)}"
        )


def _check_kronecker(name: str, parts: Mapping[str, Tensor]) -> None:
    for whole, core in (("lokr_w1", None), ("lokr_w2", "lokr_t2")):
        factors = {f"{whole}_a", f"{whole}_b", core} & parts.keys()
        if whole not in parts:
            if not factors:
                raise FormatError(f"{name}: no {whole} beside {sorted(parts)}")
            _need(name, parts, f"{whole}_a", f"{whole}_b")
            _product(name, parts, whole, core)
        elif factors:
            raise FormatError(f"{name}: expected {whole} or its factors, got both")
        else:
            dims = parts[whole].dim()
            fits = dims == 2 or (dims > 2 and core is not None)
            _expect(name, fits, f"{whole} [n, m{', ...' if core else ''}]", parts[whole])


def _product(
    name: str, parts: Mapping[str, Tensor], factor: str, core_name: str | None
) -> tuple[int, ...]:
    """The shape of `a b`; with a core [rank, rank, ...] that of `aᵀ core b`."""
    a, b = parts[f"{factor}_a"], parts[f"{factor}_b"]
    core = parts.get(core_name) if core_name else None
    fits = a.dim() == 2 and b.dim() == 2 and b.shape[0] > 0
    if core is None:
        fits = fits and a.shape[1] == b.shape[0]
        _expect(name, fits, f"{factor}_a [n, rank] and {factor}_b [rank, m]", a, b)
        return (a.shape[0], b.shape[1])
    fits = fits and core.dim() > 2 and tuple(core.shape[:2]) == (a.shape[0], b.shape[0])
    wanted = f"{factor}_a [rank, n], {factor}_b [rank, m] and {core_name} [rank, rank, ...]"
    _expect(name, fits, wanted, a, b, core)
    return (a.shape[1], b.shape[1], *core.shape[2:])


def _need(name: str, parts: Mapping[str, Tensor], *wanted: str) -> None:
    missing = [part for part in wanted if part not in parts]
    if missing:
        raise FormatError(f"{name}: no {' and '.join(missing)} beside {sorted(parts)}")


def _expect(name: str, fits: bool, wanted: str, *got: Tensor) -> None:
    if not fits:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in got)
        raise FormatError(f"{name}: expected {wanted}, got {shapes}")
