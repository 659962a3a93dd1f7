"""`verify`: does the fused model compute what plain PyTorch computes from the same parameters?"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted, adapted_layers
from fastlora.adapters.layers import AdaptedConv2d, AdaptedEmbedding, AdaptedLinearLike
from fastlora.adapters.slots import LoRASlot, SpectralSlot
from fastlora.adapters.specs import AdapterError


@dataclass(frozen=True)
class VerifyRow:
    """Errors of one layer, or of the model's output, against the reference in float64."""

    path: str
    kind: str
    error: float  # max |fused - reference in float64|
    relative: float  # the same over max |reference|
    allowed: float  # twice the error of the plain PyTorch expression in the model's own dtype
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `str(report)` is a table, `bool(report)` whether all of it passed."""

    rows: tuple[VerifyRow, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        width = max((len(r.path) for r in self.rows), default=5)
        head = f"{'layer':<{width}}  {'kind':<14}{'max error':>11}{'relative':>11}{'allowed':>11}"
        lines = [head, "-" * (len(head) + 7)]
        for r in self.rows:
            verdict = "ok" if r.passed else "FAILED"
            numbers = f"{r.error:>11.2e}{r.relative:>11.2e}{r.allowed:>11.2e}"
            lines.append(f"{r.path:<{width}}  {r.kind:<14}{numbers}  {verdict} {r.note}".rstrip())
        bad = sum(not r.passed for r in self.rows)
        lines.append(
            f"{len(self.rows) - bad} of {len(self.rows)} rows within twice the plain error"
        )
        return "\n".join(lines)


@torch.no_grad()
def verify(model: nn.Module, *inputs: Any, **keywords: Any) -> VerifyReport:
    """Runs the model fused and by reference and compares.

    Every adapted layer is given the input that it had in the fused run and compared with the formula
    in float64; so is the model's output, against a float64 copy of the model with every adapted layer
    replaced by its formula. The rule has no tolerance to choose: the error may be at most twice that of the same
    formula in plain PyTorch in the model's own dtype. (Where plain PyTorch happens to be closer than that:
    twice one rounding of the largest value, per adapted layer that led to it.) An adapted layer that the model does not call fails.

    Costs memory for one float64 copy of the model. Raises AdapterError if there are no adapters.
    """
    layers = adapted_layers(model)
    if not layers:
        raise AdapterError("verify: the model has no adapters")
    training = {m: m.training for m in model.modules()}
    model.eval()  # dropout has no reference
    try:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with recording(layers, seen):
            fused = flat(model(*inputs, **keywords))
        rows = [layer_row(path, layer, seen.get(path)) for path, layer in layers.items()]
        with by_reference(layers):
            plain = flat(model(*inputs, **keywords))
        double = copy.deepcopy(model).double()
        with by_reference(adapted_layers(double)):
            exact = flat(double(*widened(inputs), **widened(keywords)))
        for i, (f, p, e) in enumerate(zip(fused, plain, exact, strict=True)):
            path = f"output {i}" if len(fused) > 1 else "output"
            rows.append(row(path, "model", f, p, e, roundings=len(layers)))
    finally:
        for module, mode in training.items():
            module.training = mode
    return VerifyReport(tuple(rows))


def layer_row(path: str, layer: Adapted, seen: tuple[Tensor, Tensor] | None) -> VerifyRow:
    kinds = "+".join(dict.fromkeys(slot.kind for slot in layer.fastlora.values()))
    if seen is None:
        note = "was not called: something reads its weight directly"
        return VerifyRow(path, kinds, float("nan"), float("nan"), 0.0, False, note)
    x, y = seen
    note = "folded" if layer._state.merged else ""
    low = reference(layer, x, layer_dtype(layer, y))
    return row(path, kinds, y, low, reference(layer, x, torch.float64), note)


def row(
    path: str,
    kind: str,
    fused: Tensor,
    plain: Tensor,
    exact: Tensor,
    note: str = "",
    roundings: int = 1,
) -> VerifyRow:
    error = worst(fused, exact)
    largest = exact.abs().max().item() if exact.numel() else 0.0
    rounding = largest * torch.finfo(fused.dtype).eps / 2
    allowed = 2 * max(worst(plain, exact), roundings * rounding)
    return VerifyRow(
        path, kind, error, error / largest if largest else error, allowed, error <= allowed, note
    )


def worst(a: Tensor, exact: Tensor) -> float:
    """max |a - exact|, NaN counting as infinitely wrong."""
    if not a.numel():
        return 0.0
    difference = (a.double() - exact.double()).abs().max().item()
    return difference if difference == difference else float("inf")


def layer_dtype(layer: Adapted, y: Tensor) -> torch.dtype:
    return y.dtype if isinstance(layer, AdaptedLinearLike) else layer.weight.dtype


# --- the reference ----------------------------------------------------------------------------------


def reference(layer: Adapted, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer by its formula in plain PyTorch at `dtype`: nothing fused, packed, folded or cached."""

    def at(t: Tensor | None) -> Tensor | None:
        return t.detach().to(dtype) if t is not None and t.is_floating_point() else t

    x = at(x)  # type: ignore[assignment]
    slots = [(slot, strength(layer, name)) for name, slot in layer.fastlora.items()]
    bias = at(layer._parameters.get("bias"))
    if isinstance(layer, AdaptedLinearLike):
        y: Any = layer.base(x.to(layer_input_dtype(layer, x))).to(dtype)
        weight = None
    else:
        weight = spectral_reference(layer, slots, dtype)
        if not any(isinstance(s, LoRASlot) for s, _ in slots):
            return layer.with_weight(x, weight, bias)
        y = layer.with_weight(x, weight, None)
    total = y
    for slot, scale in slots:
        if not isinstance(slot, LoRASlot) or not scale.any():
            continue
        down, up = at(slot.down), at(slot.up)
        per_token = (
            scale.to(x.device, dtype if dtype == torch.float64 else torch.float32) * slot.ratio
        )
        if isinstance(layer, AdaptedConv2d):
            h = layer._conv_forward(x, down, None)
            h = (h * per_token.view(-1, 1, 1, 1)).to(dtype)
            part = F.conv2d(h, up, groups=layer.groups)
        else:
            h = (
                F.embedding(x, down.t())
                if isinstance(layer, AdaptedEmbedding)
                else F.linear(x, down)
            )
            shape = [-1] + [1] * (h.dim() - 1) if per_token.numel() > 1 else [1]
            part = F.linear((h * per_token.view(shape)).to(dtype), up)
        if slot.spec.dora:
            rho = dora_reference(layer, weight, slot, per_token.reshape(()), dtype)
            part = (rho - 1) * y + rho * part
        total = total + part
    if bias is not None and weight is not None:
        total = total + (bias[:, None, None] if isinstance(layer, AdaptedConv2d) else bias)
    return total


