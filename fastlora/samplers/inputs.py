"""What a sampling is given, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.ops.sampler_step import MAX_OUTPUTS, mask_fits
from fastlora.samplers.arguments import describe, equal, number, on_host
from fastlora.samplers.noise import as_seeds
from fastlora.samplers.table import Table

Model = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass
class Inputs:
    """Tensors of a sampling of n model outputs over S steps, where x is and in x's dtype."""

    x: Tensor  # [B, ...] float32 or float64
    cond: Any  # for n * B samples: all of the first output, then all of the next
    weights: Tensor  # [S or 1, n, B or 1]
    seeds: Tensor | None  # [B]
    rescale: Tensor | None  # [B or 1]
    mask: Tensor | None  # as `sampler_step` takes it
    known: Tensor | None  # [B, ...]
    input_dtype: torch.dtype

    @property
    def copies(self) -> int:
        return self.weights.shape[1]


@dataclass(frozen=True)
class Guidance:
    """How the model's outputs are combined, as the caller says it."""

    scale: float | Tensor = 1.0
    weights: Sequence[Any] | Tensor | None = None
    rescale: float | Tensor = 0.0


@on_host
def prepare(
    operator: str,
    model: Model,
    table: Table,
    x: Tensor,
    cond: Any,
    uncond: Any,
    guidance: Guidance,
    seeds: Sequence[int] | Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
) -> Inputs:
    """Raises TypeError or ValueError, naming operator and argument, for what does not fit."""
    if not callable(model):
        raise TypeError(
            f"{operator}: model: expected a module or a function, got {describe(model)}"
        )
    if not isinstance(table, Table):
        raise TypeError(
            f"{operator}: table: expected a Table, as ddim(...) makes, got {describe(table)}"
        )
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 1:
        raise ValueError(
            f"{operator}: x: expected a floating-point tensor [B, ...], got {describe(x)}"
        )
    batch, input_dtype = x.shape[0], x.dtype
    if isinstance(model, nn.Module):
        floating = (p.dtype for p in model.parameters() if p.is_floating_point())
        input_dtype = next(floating, x.dtype)
    x = x.double() if torch.float64 in (x.dtype, input_dtype) else x.float()
    if guidance.weights is None:
        weights = guided(operator, guidance.scale, uncond is not None, batch, len(table))
        if uncond is not None:
            cond = concatenated(operator, [cond, uncond], batch, "uncond")
    else:
        weights = given_weights(operator, guidance, uncond, batch, len(table))
        cond = conditions(operator, cond, weights.shape[1], batch)
    phi = rescaling(operator, guidance.rescale, batch)
    if (mask is None) != (known is None):
        missing = "mask" if mask is None else "known"
        raise ValueError(f"{operator}: {missing}: expected both mask and known, got one of them")
    if mask is not None and known is not None:
        mask, known = inpainting(operator, mask, known, x)
    if seeds is not None or table.stochastic or mask is not None:
        seeds = as_seeds(seeds, batch, x.device, operator)
    like = {"device": x.device, "dtype": x.dtype}
    rescale = None if phi is None else phi.to(**like)
    return Inputs(x, cond, weights.to(**like), seeds, rescale, mask, known, input_dtype)


@on_host
def guided(
    operator: str, scale: float | Tensor, with_uncond: bool, batch: int, steps: int
) -> Tensor:
    """Weights [S or 1, n, B or 1] of classifier-free guidance: (g, 1 - g), or 1 for one output."""
    expected = f"a number or a tensor [{batch}], or [{steps}, {batch} or 1] by step"
    try:
        g = torch.as_tensor(scale, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):  # torch's own, which do not name the argument
        raise ValueError(
            f"{operator}: guidance_scale: expected {expected}, got {describe(scale)}"
        ) from None
    if not with_uncond:
        if g.numel() != 1 or g.item() != 1:
            raise ValueError(
                f"{operator}: guidance_scale: expected 1.0 where uncond is not given, got {scale}"
                " (guidance needs the unconditional prediction: pass uncond)"
            )
        return torch.ones(1, 1, 1)
    by_step = g.dim() == 2 and g.shape[0] == steps and g.shape[1] in (1, batch)
    if not by_step and (g.dim() > 1 or g.numel() not in (1, batch)):
        raise ValueError(f"{operator}: guidance_scale: expected {expected}, got {list(g.shape)}")
    require_finite(operator, "guidance_scale", g)
    g = g if by_step else g.reshape(1, -1)
    return torch.stack((g, 1 - g), dim=1)


