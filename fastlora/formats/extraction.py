"""The LoRA between two checkpoints of a model, layer by layer.

`ΔW = tuned - base` in float32 (float64 for such weights), as a matrix [out, in·kh·kw], and of that
the truncated singular value decomposition, the nearest matrix of its rank (Eckart, Young 1936).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.formats.changes import Change, Dense, LowRank, Target
from fastlora.formats.checkpoints import Weights
from fastlora.formats.compressing import compress
from fastlora.formats.files import FormatError

# Modules whose weight is a table of rows, a row for each index: nn.Embedding.
EMBEDDINGS = ("token_embedding", "position_embedding", "embed_tokens", "shared", "embedding_table")
EMBEDDINGS += ("relative_attention_bias", "word_embeddings", "position_embeddings")
BUFFERS = ("position_ids",)  # which some versions of transformers store and others do not


class Difference(NamedTuple):
    """One module: what it differs in."""

    target: Target
    weight: Tensor | None  # tuned - base, in the weight's shape; None: equal
    vectors: dict[str, Tensor]  # likewise of all that is no matrix: norms' weights, biases, others
    dtype: torch.dtype  # of the tuned weight


class Extracted(NamedTuple):
    """One module's update at a rank."""

    weight: LowRank
    lost: float  # Frobenius norm of what is missing, rounding included
    norm: float  # of ΔW


def is_embedding(path: str) -> bool:
    return path.rpartition(".")[2] in EMBEDDINGS


def require_alike(base: Weights, tuned: Weights) -> None:
    """Raises FormatError naming parameters that one of the two lacks, shapes that differ, and for
    weights that are stored transposed, of which no LoRA of the modules would be made."""
    if base.has_conv1d:
        raise FormatError(
            "expected weights [out, in], got layers stored [in, out] (Conv1D of transformers)"
        )
    sets = [
        {(t, n) for t, names in w.modules.items() for n in names if n not in BUFFERS}
        for w in (base, tuned)
    ]
    for have, other, where in ((0, 1, "base"), (1, 0, "tuned")):
        only = sorted(f"{t}.{n}" for t, n in sets[have] - sets[other])
        if only:
            raise FormatError(f"only the {where} model has {_some(only)}: these are other models")
    differ = [
        f"{t}.{n} {list(base.shape(t, n))} and {list(tuned.shape(t, n))}"
        for t, n in sorted(sets[0])
        if base.shape(t, n) != tuned.shape(t, n)
    ]
    if differ:
        raise FormatError(f"expected equal shapes, got {_some(differ)} (base and tuned)")


def differences(base: Weights, tuned: Weights) -> Iterator[Difference]:
    """Every module of two alike checkpoints; the tensors of one are in memory at a time."""
    for target, parameters in base.modules.items():
        found: dict[str, Tensor] = {}
        dtype = torch.float32
        for name in parameters:
            if name in BUFFERS:
                continue
            pair = base.parameter(target, name), tuned.parameter(target, name)
            if name == "weight":
                dtype = pair[1].dtype
            if (update := difference(*pair)) is not None:
                found[name] = update
        weight = found.pop("weight", None) if "weight" in found else None
        if weight is not None and weight.dim() < 2:
            found["weight"], weight = weight, None
        yield Difference(target, weight, found, dtype)


def difference(base: Tensor, tuned: Tensor) -> Tensor | None:
    """`tuned - base` in float32, or float64 where one has that; None where they are equal."""
    wide = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    update = tuned.to(wide, copy=True).sub_(base)
    return update if update.any() else None


def extract(found: Difference, rank: int, dtype: torch.dtype | None = None) -> Extracted:
    """The LoRA of at most `rank` nearest to a module's update: alpha is its rank, both factors have
    the roots of the singular values; in `dtype`, the tuned weight's if None.

    Raises FormatError for values that the dtype has not.
    """
    assert found.weight is not None
    dtype = dtype or (found.dtype if found.dtype.itemsize > 1 else torch.float16)
    embedding = is_embedding(found.target.path)
    matrix = found.weight.t() if embedding else found.weight
    made = compress(Change(Dense(matrix)), rank, dtype)
    if not math.isfinite(made.lost):
        raise FormatError(f"{found.target}: its update is beyond {dtype}")
    weight = dataclasses.replace(made.weight, alpha=float(made.weight.rank), embedding=embedding)
    return Extracted(weight, made.lost, made.norm)


def with_vectors(
    change: Change | None, vectors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Change | None, list[str]]:
    """The change with full differences of a norm's weight and a bias, and the names of the others,
    which no format has."""
    weight = None if change is None else change.weight
    if "weight" in vectors:
        weight = Dense(vectors["weight"].to(dtype))
    bias = vectors["bias"].to(dtype) if "bias" in vectors else None
    others = sorted(set(vectors) - {"weight", "bias"})
    return (None if weight is None and bias is None else Change(weight, bias)), others


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
