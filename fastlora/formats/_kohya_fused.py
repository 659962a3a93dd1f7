"""Fused projections: a name of the original FLUX is several modules elsewhere, rows of it each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastlora.formats.changes import Change, Dense, LowRank, Target
from fastlora.formats.files import FormatError
from fastlora.formats.measures import shape_of, working_dtype
from fastlora.formats.names import Place
from fastlora.formats.part_shapes import Weight, rows


def split(change: Change, places: Sequence[Place]) -> dict[Target, Change] | str:
    """The Change of every place, or in words why there is none.

    Low-rank updates share `down` and have views of `up`; others have `Change.rows`.
    """
    parts = places[0].total
    if parts == 1:
        return {place.target: change for place in places}
    if change.magnitude is not None and change.axis == "in":
        return "norms over the rows of several modules: each would need the others' weights"
    count = _rows(change)
    if count % parts:
        return f"{count} rows, which are not {parts} equal parts for {len(places)} modules"
    size = count // parts
    return {p.target: _share(change, p.first * size, p.last * size, count) for p in places}


class Share(NamedTuple):
    """A module that has the rows [first, last) of `total` of a fused one."""

    target: Target
    change: Change
    first: int
    last: int
    total: int


def join(name: str, shares: Sequence[Share]) -> Change:
    """The Change of the fused module `name`; rows that no share has do not change.

    `shares` count rows in equal parts, as a Place does. Low-rank updates with the same `down` stay
    one, others become blocks whose ranks add up. Shares of other updates, where they are no longer
    those of one, become a full difference. Raises FormatError where that would not be the same.
    """
    shares = _in_rows(name, [s._replace(change=_without_rows(s.change)) for s in shares])
    weights = [s.change.weight for s in shares]
    weight, kinds = None, {type(w) for w in weights if w is not None}
    if kinds == {LowRank}:
        weight = _low_rank(name, shares)
    elif kinds == {Dense}:
        diffs = [w.diff if isinstance(w, Dense) else None for w in weights]
        weight = Dense(cast(Tensor, _stacked(name, shares, diffs)))
    elif kinds:
        weight = _whole(name, shares)
    bias = _stacked(name, shares, [share.change.bias for share in shares])
    return Change(weight, bias, _magnitude(name, shares))


def _rows(change: Change) -> int:
    if change.rows is not None:
        return change.rows[1] - change.rows[0]
    if change.weight is None:
        return 0 if change.bias is None else change.bias.shape[0]
    return rows(cast(Weight, change.weight))


def _share(change: Change, first: int, last: int, total: int) -> Change:
    bias = None if change.bias is None else change.bias[first:last]
    magnitude = None if change.magnitude is None else change.magnitude[first:last]
    share = replace(change, bias=bias, magnitude=magnitude, rows=(first, last, total))
    return _without_rows(share) if isinstance(change.weight, LowRank) else share


def _without_rows(change: Change) -> Change:
    """The same with the rows' own update, where it can be told from the update of all."""
    weight = change.weight
    if change.rows is None or not isinstance(weight, LowRank | Dense | None):
        return change
    first, last, _ = change.rows
    if isinstance(weight, LowRank):
        weight = replace(weight, up=weight.up[first:last])
    elif weight is not None:
        weight = Dense(weight.diff[first:last])
    return replace(change, weight=weight, rows=None)


def _in_rows(name: str, shares: Sequence[Share]) -> list[Share]:
    """The shares in order, counted in rows."""
    sizes = {divmod(_rows(s.change), s.last - s.first) for s in shares}
    size, rest = sizes.pop()
    if sizes or rest:
        found = ", ".join(
            f"{s.target} {_rows(s.change)} for {s.last - s.first} of {s.total} parts"
            for s in shares
        )
        raise FormatError(f"{name}: expected equal parts of its rows, got {found}")
    return [
        s._replace(first=s.first * size, last=s.last * size, total=s.total * size)
        for s in sorted(shares, key=lambda s: s.first)
    ]


