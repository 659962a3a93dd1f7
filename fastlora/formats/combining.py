"""Sums of adapter files: `ΔW = Σ strength · ΔW_file`, low-rank ones by concatenation along rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastlora.formats.changes import Change, Dense, Hadamard, Kronecker, LowRank, Shift, Target
from fastlora.formats.compressing import as_product
from fastlora.formats.files import FormatError
from fastlora.formats.measures import (
    common_dtype,
    groups_of,
    kernel_of,
    own_rows,
    shape_of,
    widened,
    working_dtype,
)

Changes = Mapping[Target, Change]
Weight = LowRank | Hadamard | Kronecker | Dense | Shift
Share = tuple[Change, float]  # of a file: what it changes, and its strength


def concatenate(files: Sequence[Changes], strengths: Sequence[float]) -> dict[Target, Change]:
    """What the files change together, each at its strength: `combined` for every module.

    Raises FormatError for strengths that are 0 or not finite, and what `shares_of` and `combined`
    raise.
    """
    return {t: combined(t, own) for t, own in shares_of(files, strengths).items()}


def shares_of(files: Sequence[Changes], strengths: Sequence[float]) -> dict[Target, list[Share]]:
    """What each file changes in a module, by module.

    Raises FormatError for strengths that are 0 or not finite, and where it cannot be told which
    modules are the same.
    """
    _require_same_components(files)
    shares: dict[Target, list[Share]] = {}
    for changes, strength in zip(_with_same_names(files), strengths, strict=True):
        if not math.isfinite(strength) or strength == 0:
            raise FormatError(f"strength: expected a finite number that is not 0, got {strength}")
        for target, change in changes.items():
            shares.setdefault(target, []).append((change, strength))
    return shares


def combined(target: Target, shares: Sequence[Share]) -> Change:
    """The sum of a module's changes.

    A single one keeps its tensors, and the strength goes into alpha where there is one. LoRAs (and
    LoHas that are LoRAs of rank r²) become one whose rank is the sum of theirs: factors
    `strength · ratio` go into alpha if the other `up`s can have their quotients without loss in
    their dtype, else into `up`, in float32. With others among them the sum is dense, in float32.
    Biases are added.

    Raises FormatError naming the module for several changes with DoRA or spectral shifts, which
    cannot be added without the model, and for weights of different shapes.
    """
    try:
        return scaled(*shares[0]) if len(shares) == 1 else _sum(target, shares)
    except FormatError as error:
        raise FormatError(f"{target}: {error}") from None


def scaled(change: Change, strength: float) -> Change:
    """The change that at strength 1 is this one at `strength`; of DoRA the magnitude stays."""
    if strength == 1:
        return change
    bias = None if change.bias is None else times(change.bias, strength)
    return dataclasses.replace(change, weight=_scaled_weight(change.weight, strength), bias=bias)


def without_alpha(change: Change) -> Change:
    """The same with a ratio of 1, for formats that have no other: `up` has it (`times`)."""
    weight = change.weight
    if not isinstance(weight, LowRank) or weight.ratio == 1:
        return change
    up = times(weight.up, weight.ratio)
    dtype = common_dtype([up, weight.down])
    fields = {"up": up.to(dtype), "down": weight.down.to(dtype), "alpha": None}
    if weight.mid is not None:
        fields["mid"] = weight.mid.to(dtype)
    weight = dataclasses.replace(weight, **fields, rank_stabilized=False)
    return dataclasses.replace(change, weight=weight)


def times(tensor: Tensor, factor: float) -> Tensor:
    """`factor · tensor`: in its dtype if nothing is lost, else rounded once, to float32 (float64).

    Nothing is lost with a power of two, unless elements leave the dtype's range.
    """
    if factor == 1:
        return tensor
    wide = tensor.to(working_dtype(tensor)) * factor
    narrow = wide.to(tensor.dtype)
    return narrow if torch.equal(narrow.to(wide.dtype), wide) else wide


def _scaled_weight(weight: Weight | None, strength: float) -> Weight | None:
    if isinstance(weight, LowRank):
        up, alpha = _signed(weight.up, strength), abs(strength) * weight.ratio * weight.rank
        return dataclasses.replace(weight, up=up, alpha=alpha, rank_stabilized=False)
    if isinstance(weight, Hadamard):
        alpha = abs(strength) * weight.ratio * weight.rank
        return dataclasses.replace(weight, w1_a=_signed(weight.w1_a, strength), alpha=alpha)
    if isinstance(weight, Kronecker):
        return _scaled_kronecker(weight, strength)
    if isinstance(weight, Dense):
        return Dense(times(weight.diff, strength))
    if isinstance(weight, Shift):
        return dataclasses.replace(weight, shift=times(weight.shift, strength))
    return None


def _scaled_kronecker(weight: Kronecker, strength: float) -> Kronecker:
    name = "w1_a" if weight.w1 is None else "w1"
    factor = getattr(weight, name)
    if weight.rank is None:  # the ratio is 1 whatever alpha says
        return dataclasses.replace(weight, **{name: times(factor, strength)})
    alpha = abs(strength) * weight.ratio * weight.rank
    return dataclasses.replace(weight, **{name: _signed(factor, strength)}, alpha=alpha)


def _signed(tensor: Tensor, strength: float) -> Tensor:
    """Alphas stay positive: a file's negative alpha is more than other programs expect."""
    return tensor if strength > 0 else -tensor


