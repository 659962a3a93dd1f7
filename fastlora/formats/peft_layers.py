"""A layer of PEFT's format, which diffusers' files have too, as a Change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastlora.formats.changes import Change, Hadamard, Kronecker, LowRank, Target
from fastlora.formats.files import FormatError
from fastlora.formats.part_shapes import check
from fastlora.formats.peft_config import Settings


class Entry(NamedTuple):
    """What a key means: "lora_A", "lora_B.bias", "hada_w1_a", "alpha" ... of a module."""

    target: Target
    parameter: str
    adapter: str | None = None  # its name, where the key has it


Parts = dict[str, tuple[str, Tensor]]  # by parameter: key and tensor


def gather(
    tensors: Mapping[str, Tensor], entry_of: Callable[[str], Entry | None]
) -> tuple[dict[Target, Parts], list[str]]:
    """The tensors by module, and the keys that mean nothing.

    Raises FormatError for two tensors with one meaning, and for two adapters in one file.
    """
    modules: dict[Target, Parts] = {}
    others: list[str] = []
    names: dict[str, str] = {}
    for key, tensor in tensors.items():
        entry = entry_of(key)
        if entry is None:
            others.append(key)
            continue
        parts = modules.setdefault(entry.target, {})
        if entry.adapter is not None:
            names.setdefault(entry.adapter, key)
        if len(names) > 1:
            raise FormatError(f"expected one adapter in a file, got {sorted(names)} ({key})")
        if entry.parameter in parts:
            raise FormatError(f"{key} and {parts[entry.parameter][0]} are the same tensor")
        parts[entry.parameter] = key, tensor
    return modules, others


def change_of(target: Target, parts: Parts, settings: Settings) -> Change:
    """The change that a module's tensors and the file's settings describe.

    Raises FormatError for tensors that are missing, too many or of other shapes than each other or
    the settings.
    """
    own = {parameter: tensor for parameter, (_, tensor) in parts.items()}
    alpha = _alpha(target, own.pop("alpha", None), settings)
    families = sorted({parameter.partition("_")[0] for parameter in own})
    if len(families) != 1:
        raise FormatError(f"{target}: expected tensors of one method, got {sorted(parts)}")
    (family,) = families
    if settings.kind not in (None, KINDS[family]):
        raise FormatError(f"{target}: expected tensors of {settings.kind}, got {sorted(own)}")
    change = READERS[family](target, own, alpha, settings)
    if own:
        raise FormatError(f"{target}: unexpected {', '.join(sorted(own))}")
    weight = _without_alpha_zero(change.weight)
    return replace(change, weight=weight, keys=tuple(key for key, _ in parts.values()))


def _alpha(target: Target, tensor: Tensor | None, settings: Settings) -> float | None:
    """The alpha of a key beside (zero: the rank, as kohya has it) or that of the settings."""
    stated = settings.alpha_at(target.path)
    if tensor is None:
        return stated
    if tensor.numel() != 1 or tensor.is_complex():
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise FormatError(f"{target}: alpha: expected one number, got {got}")
    alpha = float(tensor) or None
    if stated is not None and alpha != stated:
        raise FormatError(f"{target}: alpha: the settings say {stated}, the tensor beside {alpha}")
    return alpha


def _low_rank(
    target: Target, own: dict[str, Tensor], alpha: float | None, settings: Settings
) -> Change:
    embedding = "lora_embedding_A" in own or "lora_embedding_B" in own
    infix = "lora_embedding_" if embedding else "lora_"
    down, up = _take(target, own, f"{infix}A", f"{infix}B")
    if down.shape[0] < 1 or up.shape[1] != down.shape[0] or not set(up.shape[2:]) <= {1}:
        # PEFT has [out, rank / groups] for a grouped convolution, but an A that sees the inputs of
        # all groups: no update of the weight.
        raise FormatError(
            f"{target}: {infix}A and {infix}B: expected [rank, in] and [out, rank], got "
            f"{list(down.shape)} and {list(up.shape)} (a grouped convolution is not supported)"
        )
    if embedding and down.dim() + up.dim() != 4:
        raise FormatError(
            f"{target}: {infix}A and {infix}B: expected matrices, got {list(down.shape)} and "
            f"{list(up.shape)}"
        )
    _require_rank(target, down.shape[0], settings)
    stabilized = settings.rank_stabilized
    weight = LowRank(down, up, alpha, stabilized, None, embedding, settings.dropout)
    bias, magnitude = own.pop("lora_B.bias", None), own.pop("lora_magnitude_vector", None)
    if settings.dora is not None and settings.dora != (magnitude is not None):
        got = "none" if magnitude is None else "one"
        raise FormatError(f"{target}: use_dora is {settings.dora}, got {got} lora_magnitude_vector")
    if magnitude is not None and bias is not None:
        raise FormatError(f"{target}: DoRA with lora_bias is not supported: it scales the bias too")
    if magnitude is not None:
        if magnitude.numel() != len(up):
            raise FormatError(
                f"{target}: lora_magnitude_vector: expected {len(up)} elements, got "
                f"{list(magnitude.shape)}"
            )
        magnitude = magnitude.reshape(-1)
    if bias is not None:
        if bias.shape != up.shape[:1]:
            raise FormatError(
                f"{target}: lora_B.bias: expected [{len(up)}], got {list(bias.shape)}"
            )
        bias = bias if weight.ratio == 1 else bias * weight.ratio
    # An embedding's weight is [vocabulary, dim], and its norms are those of the columns.
    axis: Literal["out", "in"] = "in" if embedding else "out"
    return Change(weight, bias, magnitude, axis)


def _hadamard(
    target: Target, own: dict[str, Tensor], alpha: float | None, settings: Settings
) -> Change:
    check(str(target), Hadamard, own)
    weight = Hadamard(**_fields(own, "hada_"), alpha=alpha)
    _require_rank(target, weight.rank, settings)
    return Change(weight)


def _kronecker(
    target: Target, own: dict[str, Tensor], alpha: float | None, settings: Settings
) -> Change:
    check(str(target), Kronecker, own)
    weight = Kronecker(**_fields(own, "lokr_"), alpha=alpha)
    if weight.rank is not None:
        _require_rank(target, weight.rank, settings)
        return Change(weight)
    # Two whole factors have no rank to divide alpha by, and LyCORIS takes a scale of 1 then, but
    # PEFT that of the settings.
    assert weight.w1 is not None
    rank = settings.rank_at(target.path)
    ratio = 1.0 if alpha is None or rank is None else alpha / rank
    return Change(replace(weight, alpha=None, w1=_scaled(weight.w1, ratio)))


def _without_alpha_zero(weight: Any) -> Any:
    """alpha 0, which is no effect in PEFT and the rank in kohya's files, as a factor of zeros."""
    if weight.ratio:
        return weight
    field = "up" if isinstance(weight, LowRank) else "w1_b" if weight.w1_b is not None else "w1"
    return replace(weight, alpha=None, **{field: torch.zeros_like(getattr(weight, field))})


