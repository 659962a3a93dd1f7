"""Layers with an adapter against what the file's own tensors say, computed in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora.adapters.adapted import Adapted
from fastlora.adapters.specs import AdapterError
from fastlora.commands import CommandError
from fastlora.formats.changes import AdapterFile, Change, Shift
from fastlora.formats.files import FormatError
from fastlora.formats.names import Index, find
from fastlora.formats.rewriting import Edit, folded, folded_bias
from fastlora.verify import roundings, worst

NAME = "verified"
SIDE = 12  # pixels of a convolution's input, at least
TOKENS = 16


class Row(NamedTuple):
    """A layer in one way of computing it."""

    path: str
    kind: str
    way: str  # "unmerged", "folded"
    error: float  # max |layer - float64|
    relative: float  # the same over max |float64|
    allowed: float
    used: float  # error / allowed
    passed: bool


class Base(NamedTuple):
    """The parameters of a layer before an adapter came."""

    weight: Tensor | None
    bias: Tensor | None


Layers = dict[str, tuple[nn.Module, Base, Change]]


def adapted_changes(
    models: Mapping[str, nn.Module], path: Any, file: AdapterFile, strength: float
) -> Layers:
    """Loads the file; every adapted layer by its path, what it was, and what the file says."""
    before = {
        component: {
            p: Base(*(_copy(m._parameters.get(n)) for n in ("weight", "bias")))
            for p, m in model.named_modules()
        }
        for component, model in models.items()
    }
    indices = {c: Index(p for p, _ in model.named_modules()) for c, model in models.items()}
    load(models, path, strength)
    found: Layers = {}
    for target, change in file.changes.items():
        places = find(target, indices)
        if len(places) != 1:
            raise CommandError(f"{target}: expected one layer of the model, got {len(places)}")
        component, place, _ = places[0]
        found[str(places[0])] = (
            models[component].get_submodule(place),
            before[component][place],
            change,
        )
    return found


def load(models: Mapping[str, nn.Module], path: Any, strength: float) -> None:
    """The file into the models, strictly. Raises what `fastlora.load` does, without its advice to
    leave something out, which would not be verified then."""
    try:
        fastlora.load(models.get("", models), path, name=NAME, scale=strength)
    except (AdapterError, FormatError) as error:
        said = [line for line in str(error).splitlines() if not line.startswith("strict=False")]
        raise type(error)("\n".join(said)) from None


def _copy(parameter: Tensor | None) -> Tensor | None:
    return parameter.detach() if parameter is not None else None


@contextmanager
def folding(models: Mapping[str, nn.Module], fold: bool) -> Iterator[None]:
    """The models with their adapters folded inside of the block, or as they are."""
    if not fold:
        yield
        return
    adapted = [m for m in models.values() if fastlora.adapters(m)]
    for model in adapted:
        fastlora.fold(model)
    try:
        yield
    finally:
        for model in adapted:
            fastlora.unfold(model)


def checked(
    path: str,
    way: str,
    layer: nn.Module,
    base: Base,
    change: Change,
    strength: float,
    generator: torch.Generator,
) -> Row:
    """One layer on a random input, by the twofold rule."""
    x = random_input(layer, base, generator)
    got = layer(x)
    exact = explicit(layer, base, change, strength, x, torch.float64)
    plain = worst(explicit(layer, base, change, strength, x, got.dtype), exact)
    error, largest = worst(got, exact), float(exact.abs().max())
    rounding = largest * torch.finfo(got.dtype).eps / 2
    count = roundings(layer, got.dtype) if isinstance(layer, Adapted) else 1.0
    allowed = 2 * max(plain, count * rounding)
    passed = math.isfinite(error) and error <= allowed and isinstance(layer, Adapted)
    if factors := factors_of(layer):
        passed = passed and decomposes(factors, layer)
    used = error / allowed if allowed else math.inf * bool(error)
    relative = error / largest if largest else error
    return Row(path, change.kind, way, error, relative, allowed, used, passed)


def random_input(layer: nn.Module, base: Base, generator: torch.Generator) -> Tensor:
    """What the layer takes, on its device in its dtype. Raises CommandError for unknown layers."""
    some = base.weight if base.weight is not None else base.bias
    assert some is not None
    if isinstance(layer, nn.Embedding):
        ids = torch.randint(layer.num_embeddings, (2, TOKENS), generator=generator)
        return ids.to(some.device)
    shape = _input_shape(layer)
    return torch.randn(shape, generator=generator).to(some.device, some.dtype)


def _input_shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return (2, TOKENS, layer.in_features)
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (2, layer.in_channels, *(max(SIDE, r) for r in reach))
    if isinstance(layer, nn.GroupNorm):
        return (2, layer.num_channels, SIDE, SIDE)
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return (2, TOKENS, *layer.normalized_shape)
    raise CommandError(f"no input is known for a {type(layer).__name__}")


def explicit(
    layer: nn.Module, base: Base, change: Change, strength: float, x: Tensor, dtype: torch.dtype
) -> Tensor:
    """The layer by PyTorch's own functions in `dtype`, with W' formed from the file's tensors."""
    edits = [Edit(change, strength)]
    weight = None if base.weight is None else base.weight.to(dtype)
    if weight is not None and (factors := factors_of(layer)) and isinstance(change.weight, Shift):
        weight = weight + shift(layer, factors, change.weight.shift, strength, dtype)
    elif weight is not None:
        weight = folded(weight, edits)
    bias = None if base.bias is None else folded_bias(base.bias.to(dtype), edits)
    if isinstance(layer, nn.Embedding):
        assert weight is not None
        return F.embedding(x, weight)
    return _applied(layer, x.to(dtype), weight, bias)


