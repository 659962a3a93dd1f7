"""What adapted layers have to compute, from dense float64 weights. Nothing here calls the code
under test; it reads the parameters of its slots."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.adapters.lookup import WALK

LOW = (torch.float16, torch.bfloat16)


def randomise(model: nn.Module, seed: int = 1, size: float = 1.0) -> None:
    """Fills all adapters of a model, so that every one of them has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in [m for m in model.modules() if "fastlora" in m._modules]:
            for key, p in layer.fastlora.named_parameters():
                drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                if key.endswith("magnitude"):
                    p.mul_((1 + 0.3 * drawn).to(p.dtype))
                    continue
                looked_up = isinstance(layer, nn.Embedding) and key.endswith("down")
                width = 1.0 if looked_up else p[0].numel() if p.dim() > 1 else 4.0
                p.copy_((size * drawn / width**0.5).to(p.dtype))


def lora_delta(base: nn.Module, slot: Any, strength: float) -> Tensor:
    """`strength · U D` in the shape of the base's weight, float64, written out element by group."""
    down, up = slot.down.detach().double(), slot.up.detach().double()
    if isinstance(base, nn.Embedding):
        return strength * (up @ down).t()
    if not isinstance(base, nn.Conv2d):
        return strength * (up @ down)
    delta = torch.zeros(base.weight.shape, dtype=torch.float64)
    rank, out = len(down) // base.groups, base.out_channels // base.groups
    for group in range(base.groups):
        for o in range(group * out, (group + 1) * out):
            for r in range(rank):
                delta[o] += up[o, r, 0, 0] * down[group * rank + r]
    return strength * delta


def adapted_weight(base: nn.Module, slots: Sequence[tuple[Any, float]]) -> Tensor:
    """`W'` for LoRA and DoRA slots at their strengths (scale times α/r), float64.

    Several add up: `W + Σ (ρ (W + Δ) - W)` with `ρ = m / ‖W + Δ‖` per output of a DoRA, else 1.
    """
    weight = base.weight.detach().double()
    total = weight.clone()
    for slot, strength in slots:
        if strength == 0:
            continue
        whole = weight + lora_delta(base, slot, strength)
        if slot.magnitude is not None:
            rows = whole.t() if isinstance(base, nn.Embedding) else whole.flatten(1)
            rho = slot.magnitude.detach().double() / rows.norm(dim=1)
            shape = (1, -1) if isinstance(base, nn.Embedding) else (-1, *[1] * (whole.dim() - 1))
            whole = whole * rho.view(shape)
        total += whole - weight
    return total


def spectral_weight(base: nn.Module, shift: Tensor, strength: float) -> Tensor:
    """`U diag(relu(σ + strength δ)) Vᵀ` of the base's weight in float64; norms: `w + strength δ`.

    The shifts are in the order of falling singular values, which must be distinct."""
    weight = base.weight.detach().double()
    if weight.dim() == 1:
        return weight + strength * shift.detach().double()
    u, s, vh = torch.linalg.svd(as_matrix(base, weight), full_matrices=False)
    changed = (s + strength * shift.detach().double()).clamp_min(0)
    return as_weight(base, (u * changed) @ vh)


def as_matrix(base: nn.Module, weight: Tensor) -> Tensor:
    """The weight with an output a row; of a transposed convolution `[in, out/groups, kh, kw]`
    output by output."""
    if not isinstance(base, nn.ConvTranspose2d):
        return weight.reshape(len(weight), -1)
    if base.groups == 1:
        return weight.movedim(1, 0).reshape(base.out_channels, -1)
    inputs = base.in_channels // base.groups
    rows = [
        weight[group * inputs : (group + 1) * inputs, output].flatten()
        for group in range(base.groups)
        for output in range(base.out_channels // base.groups)
    ]
    return torch.stack(rows)


def as_weight(base: nn.Module, matrix: Tensor) -> Tensor:
    """The inverse of `as_matrix`."""
    shape = base.weight.shape
    if not isinstance(base, nn.ConvTranspose2d):
        return matrix.view(shape)
    index = as_matrix(base, torch.arange(base.weight.numel()).view(shape))
    flat = torch.empty(base.weight.numel(), dtype=matrix.dtype)
    flat[index.flatten()] = matrix.flatten()
    return flat.view(shape)


def with_weight(base: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """A plain layer's own forward on another weight, everything in float64."""
    double = copy.deepcopy(base).double()
    x = x.double() if x.is_floating_point() else x
    return torch.func.functional_call(double, {"weight": weight}, (x,)).detach()


def plain_low_rank(base: Any, slots: Sequence[tuple[Any, float]], x: Tensor) -> Tensor:
    """Base plus LoRA and DoRA branches in plain PyTorch in the base's dtype, as PEFT has them."""
    dtype = base.weight.dtype
    image = isinstance(base, nn.Conv2d)
    bias = getattr(base, "bias", None)
    with torch.no_grad():
        bare = copy.deepcopy(base)
        if bias is not None:
            bare.bias = None
        plain = total = bare(x)
        for slot, strength in slots:
            down, up = slot.down.to(dtype), slot.up.to(dtype)
            if isinstance(base, nn.Embedding):
                part = F.linear(F.embedding(x, down.t()) * strength, up)
            elif image:
                part = F.conv2d(
                    bare._conv_forward(x, down, None) * strength, up, groups=base.groups
                )
            else:
                part = F.linear(F.linear(x, down) * strength, up)
            if slot.magnitude is not None:
                wide = torch.promote_types(dtype, torch.float32)
                whole = base.weight.to(wide) + lora_delta(base, slot, strength).to(wide)
                whole = whole.t() if isinstance(base, nn.Embedding) else whole.flatten(1)
                rho = (slot.magnitude.to(wide) / whole.norm(dim=1)).to(dtype)
                rho = rho[:, None, None] if image else rho
                part = (rho - 1) * plain + rho * part
            total = total + part
        if bias is not None:
            total = total + (bias[:, None, None] if image else bias)
    return total


def assert_twofold(actual: Tensor, exact: Tensor, plain: Tensor, roundings: int = 1) -> None:
    """The project's rule: at most twice the error of plain PyTorch in the low dtype, where so many
    roundings of the largest value count as an error that plain PyTorch may make."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    assert actual.dtype == plain.dtype, (actual.dtype, plain.dtype)
    error = (actual.detach().double() - exact).abs().max()
    rounding = roundings * torch.finfo(actual.dtype).eps * exact.abs().max()
    assert error <= 2 * max((plain.double() - exact).abs().max(), rounding)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit by bit, so that 0.0 is not -0.0 and a NaN is itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    view = views[a.element_size()]
    return torch.equal(a.detach().contiguous().view(view), b.detach().contiguous().view(view))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What removing all adapters has to bring back."""
    return {
        "classes": {path: type(m) for path, m in model.named_modules()},
        "keys": list(model.state_dict()),
        "values": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "ids": {k: id(p) for k, p in model.named_parameters()},
        "grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "own": {path: set(vars(m)) - {WALK} for path, m in model.named_modules()},
        "buffers": [k for k, _ in model.named_buffers()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    for what in ("classes", "keys", "ids", "grad", "own", "buffers"):
        assert now[what] == before[what], what
    for key, value in before["values"].items():
        assert same_bits(now["values"][key], value), key