READERS = {"lora": _low_rank, "hada": _hadamard, "lokr": _kronecker}
KINDS = {"lora": "LORA", "hada": "LOHA", "lokr": "LOKR"}  # PEFT's names of them


def _take(target: Target, own: dict[str, Tensor], *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in own]
    if missing:
        raise FormatError(
            f"{target}: expected {', '.join(names)}, got no {', '.join(missing)} ({sorted(own)})"
        )
    found = [own.pop(name) for name in names]
    if any(tensor.dim() < 2 for tensor in found):
        shapes = {name: list(tensor.shape) for name, tensor in zip(names, found, strict=True)}
        raise FormatError(f"{target}: expected matrices, got {shapes}")
    return found


def _fields(own: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """The factors by their names in a Change, taken out of `own`."""
    names = [name for name in own if name.startswith(prefix)]
    return {name.removeprefix(prefix): own.pop(name) for name in names}


def _require_rank(target: Target, rank: int, settings: Settings) -> None:
    expected = settings.rank_at(target.path)
    if expected is not None and rank != expected:
        raise FormatError(f"{target}: the settings say rank {expected}, the tensors have {rank}")


def _scaled(factor: Tensor, ratio: float) -> Tensor:
    """In at least float32, so that a ratio that is no power of two costs nothing."""
    if ratio == 1:
        return factor
    return factor.to(torch.promote_types(factor.dtype, torch.float32)) * ratio
