"""`verify`: does the fused model compute what plain PyTorch computes from the same parameters?"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.deltas import DeltaSlot
from fastlora.adapters.layers import AdaptedConv2d, AdaptedEmbedding
from fastlora.adapters.lookup import adapted_layers, base_modules, unwrapped
from fastlora.adapters.slots import LoRASlot, SpectralSlot
from fastlora.adapters.specs import AdapterError
from fastlora.adapters.tensors import COMPUTED, is_plain


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
        path = max(5, *(len(r.path) for r in self.rows)) if self.rows else 5
        kind = max(4, *(len(r.kind) for r in self.rows)) if self.rows else 4
        head = (
            f"{'layer':<{path}}  {'kind':<{kind}} {'max error':>11}{'relative':>11}{'allowed':>11}"
        )
        lines = [head, "-" * (len(head) + 8)]
        for r in self.rows:
            verdict = "ok" if r.passed else "FAILED"
            numbers = f"{r.error:>11.2e}{r.relative:>11.2e}{r.allowed:>11.2e}"
            lines.append(
                f"{r.path:<{path}}  {r.kind:<{kind}} {numbers}  {verdict} {r.note}".rstrip()
            )
        good = sum(r.passed for r in self.rows)
        lines.append(f"{good} of {len(self.rows)} rows within twice the plain error")
        return "\n".join(lines)


@torch.no_grad()
def verify(model: nn.Module, *inputs: Any, **keywords: Any) -> VerifyReport:
    """Runs the model fused and by reference and compares.

    Every adapted layer is given the input that it had in the fused run and compared with the
    formula in float64; so is the model's output, against a float64 copy of the model with every
    adapted layer replaced by its formula. The rule has no tolerance to choose: the error may be at
    most twice that of the same formula in plain PyTorch in the model's own dtype. (Where plain
    PyTorch happens to be closer than `roundings` says: twice so many roundings of the largest
    value.) An adapted layer that the model does not call fails, and so does a NaN.

    Layers that are quantised are not widened: what they are computes in the dtype of the fused run,
    in either of the references, and only the low-rank part beside it in float64.

    Costs memory for one float64 copy of the model. Raises AdapterError if there are no adapters.
    """
    layers = adapted_layers(model)
    if not any(len(layer.fastlora) for layer in layers.values()):
        raise AdapterError("verify: the model has no adapters")
    training = {m: m.training for m in model.modules()}
    model.eval()  # dropout has no reference
    try:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        others = {path: m for path, m in quantised(model).items() if path not in layers}
        dtypes: dict[str, torch.dtype] = {}
        with recording(layers, seen), noting(others, dtypes):
            fused = [t.clone() for t in flat(model(*inputs, **keywords))]
        rows = [layer_row(path, layer, seen.get(path)) for path, layer in layers.items()]
        with by_reference(layers):
            plain = [t.clone() for t in flat(model(*inputs, **keywords))]
        # Of what is quantised nothing is computed in the copy, and not every kind can be copied.
        left_out = {id(m.weight): nothing_like(m.weight) for m in quantised(model).values()}
        double = copy.deepcopy(model, left_out).double()
        dtypes |= {path: x.dtype for path, (x, _) in seen.items()}
        keep_quantised(model, double, dtypes)
        with by_reference(adapted_layers(double), torch.float64):
            exact = flat(double(*widened(inputs), **widened(keywords)))
        for i, (f, p, e) in enumerate(zip(fused, plain, exact, strict=True)):
            path = f"output {i}" if len(fused) > 1 else "output"
            count = sum(roundings(layer, f.dtype) for layer in layers.values())
            rows.append(row(path, "model", f, p, e, count))
    finally:
        for module, mode in training.items():
            module.training = mode
    return VerifyReport(tuple(rows))


def layer_row(path: str, layer: Adapted, seen: tuple[Tensor, Tensor] | None) -> VerifyRow:
    kinds = "+".join(dict.fromkeys(slot.kind for slot in layer.fastlora.values())) or "reserve"
    if seen is None:
        note = "was not called: something reads its weight directly"
        return VerifyRow(path, kinds, float("nan"), float("nan"), 0.0, False, note)
    x, y = seen
    note = "folded" if layer._state.merged else ""
    low = reference(layer, x, y.dtype)
    exact = reference(layer, x, torch.float64)
    return row(path, kinds, y, low, exact, roundings(layer, y.dtype), note)


def roundings(layer: Adapted, dtype: torch.dtype) -> float:
    """By how many roundings of the largest value two right ways to compute a layer may differ.

    16-bit results are rounded once. Sums of n products in another order differ by about sqrt(n)
    roundings of a term; the factor was measured for n from 8 to 2048. In float64 the reference
    itself rounds as much. The terms of a folded layer have one rounding more, that of the weight.
    """
    n = getattr(layer, "in_features", None)  # of a quantised weight the shape may tell nothing
    if n is None:
        n = layer.upright(layer.weight)[0].numel() if layer.weight.dim() > 1 else 1
    sums = {torch.float32: 2 + n**0.5 / 4, torch.float64: 2 + n**0.5}.get(dtype, 1.0)
    return sums * (2 if layer._state.merged else 1)


def row(
    path: str, kind: str, fused: Tensor, plain: Tensor, exact: Tensor, count: float, note: str = ""
) -> VerifyRow:
    error = worst(fused, exact)
    largest = exact.abs().max().item() if exact.numel() else 0.0
    rounding = largest * torch.finfo(fused.dtype).eps / 2
    allowed = 2 * max(worst(plain, exact), count * rounding)
    passed = math.isfinite(error) and error <= allowed
    return VerifyRow(
        path, kind, error, error / largest if largest else error, allowed, passed, note
    )


def worst(a: Tensor, exact: Tensor) -> float:
    """max |a - exact|; equal infinities do not differ, a NaN is infinitely wrong."""
    if not a.numel():
        return 0.0
    a, exact = a.double(), exact.double()
    difference = torch.where(a == exact, 0.0, (a - exact).abs()).max().item()
    return difference if difference == difference else float("inf")


# --- the reference --------------------------------------------------------------------------------


def reference(layer: Adapted, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer by its formula in plain PyTorch: nothing fused, packed, folded or cached."""
    if isinstance(layer, AdaptedConv2d) and x.dim() == 3:
        return reference(layer, x[None], dtype)[0]
    given, x = x, widened(x, dtype)
    slots = [(slot, gate_value(layer, name)) for name, slot in layer.fastlora.items()]
    bias = bias_reference(layer, slots, dtype)
    if not is_plain(layer.weight):
        y: Any = layer.base(given).to(dtype)
        weight = None
    elif layer.beside:
        y = layer.base(x.to(layer.weight.dtype) if x.is_floating_point() else x).to(dtype)
        weight = None
    else:
        weight = spectral_reference(layer, slots, dtype)
        weight = layer.upright(delta_reference(layer.upright(weight), slots))
        if not any(isinstance(s, LoRASlot) for s, _ in slots):
            return layer.with_weight(x, weight, bias)
        y = layer.with_weight(x, weight, None)
    total = y
    for slot, gate in slots:
        if not isinstance(slot, LoRASlot) or not gate.any():
            continue
        down, up = slot.down.detach().to(dtype), slot.up.detach().to(dtype)
        gate = gate.to(x.device, dtype if dtype == torch.float64 else torch.float32)
        if isinstance(layer, AdaptedConv2d):
            h = layer._conv_forward(x, down, None)
            h = (h * gate.view(-1, 1, 1, 1)).to(dtype)
            part = F.conv2d(h, up, groups=layer.groups)
        else:
            h = (
                F.embedding(x, down.t())
                if isinstance(layer, AdaptedEmbedding)
                else F.linear(x, down)
            )
            shape = [-1] + [1] * (h.dim() - 1) if gate.numel() > 1 else [1]
            part = F.linear((h * gate.view(shape)).to(dtype), up)
        if slot.spec.dora:
            rho = dora_reference(layer, weight, slot, gate.reshape(()), dtype)
            part = (rho - 1) * y + rho * part
        total = total + part
    if bias is not None and weight is not None:
        total = total + (bias[:, None, None] if isinstance(layer, AdaptedConv2d) else bias)
    return total


