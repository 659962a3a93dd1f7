"""Changes of every kind, and what they mean, written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora.adapters.attaching import attach
from fastlora.adapters.deltas import DeltaSlot
from fastlora.adapters.fitting import slot_from
from fastlora.formats.changes import Change, Dense, Hadamard, Kronecker, LowRank

RANK = 2
LAYERS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Tensor]]] = {
    "linear": (lambda d: nn.Linear(12, 8, dtype=d), lambda d: torch.randn(3, 12, dtype=d)),
    "linear_no_bias": (
        lambda d: nn.Linear(6, 10, bias=False, dtype=d),
        lambda d: torch.randn(2, 3, 6, dtype=d),
    ),
    "conv": (
        lambda d: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", dtype=d),
        lambda d: torch.randn(2, 4, 5, 6, dtype=d),
    ),
    "conv_groups_single": (
        lambda d: nn.Conv2d(4, 8, 3, groups=2, stride=2, dtype=d),
        lambda d: torch.randn(4, 5, 6, dtype=d),
    ),
    "conv_transpose": (
        lambda d: nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2, dtype=d),
        lambda d: torch.randn(2, 4, 5, 6, dtype=d),
    ),
    "embedding": (
        lambda d: nn.Embedding(12, 6, padding_idx=0, dtype=d),
        lambda d: torch.tensor([[1, 11], [0, 5]]),
    ),
    "layer_norm": (lambda d: nn.LayerNorm(6, dtype=d), lambda d: torch.randn(2, 3, 6, dtype=d)),
    "group_norm": (lambda d: nn.GroupNorm(2, 6, dtype=d), lambda d: torch.randn(2, 6, 3, dtype=d)),
    "rms_norm": (lambda d: nn.RMSNorm(6, eps=1e-5, dtype=d), lambda d: torch.randn(4, 6, dtype=d)),
}
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def drawn(*shape: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> Tensor:
    return (size * torch.randn(shape, dtype=torch.float64)).to(dtype)


def loha(shape: tuple[int, ...], dtype: torch.dtype) -> Hadamard:
    out, inner = shape[0], math.prod(shape[1:])
    a, b = (out, RANK), (RANK, inner)
    return Hadamard(*(drawn(*s, dtype=dtype, size=0.5) for s in (a, b, a, b)), alpha=1.5)


def loha_tucker(shape: tuple[int, ...], dtype: torch.dtype) -> Hadamard:
    a, b, t = (RANK, shape[0]), (RANK, shape[1]), (RANK, RANK, *shape[2:])
    w1_a, w1_b, w2_a, w2_b = (drawn(*s, dtype=dtype, size=0.5) for s in (a, b, a, b))
    t1, t2 = drawn(*t, dtype=dtype), drawn(*t, dtype=dtype)
    return Hadamard(w1_a, w1_b, w2_a, w2_b, 1.5, t1, t2)


def lokr(shape: tuple[int, ...], dtype: torch.dtype) -> Kronecker:
    """Both factors whole: alpha does not count."""
    w1 = drawn(2, 2, dtype=dtype, size=0.4)
    w2 = drawn(shape[0] // 2, shape[1] // 2, *shape[2:], dtype=dtype, size=0.4)
    return Kronecker(w1=w1, w2=w2, alpha=7.0)


def lokr_factors(shape: tuple[int, ...], dtype: torch.dtype) -> Kronecker:
    w1_a, w1_b = drawn(2, RANK, dtype=dtype, size=0.4), drawn(RANK, 2, dtype=dtype)
    w2_a = drawn(shape[0] // 2, RANK, dtype=dtype, size=0.4)
    if len(shape) == 2:
        w2_b, t2 = drawn(RANK, shape[1] // 2, dtype=dtype), None
    else:
        w2_a, w2_b = w2_a.t().contiguous(), drawn(RANK, shape[1] // 2, dtype=dtype)
        t2 = drawn(RANK, RANK, *shape[2:], dtype=dtype)
    return Kronecker(w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b, alpha=1.0, t2=t2)


def lora(shape: tuple[int, ...], dtype: torch.dtype, groups: int = 1) -> LowRank:
    down = drawn(RANK * groups, *shape[1:], dtype=dtype, size=0.5)
    up = drawn(shape[0], RANK, *[1] * (len(shape) - 2), dtype=dtype, size=0.5)
    return LowRank(down, up, alpha=3.0, rank_stabilized=True, dropout=0.1)


def tucker(shape: tuple[int, ...], dtype: torch.dtype) -> LowRank:
    ones = [1] * (len(shape) - 2)
    down = drawn(RANK, shape[1], *ones, dtype=dtype)
    up = drawn(shape[0], RANK, *ones, dtype=dtype, size=0.4)
    return LowRank(down, up, 1.0, mid=drawn(RANK, RANK, *shape[2:], dtype=dtype, size=0.5))


def full(shape: tuple[int, ...], dtype: torch.dtype) -> Dense:
    return Dense(drawn(*shape, dtype=dtype, size=0.3))


def update(part: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """ΔW in the shape of the weight, from the formulas of the papers, in `dtype`."""
    t = {name: tensor.to(dtype) for name, tensor in part.tensors().items()}
    if isinstance(part, Dense):
        return t["diff"]
    if isinstance(part, LowRank):
        down, up = t["down"], t["up"].flatten(1)
        if "mid" in t:
            down = torch.einsum("rsij,sc->rcij", t["mid"], down.flatten(1))
        ratio = part.alpha / (RANK**0.5 if part.rank_stabilized else RANK)
        if len(down) != RANK:  # a grouped convolution
            ratio = part.alpha / len(down) ** 0.5
            half = len(up) // 2
            products = up[:half] @ down[:RANK].flatten(1), up[half:] @ down[RANK:].flatten(1)
            return ratio * torch.cat(products).view(shape)
        return ratio * (up @ down.flatten(1)).view(shape)
    if isinstance(part, Hadamard):
        if "t1" in t:
            first = torch.einsum("rsij,ro,sc->ocij", t["t1"], t["w1_a"], t["w1_b"])
            second = torch.einsum("rsij,ro,sc->ocij", t["t2"], t["w2_a"], t["w2_b"])
        else:
            first, second = t["w1_a"] @ t["w1_b"], t["w2_a"] @ t["w2_b"]
        return part.alpha / RANK * (first * second).view(shape)
    w1 = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
    if "w2" in t:
        w2, ratio = t["w2"], 1.0
    elif "t2" in t:
        w2 = torch.einsum("rsij,ro,sc->ocij", t["t2"], t["w2_a"], t["w2_b"])
        ratio = part.alpha / RANK
    else:
        w2, ratio = t["w2_a"] @ t["w2_b"], part.alpha / RANK
    rows = [torch.cat([w1[i, j] * w2 for j in range(2)], 1) for i in range(2)]
    return ratio * torch.cat(rows)


def magnitude(weight: Tensor, axis: str, dtype: torch.dtype) -> Tensor:
    length = row_norms(weight.double(), axis).flatten()
    return (length * (1 + 0.3 * drawn(len(length)))).to(dtype)


def row_norms(weight: Tensor, axis: str) -> Tensor:
    others = [d for d in range(weight.dim()) if d != (0 if axis == "out" else 1)]
    return weight.square().sum(others, keepdim=True).sqrt()


def bias_size(layer: Any) -> int:
    return layer.out_channels if isinstance(layer, nn.ConvTranspose2d) else len(layer.weight)


# Name: (parts, bias, the magnitude's axis).
KINDS: dict[str, tuple[Any, bool, str | None]] = {
    "loha": (loha, False, None),
    "loha_tucker": (loha_tucker, False, None),
    "loha_dora": (loha, False, "out"),
    "lokr": (lokr, False, None),
    "lokr_factors": (lokr_factors, False, None),
    "lokr_dora_in": (lokr, False, "in"),
    "full": (full, False, None),
    "full_bias": (full, True, None),
    "full_dora": (full, True, "out"),
    "bias": (None, True, None),
    "lora_bias": (lora, True, None),
    "lora_dora_in": (lora, False, "in"),
    "tucker_dora": (tucker, False, "out"),
    "tucker_bias": (tucker, True, None),
}


def fits(layer: nn.Module, kind: str) -> bool:
    """Whether files have such an update of such a layer."""
    parts, bias, axis = KINDS[kind]
    if isinstance(layer, NORMS):
        return parts in (full, None) and axis is None and not (bias and type(layer) is nn.RMSNorm)
    if isinstance(layer, nn.Embedding):
        return not bias and "tucker" not in kind and parts is not lora
    if isinstance(layer, nn.ConvTranspose2d):
        return axis is None and parts not in (lora, tucker)
    if "tucker" in kind:
        return isinstance(layer, nn.Conv2d) and layer.groups == 1
    return True


def change_of(layer: Any, kind: str, dtype: torch.dtype) -> Change:
    parts, bias, axis = KINDS[kind]
    shape, groups = tuple(layer.weight.shape), getattr(layer, "groups", 1)
    made = None
    if parts is not None:
        made = parts(shape, dtype, groups) if parts is lora else parts(shape, dtype)
    added = drawn(bias_size(layer), dtype=dtype) if bias else None
    if axis is None:
        return Change(made, added)
    whole = layer.weight.detach().double() + update(made, shape)
    return Change(made, added, magnitude(whole, axis, dtype), axis)  # type: ignore[arg-type]


def changed(
    layer: Any, change: Change, strength: float, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """W' and b' by name, computed in `dtype`."""
    weight = layer.weight.detach().to(dtype)
    if strength == 0:
        whole = weight
    else:
        whole = weight
        if change.weight is not None:
            whole = weight + strength * update(change.weight, tuple(weight.shape), dtype)
        if change.magnitude is not None:
            length = row_norms(whole, change.axis)
            whole = whole * change.magnitude.to(dtype).view(length.shape) / length
    found = {"weight": whole}
    bias = getattr(layer, "bias", None)
    if change.bias is not None:
        added = strength * change.bias.to(dtype)
        found["bias"] = added if bias is None else bias.detach().to(dtype) + added
    elif bias is not None:
        found["bias"] = bias.detach().to(dtype)
    return found


def called(layer: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """A plain layer's own forward with other parameters, in their dtype."""
    dtype = parameters["weight"].dtype
    plain = copy.deepcopy(layer).to(dtype)
    plain._parameters = {name: nn.Parameter(t.detach()) for name, t in parameters.items()}
    for name in ("weight", "bias"):
        plain._parameters.setdefault(name, None)
    with torch.no_grad():
        return plain(x.to(dtype) if x.is_floating_point() else x)


def adapt(layer: nn.Module, change: Change, name: str = "d") -> DeltaSlot:
    """Puts a change into a layer, which is the whole model."""
    slot = slot_from(layer, copy.deepcopy(change))  # whose tensors it may share
    assert isinstance(slot, DeltaSlot)
    attach(layer, {"": slot}, name)
    return slot


def example(kind: str = "loha", layer: str = "linear", dtype: torch.dtype = torch.float64) -> Any:
    """(a layer that has such a slot, the plain layer, the change, an input)."""
    torch.manual_seed(0)
    base, x = LAYERS[layer][0](dtype), LAYERS[layer][1](dtype)
    plain, change = copy.deepcopy(base), change_of(base, kind, dtype)
    adapt(base, change)
    return base, plain, change, x


def set_strength(layer: nn.Module, strength: float) -> None:
    fastlora.set_scale(layer, {"d": strength})