@on_host
def given_weights(operator: str, guidance: Guidance, uncond: Any, batch: int, steps: int) -> Tensor:
    """Weights [S or 1, n, B or 1] from [n], [n, B or 1] or [S, n, B or 1]."""
    if uncond is not None or number(guidance.scale) != 1:
        raise ValueError(
            f"{operator}: weights: expected neither uncond nor guidance_scale beside them: cond has"
            " a condition for each weight"
        )
    expected = f"[n], [n, {batch} or 1] or [{steps}, n, {batch} or 1], n from 1 to {MAX_OUTPUTS}"
    try:
        w = torch.as_tensor(guidance.weights, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        got = describe(guidance.weights)
        raise ValueError(f"{operator}: weights: expected {expected}, got {got}") from None
    shape = list(w.shape)
    w = w[None, :, None] if w.dim() == 1 else w[None] if w.dim() == 2 else w
    right = w.dim() == 3 and w.shape[0] in (1, steps) and w.shape[2] in (1, batch)
    if not right or not 1 <= w.shape[1] <= MAX_OUTPUTS:
        raise ValueError(f"{operator}: weights: expected {expected}, got {shape}")
    require_finite(operator, "weights", w)
    return w


def conditions(operator: str, cond: Any, n: int, batch: int) -> Any:
    if not isinstance(cond, (tuple, list)) or len(cond) != n:
        raise ValueError(
            f"{operator}: cond: expected a list of {n}, one for each weight, got {describe(cond)}"
        )
    return cond[0] if n == 1 else concatenated(operator, list(cond), batch, "cond")


@on_host
def rescaling(operator: str, phi: float | Tensor, batch: int) -> Tensor | None:
    """[B or 1], or None where nothing is to be rescaled."""
    expected = (
        f"{operator}: guidance_rescale: expected a number or a tensor [{batch}] within [0, 1]"
    )
    try:
        values = torch.as_tensor(phi, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{expected}, got {describe(phi)}") from None
    if values.dim() > 1 or values.numel() not in (1, batch):
        raise ValueError(f"{expected}, got {list(values.shape)}")
    if values.device.type == "cpu":  # elsewhere a look would wait for the device
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"{expected}, got {values.tolist()}")
        if not bool(values.any()):
            return None
    return values.reshape(-1)


def inpainting(operator: str, mask: Tensor, known: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """mask as `sampler_step` takes it and known as large as x."""
    shape = list(x.shape)
    real = isinstance(mask, Tensor) and not mask.is_complex()
    if not real or not mask_fits(mask.shape, x.shape):
        raise ValueError(
            f"{operator}: mask: expected a tensor {shape}, its first two sizes 1 where it is the"
            f" same for all samples or channels, got {describe(mask)}"
        )
    real = isinstance(known, Tensor) and not known.is_complex()
    if not real or list(known.shape) not in (shape, [1, *shape[1:]]):
        raise ValueError(
            f"{operator}: known: expected the clean values {shape}, got {describe(known)}"
        )
    if mask.device.type == "cpu" and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            f"{operator}: mask: expected 1 where samples are made, 0 where they are known, got"
            f" {mask.min().item():g} to {mask.max().item():g}"
        )
    return mask.to(x.device, x.dtype).contiguous(), known.to(x).expand(x.shape).contiguous()


def require_finite(operator: str, argument: str, values: Tensor) -> None:
    """Not of values on an accelerator, which would wait for the device."""
    if values.device.type == "cpu" and not bool(values.isfinite().all()):
        raise ValueError(f"{operator}: {argument}: expected finite numbers, got {values.tolist()}")


def concatenated(operator: str, parts: list[Any], batch: int, argument: str, at: str = "") -> Any:
    """The parts one after another along the batch, in every tensor of their equal structures."""
    where, first = f"{operator}: {argument}{at}", parts[0]
    tensors = [p for p in parts if isinstance(p, Tensor)]
    if len(tensors) == len(parts):
        wrong = [p for p in tensors if p.shape != first.shape or p.dim() < 1 or len(p) != batch]
        if wrong:
            raise ValueError(
                f"{where}: expected the shape of cond, [{batch}, ...], got"
                f" {list(tensors[-1].shape)} beside {list(first.shape)}"
            )
        return torch.cat(tensors)
    if all(isinstance(p, Mapping) and p.keys() == first.keys() for p in parts):
        return {
            k: concatenated(operator, [p[k] for p in parts], batch, argument, f"{at}[{k!r}]")
            for k in first
        }
    if all(isinstance(p, (tuple, list)) and len(p) == len(first) for p in parts):
        return tuple(
            concatenated(operator, list(column), batch, argument, f"{at}[{i}]")
            for i, column in enumerate(zip(*parts, strict=True))
        )
    if all(p is first or equal(p, first) for p in parts):  # the same for all: None, a flag
        return first
    raise ValueError(
        f"{where}: expected tensors in the same tuples and dicts as cond, got"
        f" {describe(parts[-1])} beside {describe(first)}"
    )