def _applied(layer: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, bias)
    if isinstance(layer, nn.ConvTranspose2d):
        padding: Any = layer.padding
        return F.conv_transpose2d(
            x, weight, bias, layer.stride, padding, layer.output_padding, layer.groups,
            layer.dilation,
        )  # fmt: skip
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return F.rms_norm(x, layer.normalized_shape, weight, layer.eps)


# --- spectral shifts ------------------------------------------------------------------------------

# Where singular values are nearly equal their vectors are any of a plane, and which ones a
# decomposition has is chance, also for the shifted weight. Therefore the layer's own vectors are
# taken, and it is checked that they are right ones.

Factors = tuple[Tensor, Tensor, Tensor]


def factors_of(layer: Any) -> Factors | None:
    """U [out, rank], σ [rank], Vᵀ [rank, everything else] of a layer that has them."""
    slots = layer.fastlora if isinstance(layer, Adapted) else None
    if slots is None or slots.svd_u is None:
        return None
    return slots.svd_u, slots.svd_s, slots.svd_vh


def shift(
    layer: Any, factors: Factors, values: Tensor, strength: float, dtype: torch.dtype
) -> Tensor:
    """`U diag(relu(σ + strength δ) - σ) Vᵀ` in the weight's shape."""
    wide = torch.promote_types(dtype, torch.float32)
    u, s, vh = (factor.to(wide) for factor in factors)
    moved = (s + strength * values.to(s)).clamp_min(0) - s
    return layer.from_matrix((u * moved).to(dtype) @ vh.to(dtype))


def decomposes(factors: Factors, layer: Any) -> bool:
    """Whether `U diag(σ) Vᵀ` is the weight and U and V are orthonormal: with at most twice the
    errors (Frobenius) of `torch.linalg.svd` in float32. Those of small matrices are 3 to 7
    roundings times the root of the rank, as chance has it; 8 are allowed in their place."""
    matrix = layer.matrix().detach().float()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    count = len(factors[1])
    own = _errors(factors, matrix)
    plain = _errors((u[:, :count], s[:count], vh[:count]), matrix)
    rounding = 8 * torch.finfo(factors[0].dtype).eps * math.sqrt(count)
    return all(e <= 2 * max(p, rounding) for e, p in zip(own, plain, strict=True))


def _errors(factors: Factors, matrix: Tensor) -> tuple[float, float, float]:
    u, s, vh = (factor.double() for factor in factors)
    one = torch.eye(len(s), dtype=u.dtype, device=u.device)
    left = (u * s) @ vh - matrix.double()
    return (
        float(left.norm() / matrix.double().norm().clamp_min(1e-30)),
        float((u.t() @ u - one).norm()),
        float((vh @ vh.t() - one).norm()),
    )