def _stacked(name: str, shares: Sequence[Share], tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors in their shares' rows, zeros elsewhere; None where there are none."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not given:
        return None
    _alike(name, shares, [tensor.shape[1:] for tensor in given])
    shape = (shares[0].total, *given[0].shape[1:])
    whole = given[0].new_zeros(shape, dtype=_widest(given))
    for share, tensor in zip(shares, tensors, strict=True):
        if tensor is not None:
            whole[share.first : share.last] = tensor
    return whole


def _magnitude(name: str, shares: Sequence[Share]) -> Tensor | None:
    magnitudes = [s.change.magnitude for s in shares if s.change.magnitude is not None]
    if not magnitudes:
        return None
    if any(share.change.axis == "in" for share in shares):
        raise FormatError(
            f"{name}: DoRA's norms along the inputs of {_named(shares)} are not those of all rows; "
            "fold the adapter into the model and extract a LoRA instead"
        )
    if len(magnitudes) < len(shares) or not _complete(shares):
        raise FormatError(
            f"{name}: expected a DoRA magnitude of all its parts or none, got only some among "
            f"{_named(shares)}; fold the adapter into the model and extract a LoRA instead"
        )
    return _stacked(name, shares, magnitudes)


def _low_rank(name: str, shares: Sequence[Share]) -> LowRank:
    """`up down` with each different `down` once, and what each share makes of it in its rows.

    One ratio is alpha's; where another share has another one, its `up` is scaled by the quotient,
    and becomes float32 if its dtype cannot hold that.
    """
    members = [(s, s.change.weight) for s in shares if isinstance(s.change.weight, LowRank)]
    _alike(name, shares, [(*w.down.shape[1:], *w.up.shape[2:]) for _, w in members])
    downs: list[Tensor] = []
    blocks: list[int] = []  # which of the downs a member has
    for share, weight in members:
        if weight.mid is not None:
            raise FormatError(f"{share.target}: a Tucker update cannot be joined to {name}")
        same = [i for i, down in enumerate(downs) if _equal(down, weight.down)]
        blocks.append(same[0] if same else len(downs))
        downs += [] if same else [weight.down]
    ratio = members[0][1].ratio
    ups = [_scaled(weight.up, weight.ratio / ratio) for _, weight in members]
    starts = [sum(down.shape[0] for down in downs[:i]) for i in range(len(downs) + 1)]
    shape = (shares[0].total, starts[-1], *ups[0].shape[2:])
    whole = ups[0].new_zeros(shape, dtype=_widest(ups))
    for (share, _), block, up in zip(members, blocks, ups, strict=True):
        whole[share.first : share.last, starts[block] : starts[block + 1]] = up
    return LowRank(torch.cat(downs), whole, alpha=ratio * starts[-1])


def _whole(name: str, shares: Sequence[Share]) -> Weight:
    """The update of which the shares have the rows, where they are all that was split; else what
    they are together, dense."""
    first = shares[0].change.weight
    split = all(
        s.change.rows == (s.first, s.last, s.total) and _same(s.change.weight, first)
        for s in shares
    )
    if split and _complete(shares):
        return cast(Weight, first)
    updates = [None if s.change.weight is None else dense(s.target, s.change) for s in shares]
    return Dense(cast(Tensor, _stacked(name, shares, [u and u.diff for u in updates])))


def dense(target: Target, change: Change) -> Dense:
    """The update of a module's own rows, in float32 at least. Raises FormatError for DoRA."""
    weight = change.weight
    assert weight is not None
    if change.magnitude is not None:
        raise FormatError(
            f"{target}: LyCORIS has DoRA of factors only, and this {change.kind}, of some rows of a"
            " fused module, has none of its own; fold the adapter into the model and extract what "
            "has changed"
        )
    return Dense(change.delta(shape_of(change), working_dtype(*weight.tensors().values())))


def _same(weight: object, other: object) -> bool:
    if weight is other:
        return True
    if type(weight) is not type(other):
        return False
    fields, others = vars(weight), vars(other)
    return all(
        _equal(value, others[key]) if isinstance(value, Tensor) else value == others[key]
        for key, value in fields.items()
    )


def _equal(tensor: Tensor, other: object) -> bool:
    if tensor is other:
        return True
    same = isinstance(other, Tensor) and tensor.dtype == other.dtype
    return same and torch.equal(tensor, cast(Tensor, other))


def _scaled(up: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return up
    exact = up.double() * factor
    scaled = exact.to(up.dtype)
    return scaled if torch.equal(scaled.double(), exact) else exact.float()


def _alike(name: str, shares: Sequence[Share], inputs: Sequence[tuple[int, ...]]) -> None:
    if len(set(inputs)) > 1:
        sizes = ", ".join(str(list(size)) for size in inputs)
        raise FormatError(f"{name}: expected the same inputs of {_named(shares)}, got {sizes}")


def _complete(shares: Sequence[Share]) -> bool:
    return sum(share.last - share.first for share in shares) == shares[0].total


def _named(shares: Sequence[Share]) -> str:
    return ", ".join(str(share.target) for share in shares)


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
