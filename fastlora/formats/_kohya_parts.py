"""What kohya's and LyCORIS' files have for one module, `<name>.<part>`, and the Change it makes.

| part | |
|---|---|
| `lora_down.weight`, `lora_up.weight`, `lora_mid.weight`, `lora_up.bias` | LoRA, LoCon: LowRank |
| `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`, `hada_t1`, `hada_t2` | LoHa: Hadamard |
| `lokr_w1` or `lokr_w1_a`, `lokr_w1_b`; so for w2; `lokr_t2` | LoKr: Kronecker |
| `diff`, or `w_norm` of a norm | full: Dense |
| `diff_b`, or `b_norm` of a norm | what is added to the bias |
| `alpha` | one number; missing or 0 means rank |
| `dora_scale` | DoRA's magnitude, [out, 1, ...] or [1, in, 1, ...] |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from fastlora.formats.changes import Change, Dense, Hadamard, Kronecker, LowRank
from fastlora.formats.files import FormatError
from fastlora.formats.part_shapes import Weight, check, has_inputs, rows

FIELDS: dict[type[Weight], dict[str, str]] = {
    LowRank: {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid"},
    Hadamard: {f"hada_{f}": f for f in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    Kronecker: {f"lokr_{f}": f for f in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    Dense: {"diff": "diff"},
}
NORM = {"w_norm": "diff", "b_norm": "diff_b"}  # a norm's parts, and those of a full update
BIASES = ("diff_b", "lora_up.bias")
ADDED = {part for fields in FIELDS.values() for part in fields} | {*BIASES, *NORM}
KNOWN = ADDED | {"alpha", "dora_scale"}
LYCORIS = KNOWN - {*FIELDS[LowRank], "lora_up.bias", "alpha", "dora_scale"}

FOREIGN = {
    **dict.fromkeys(("oft_blocks", "oft_diag", "rescale"), "OFT or BOFT, which turns the weight"),
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), "GLoRA"),
    **dict.fromkeys(("on_input", "weight"), "IA3, which multiplies the weight"),
    "scalar": "a scalar of an old LyCORIS, which newer ones ignore",
    "lokr_t1": "LoKr with a core of its first factor, which no LyCORIS computes",
}


def foreign(parts: Collection[str]) -> str | None:
    """What a module's parts are, in words, where they mean something that no Change can say."""
    return next((FOREIGN[part] for part in parts if part in FOREIGN), None)


def change_of(name: str, parts: Mapping[str, Tensor]) -> Change:
    """The Change of the module `name` from its KNOWN parts, of which one or more are ADDED.

    Raises FormatError naming the module where parts of several algorithms meet, where some are
    missing, and where shapes contradict each other.
    """
    parts = _without_norm(name, parts)
    used = [kind for kind, fields in FIELDS.items() if not fields.keys().isdisjoint(parts)]
    if len(used) > 1:
        raise FormatError(f"{name}: expected the parts of one algorithm, got {sorted(parts)}")
    if not used:
        if "dora_scale" in parts or "lora_up.bias" in parts:
            raise FormatError(f"{name}: no weights beside {sorted(parts)}")
        return Change(None, bias=_vector(name, "diff_b", parts["diff_b"]))
    kind = used[0]
    check(name, kind, parts)
    fields: dict[str, object] = {f: parts[p] for p, f in FIELDS[kind].items() if p in parts}
    if kind is not Dense and "alpha" in parts:  # which has no meaning beside a full update
        fields["alpha"] = _number(name, parts["alpha"])
    weight = kind(**fields)  # pyright: ignore[reportArgumentType, reportCallIssue]
    magnitude, axis = _magnitude(name, weight, parts.get("dora_scale"))
    return Change(weight, _bias(name, weight, parts), magnitude, axis)


def parts_of(change: Change, dims: int) -> dict[str, Tensor]:
    """The inverse of `change_of`, for a weight of `dims` dimensions.

    Alpha is written in any case, as float32: the dtype of the weights may not hold it.
    """
    weight, parts = change.weight, {}
    if weight is not None:
        assert isinstance(weight, Weight)
        tensors = weight.tensors()
        parts = {p: tensors[f] for p, f in FIELDS[type(weight)].items() if f in tensors}
        if not isinstance(weight, Dense):
            parts["alpha"] = torch.tensor(alpha_of(weight), dtype=torch.float32)
    if change.bias is not None:
        parts["diff_b"] = change.bias
    if change.magnitude is not None:
        shape = [1] * dims
        shape[0 if change.axis == "out" else 1] = -1
        parts["dora_scale"] = change.magnitude.reshape(shape)
    if isinstance(weight, Dense) and weight.diff.dim() == 1:
        parts = {norm: parts[full] for norm, full in NORM.items() if full in parts}
    return parts


def alpha_of(weight: LowRank | Hadamard | Kronecker) -> float:
    """The alpha for which alpha / rank is the ratio, also of what was scaled by alpha / √rank."""
    if isinstance(weight, LowRank) and weight.rank_stabilized:
        return weight.ratio * weight.rank
    return (weight.rank or 1) if weight.alpha is None else weight.alpha


def _without_norm(name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A norm's parts by the names of a full update."""
    norms = {full: parts[norm] for norm, full in NORM.items() if norm in parts}
    if norms and not parts.keys() <= {*NORM, "alpha"}:
        raise FormatError(f"{name}: expected the parts of a norm, got {sorted(parts)}")
    return {**{p: t for p, t in parts.items() if p not in NORM}, **norms}


def _number(name: str, alpha: Tensor) -> float | None:
    if alpha.numel() != 1 or alpha.is_complex():
        raise FormatError(
            f"{name}: expected one number as alpha, got {alpha.dtype} {list(alpha.shape)}"
        )
    return float(alpha.item()) or None


def _vector(name: str, part: str, tensor: Tensor, length: int | None = None) -> Tensor:
    if tensor.dim() != 1 or length not in (None, tensor.numel()):
        wanted = "a vector" if length is None else [length]
        raise FormatError(f"{name}: {part}: expected {wanted}, got {list(tensor.shape)}")
    return tensor


def _bias(name: str, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor | None:
    """`diff_b` as it is; the bias of lora_up goes through the ratio, as what it is added to."""
    given = [part for part in BIASES if part in parts]
    if len(given) > 1:
        raise FormatError(f"{name}: expected one bias, got {' and '.join(given)}")
    if not given:
        return None
    bias = _vector(name, given[0], parts[given[0]], rows(weight))
    if given == ["diff_b"]:
        return bias
    if not isinstance(weight, LowRank):
        raise FormatError(f"{name}: expected the parts of one algorithm, got {sorted(parts)}")
    return bias if weight.ratio == 1 else bias * weight.ratio


def _magnitude(
    name: str, weight: Weight, scale: Tensor | None
) -> tuple[Tensor | None, Literal["out", "in"]]:
    """DoRA's magnitude as a vector, and its axis: where the dimension is that is not 1."""
    if scale is None:
        return None, "out"
    out = rows(weight)
    ones = [n == 1 for n in scale.shape]
    if scale.dim() == 1 or (scale.dim() > 1 and scale.shape[0] == out and all(ones[1:])):
        return _vector(name, "dora_scale", scale.flatten(), out), "out"
    if scale.dim() > 1 and all(ones[:1] + ones[2:]) and has_inputs(weight, scale.numel()):
        return scale.flatten(), "in"
    raise FormatError(
        f"{name}: dora_scale: expected [{out}, 1, ...] or [1, in, 1, ...], got {list(scale.shape)}"
    )
