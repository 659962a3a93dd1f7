"""LoRAs for tiny pipelines, with the update of every weight written out in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[str, str]  # component, path of a module
PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def linears(pipeline: Any, component: str, *ends: str) -> list[Place]:
    """The Linear and Conv2d layers of a component whose paths end so."""
    return [
        (component, path)
        for path, module in getattr(pipeline, component).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and path.endswith(ends)
    ]


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def factors(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`down [rank, in, kh, kw]` and `up [out, rank, 1, 1]` for a weight."""
    up = draw((weight.shape[0], rank, *[1] * (weight.dim() - 2)), generator)
    return draw((rank, *weight.shape[1:]), generator), up


def update(down: Tensor, up: Tensor) -> Tensor:
    """up down, in the weight's shape."""
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def kohya(
    pipeline: Any, places: list[Place], seed: int = 0, te: str = "lora_te"
) -> tuple[dict[str, Tensor], dict[Place, Tensor]]:
    """A file of kohya's for these modules, whose ranks and alphas all differ, and their updates."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    updates: dict[Place, Tensor] = {}
    for i, (component, path) in enumerate(places):
        rank, alpha = 2 ** (i % 3), 2.0 ** (i % 4 - 1)  # strengths are float32: exact there
        weight = getattr(pipeline, component).get_submodule(path).weight
        down, up = factors(weight, rank, generator)
        prefix = te if component == "text_encoder" else PREFIX[component]
        name = f"{prefix}_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
        updates[component, path] = alpha / rank * update(down, up)
    return tensors, updates


def doubled(pipeline: Any) -> Any:
    """A copy in float64."""
    pipeline = copy.deepcopy(pipeline)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.double()
    return pipeline


@torch.no_grad()
def changed(pipeline: Any, updates: Mapping[Place, Tensor], scale: float = 1.0) -> Any:
    """A copy in float64 with the updates added to its weights."""
    pipeline = doubled(pipeline)
    for (component, path), delta in updates.items():
        getattr(pipeline, component).get_submodule(path).weight += scale * delta
    return pipeline