def gate_value(layer: Adapted, name: str) -> Tensor:
    """What the gate of an adapter has to be, `[1]` or `[batch]`, zero when it is off: scale · α/r
    in float32, as gates are."""
    arena = layer._state.arena
    scale = arena.scales[name] if arena.enabled[name] else 0.0
    ratio = torch.tensor(layer.fastlora[name].ratio, dtype=torch.float32)
    if isinstance(scale, Tensor):
        return scale.detach().float().repeat(arena.copies) * ratio.to(scale.device)
    return torch.tensor([scale], dtype=torch.float32) * ratio


def spectral_reference(layer: Adapted, slots: Any, dtype: torch.dtype) -> Tensor:
    """W + U diag(relu(σ + Σ strength δ) - σ) Vᵀ, or w + Σ strength δ for a norm."""
    weight = layer.weight.detach().to(dtype, copy=True)  # an embedding's look-up may write into it
    shifts = [(s, g) for s, g in slots if isinstance(s, SpectralSlot)]
    if not shifts:
        return weight
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = sum(s.shift.detach().to(wide) * g.to(s.shift.device, wide) for s, g in shifts)
    if layer.is_norm():
        return (weight + total).to(dtype)
    factors = layer.fastlora
    assert factors.svd_u is not None and factors.svd_s is not None and factors.svd_vh is not None
    s = factors.svd_s.to(wide)
    left = (factors.svd_u.to(wide) * ((s + total).clamp_min(0) - s)).to(dtype)
    return weight + layer.from_matrix(left @ factors.svd_vh.to(dtype))


