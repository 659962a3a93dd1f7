"""How many parameters an adapter would have."""

import math
from typing import Any

from torch import nn

from fastlora.adapters.building import check_groups, shift_count
from fastlora.adapters.lookup import unwrapped
from fastlora.adapters.selecting import Where, check_paths, select
from fastlora.adapters.slots import shapes_lora
from fastlora.adapters.specs import LoRA, Spectral


def parameter_counts(
    model: nn.Module, spec: LoRA | Spectral, where: Where = None
) -> dict[str, int]:
    """The numbers that `inject(model, spec, where)` would add, by module path; nothing is changed.

    Shapes are all that it needs: a model on the meta device will do. Spectral shifts are as many
    as a layer has singular values, fewer where `decompose` has truncated them. Raises AdapterError
    where `inject` would refuse `spec` or `where`.
    """
    if not isinstance(spec, LoRA | Spectral):
        raise TypeError(
            f"parameter_counts: spec: expected LoRA or Spectral, got {type(spec).__name__}"
        )
    chosen = select(unwrapped(model), spec, where, "parameter_counts", meta=True)
    check_paths(spec, chosen, "parameter_counts")
    return {path: count(path, module, spec) for path, module in chosen.items()}


def count(path: str, module: nn.Module, spec: LoRA | Spectral) -> int:
    if isinstance(spec, Spectral):
        return shift_count(module, spec)
    spec = spec.at(path)
    if isinstance(module, nn.Conv2d):
        check_groups(path, module, spec.rank, "parameter_counts")
    weight: Any = module.weight
    return sum(map(math.prod, shapes_lora(module, weight, spec).values()))