def _sum(target: Target, shares: Sequence[Share]) -> Change:
    changes = [change for change, _ in shares]
    if any(change.magnitude is not None for change in changes):
        raise FormatError(
            "several changes, one of them with DoRA's magnitude, cannot be added without the "
            "model's weights; `fastlora fold` adds to a model one after the other"
        )
    if any(isinstance(change.weight, Shift) for change in changes):
        raise FormatError("spectral shifts cannot be added without the model's weights")
    biases = [times(c.bias, s) for c, s in shares if c.bias is not None]
    bias = None
    if biases:
        _require_same("biases", [tuple(b.shape) for b in biases])
        bias = torch.stack([b.to(common_dtype(biases)) for b in biases]).sum(0)
    return dataclasses.replace(_sum_of_weights(target, shares), bias=bias)


def _sum_of_weights(target: Target, shares: Sequence[Share]) -> Change:
    shares = [share for share in shares if share[0].weight is not None]
    if not shares:
        return Change(None)
    shapes = [shape_of(change) for change, _ in shares]
    _require_same("weights", [(shape[0], math.prod(shape[1:])) for shape in shapes])
    shape = max(shapes, key=len)  # a matrix may stand for a convolution's weight
    if kernel := kernel_of(target, shares[0][0]) if len(shape) == 2 else ():
        shape = (shape[0], shape[1] // math.prod(kernel), *kernel)
    found = [_as_low_rank(change) for change, _ in shares]
    low_rank = [weight for weight in found if weight is not None]
    if len(low_rank) < len(shares) or len({weight.embedding for weight in low_rank}) > 1:
        return Change(Dense(sum((c.delta(shape) * s for c, s in shares), torch.zeros(shape))))
    rows = {change.rows for change, _ in shares}
    if len(rows) > 1:
        low_rank = [own_rows(w, c.rows) for w, (c, _) in zip(low_rank, shares, strict=True)]
    strengths = [strength for _, strength in shares]
    return Change(_cat(low_rank, strengths, shape), rows=rows.pop() if len(rows) == 1 else None)


def _as_low_rank(change: Change) -> LowRank | None:
    weight = change.weight
    if isinstance(weight, Hadamard):
        return as_product(weight, working_dtype(*weight.tensors().values()))
    return weight if isinstance(weight, LowRank) else None


def _cat(weights: Sequence[LowRank], strengths: Sequence[float], shape: tuple[int, ...]) -> LowRank:
    """One of the summed rank; a grouped convolution's ranks are interleaved group by group."""
    weights = [widened(weight) for weight in weights]
    groups = groups_of(weights[0])
    _require_same("groups", [(groups_of(weight),) for weight in weights])
    factors = [s * weight.ratio for s, weight in zip(strengths, weights, strict=True)]
    dtype = common_dtype(t for w in weights for t in (w.up, w.down))
    # With the first factor in alpha, the first `up` stays as it is; for the others there is hope.
    common = abs(factors[0]) or 1.0
    ups = [times(w.up, f / common) for w, f in zip(weights, factors, strict=True)]
    if common_dtype(ups) != dtype:
        common = 1.0
        ups = [times(w.up, f) for w, f in zip(weights, factors, strict=True)]
    downs = [weight.down.unflatten(0, (groups, -1)).flatten(2) for weight in weights]
    dtype = common_dtype([*ups, *downs])  # one for both: what computes with them wants that
    down = torch.cat([d.to(dtype) for d in downs], 1).flatten(0, 1)
    up = torch.cat([u.flatten(1).to(dtype) for u in ups], 1)
    kernel = () if weights[0].embedding else shape[2:]
    return LowRank(
        down.reshape(len(down), -1, *kernel),
        up.reshape(*up.shape, *[1] * len(kernel)),
        common * len(down),
        embedding=weights[0].embedding,
    )


def _require_same(what: str, shapes: Sequence[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        shown = " and ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise FormatError(f"expected {what} of one shape in all files, got {shown}")


def _with_same_names(files: Sequence[Changes]) -> list[Changes]:
    """A flat path becomes the one with dots that another file has for the same module."""
    dotted = {
        (target.component, target.path.replace(".", "_")): target
        for changes in files
        for target in changes
        if not target.flat
    }
    return [
        {dotted.get(t[:2], t) if t.flat else t: change for t, change in changes.items()}
        for changes in files
    ]


def _require_same_components(files: Sequence[Changes]) -> None:
    """A model's own file and a pipeline's cannot be told to mean the same module."""
    named = [sorted({target.component for target in changes}) for changes in files]
    if any("" in names for names in named) and any(any(names) for names in named):
        shown = " and ".join(str(names) for names in named)
        raise FormatError(
            "expected files that all name the parts of a pipeline, or none, got parts "
            f"{shown}; --component says which part '' is"
        )