def strength(layer: Adapted, name: str) -> Tensor:
    """The scale of an adapter as `[1]` or `[batch]`, float64, zero when it is off."""
    arena = layer._state.arena
    scale = arena.scales[name] if arena.enabled[name] else 0.0
    if isinstance(scale, Tensor):
        return scale.detach().double().repeat(arena.copies)
    return torch.tensor([scale], dtype=torch.float64)


def spectral_reference(layer: Adapted, slots: Any, dtype: torch.dtype) -> Tensor:
    """W + U diag(relu(σ + Σ strength δ) - σ) Vᵀ, or w + Σ strength δ for a norm."""
    weight = layer.weight.detach().to(dtype)
    shifts = [(s, k) for s, k in slots if isinstance(s, SpectralSlot)]
    if not shifts:
        return weight
    total = sum(s.shift.detach().to(dtype) * k.item() for s, k in shifts)
    if layer.is_norm():
        return weight + total
    factors = layer.fastlora
    assert factors.svd_u is not None and factors.svd_s is not None and factors.svd_vh is not None
    s = factors.svd_s.to(dtype)
    change = (factors.svd_u.to(dtype) * ((s + total).clamp_min(0) - s)) @ factors.svd_vh.to(dtype)
    return weight + change.view(weight.shape)


def dora_reference(layer: Adapted, weight: Any, slot: LoRASlot, gate: Tensor, dtype: Any) -> Tensor:
    """m / ‖W + s U D‖ per output, with U D formed."""
    assert slot.magnitude is not None
    up, down = slot.up.detach().to(dtype), slot.down.detach().to(dtype)
    if isinstance(layer, AdaptedEmbedding):
        whole = weight.t() + gate.to(dtype) * (up @ down)
    else:
        groups = layer.groups if isinstance(layer, AdaptedConv2d) else 1
        products = [
            u.flatten(1) @ d.flatten(1)
            for u, d in zip(up.chunk(groups), down.chunk(groups), strict=True)
        ]
        whole = weight.flatten(1) + gate.to(dtype) * torch.cat(products)
    rho = slot.magnitude.detach().to(dtype) / whole.norm(dim=1)
    return rho[:, None, None] if isinstance(layer, AdaptedConv2d) else rho


def layer_input_dtype(layer: Any, x: Tensor) -> torch.dtype:
    return layer.weight.dtype if layer.weight.is_floating_point() else x.dtype


# --- running ----------------------------------------------------------------------------------------


@contextmanager
def recording(layers: dict[str, Adapted], seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Keeps the last input and output of every layer."""

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[path] = (args[0].detach().clone(), output.detach().clone())

        return hook

    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def by_reference(layers: dict[str, Adapted]) -> Iterator[None]:
    """Replaces the forward of every adapted layer by its formula."""
    for layer in layers.values():
        dtype = layer.weight.dtype if layer.weight.is_floating_point() else torch.float32
        layer.__dict__["forward"] = lambda x, _l=layer, _d=dtype: reference(_l, x, _d)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.__dict__["forward"]


def widened(value: Any) -> Any:
    """The same arguments with floating tensors in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: widened(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(widened(v) for v in value)
    return value


def flat(value: Any) -> list[Tensor]:
    """The tensors of a model's output, whatever holds them."""
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in flat(v)] if isinstance(value, list | tuple) else []
