"""New slots for layers, with the values that training starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.dora import magnitude
from fastlora.adapters.factorising import rank_of
from fastlora.adapters.selecting import NORMS
from fastlora.adapters.slots import (
    LoRASlot,
    Slot,
    SpectralSlot,
    kaiming_uniform,
    shapes_lora,
)
from fastlora.adapters.specs import AdapterError, LoRA, Spectral
from fastlora.adapters.tensors import COMPUTED


def build(
    path: str, module: Any, spec: LoRA | Spectral, generator: torch.Generator, dtype: Any = None
) -> Slot:
    """The slot of one layer at its start: the layer computes what it computed before."""
    weight = module.weight
    at = {"dtype": parameter_dtype(path, weight, dtype), "device": weight.device}
    if isinstance(spec, Spectral):
        return SpectralSlot(spec, torch.zeros(shift_count(module, spec), **at))
    spec = spec.at(path)
    rank = spec.rank
    if isinstance(module, nn.Conv2d):
        check_groups(path, module, rank, "inject")
    shapes = shapes_lora(module, weight, spec)
    if isinstance(module, nn.Embedding):
        # The looked-up factor starts at zero, as in PEFT: its rows are not a fan-in.
        up = torch.randn(shapes["up"], generator=generator).to(**at)
        down = torch.zeros(shapes["down"], **at)
    else:
        down = kaiming_uniform(shapes["down"], generator, **at)
        up = torch.zeros(shapes["up"], **at)
    rows = weight if isinstance(module, nn.Linear | nn.Conv2d) else weight.t()
    return LoRASlot(spec, down, up, magnitude(rows).to(**at) if spec.dora else None)


def shift_count(module: Any, spec: Spectral) -> int:
    """How many shifts a layer has."""
    if not isinstance(module, NORMS):
        return rank_of(module)
    return module.weight.numel() if spec.norms == "elementwise" else 1


def check_groups(path: str, module: nn.Conv2d, rank: int, what: str) -> None:
    if rank % module.groups:
        raise AdapterError(
            f"{what}: {path}: rank {rank} is not divisible by the convolution's {module.groups} "
            "groups"
        )


def dtypes_beside(weight: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that parameters beside `weight` can have. One that no layer computes in (integers,
    float8) does not tell which the layer does."""
    if weight.dtype not in COMPUTED:
        return torch.float32, torch.float16, torch.bfloat16
    if weight.dtype == torch.float64:
        return (torch.float64,)
    return tuple(dict.fromkeys((weight.dtype, torch.float32)))


def parameter_dtype(
    path: str, weight: Tensor, dtype: torch.dtype | None, what: str = "inject"
) -> torch.dtype:
    """The dtype of new parameters beside `weight`: what is asked for if the operators take it."""
    fits = dtypes_beside(weight)
    if dtype is None:
        return torch.float32 if torch.float32 in fits else weight.dtype
    if not isinstance(dtype, torch.dtype):
        raise AdapterError(f"{what}: dtype: expected a torch.dtype, got {dtype!r}")
    if dtype not in fits:
        names = " or ".join(map(str, fits))
        raise AdapterError(f"{what}: {path}: dtype: expected {names}, got {dtype}")
    return dtype


def needs_factors(module: nn.Module) -> bool:
    """Whether a layer has to be decomposed before its singular values can be shifted."""
    if isinstance(module, NORMS):
        return False
    return not (isinstance(module, Adapted) and module.fastlora.svd_s is not None)