def delta_reference(weight: Tensor, slots: Any) -> Tensor:
    """W + Σ g ΔW; of those with a magnitude m each adds m V / ‖V‖ - W with V = W + g ΔW."""
    total = weight
    for slot, gate in slots:
        if not isinstance(slot, DeltaSlot) or not gate.any():
            continue
        change = slot.change
        update = gate.to(weight) * change.delta(tuple(weight.shape), weight.dtype).to(weight.device)
        if change.magnitude is not None:
            whole = weight + update
            kept = 0 if change.axis == "out" else 1
            others = [d for d in range(weight.dim()) if d != kept]
            norm = torch.linalg.vector_norm(whole, dim=others, keepdim=True)
            update = whole * change.magnitude.to(weight).view(norm.shape) / norm - weight
        total = total + update
    return total


def bias_reference(layer: Adapted, slots: Any, dtype: torch.dtype) -> Tensor | None:
    """b + Σ g bias, None where neither is there."""
    changes = [(s.change, g) for s, g in slots if isinstance(s, DeltaSlot) and g.any()]
    terms = [
        c.bias.detach().to(dtype) * g.to(c.bias.device, dtype)
        for c, g in changes
        if c.bias is not None
    ]
    own = layer._parameters.get("bias")
    terms += [] if own is None else [own.detach().to(dtype)]
    total: Any = sum(terms)
    return total if terms else None


def dora_reference(layer: Adapted, weight: Any, slot: LoRASlot, gate: Tensor, dtype: Any) -> Tensor:
    """m / ‖W + s U D‖ per output, with U D formed."""
    assert slot.magnitude is not None
    up, down = slot.up.detach().to(dtype), slot.down.detach().to(dtype)
    if layer.transposed:
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


# --- running --------------------------------------------------------------------------------------


@contextmanager
def forwards(layers: Mapping[str, Any], make: Callable[[str, Any], Any]) -> Iterator[None]:
    """Every layer has `make(path, layer)` as its forward. Not hooks: modules that go past their
    layers (the fused path of nn.TransformerEncoderLayer) do not where there are hooks."""
    before = {path: vars(layer).get("forward") for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.__dict__["forward"] = make(path, layer)
    try:
        yield
    finally:
        for path, layer in layers.items():
            del layer.__dict__["forward"]
            if before[path] is not None:
                layer.__dict__["forward"] = before[path]


def recording(layers: dict[str, Adapted], seen: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """Keeps the last input and output of every layer."""

    def make(path: str, layer: Adapted) -> Any:
        inner = layer.forward

        def forward(*args: Any, **keywords: Any) -> Tensor:
            x = first(args, keywords).detach().clone()
            y = inner(*args, **keywords)
            seen[path] = (x, y.detach().clone())
            return y

        return forward

    return forwards(layers, make)


def by_reference(layers: dict[str, Adapted], dtype: torch.dtype | None = None) -> Any:
    """Replaces every layer by its formula in `dtype`; None: that of its weight, and of its input
    where the weight is packed."""

    def make(path: str, layer: Adapted) -> Any:
        def forward(*args: Any, **keywords: Any) -> Tensor:
            x = first(args, keywords)
            own = layer.weight if dtype is None and layer.weight.dtype in COMPUTED else x
            return reference(layer, x, dtype or own.dtype)

        return forward

    return forwards(layers, make)


def quantised(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with a weight that is no plain one, adapted or not, by path."""
    return {
        path: module
        for path, module in base_modules(unwrapped(model))
        if module._parameters.get("weight") is not None and not is_plain(module.weight)
    }


def nothing_like(weight: Any) -> nn.Parameter:
    """No values, of a dtype that none would be computed in."""
    empty = torch.empty(0, dtype=torch.int8, device=weight.device)
    return nn.Parameter(empty, requires_grad=False)


def noting(modules: dict[str, nn.Module], dtypes: dict[str, torch.dtype]) -> Any:
    """Notes the dtype of every module's input."""

    def make(path: str, module: nn.Module) -> Any:
        inner = module.forward

        def forward(*args: Any, **keywords: Any) -> Any:
            dtypes[path] = first(args, keywords).dtype
            return inner(*args, **keywords)

        return forward

    return forwards(modules, make)


def keep_quantised(model: nn.Module, double: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """What is quantised computes in the model when it is called in the copy, in the dtype that its
    input had there: libraries do not widen such weights."""
    twins = dict(base_modules(unwrapped(double)))

    def narrow(compute: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
        return lambda *args, **keywords: widened(
            compute(*widened(args, dtype), **widened(keywords, dtype))
        )

    for path, module in quantised(model).items():
        name = "base" if isinstance(module, Adapted) else "forward"
        if path in dtypes:  # it was called
            twins[path].__dict__[name] = narrow(getattr(module, name), dtypes[path])


def first(args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(keywords.values()))


def widened(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The same arguments with floating tensors in `dtype`."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: widened(v, dtype) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(widened(v, dtype) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(widened(v, dtype) for v in value)
    return value


def flat(value: Any) -> list[Tensor]:
    """The floating tensors of a model's output, whatever holds them."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in flat(v)] if isinstance(value, list | tuple) else []
