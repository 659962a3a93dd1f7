"""Which way the forward pass of one of PEFT's layers goes, and what it needs on that way."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.adapters.arena import Arena
from fastlora.integrations.peft.hosts import Host, hooks_of
from fastlora.integrations.peft.reading import Found
from fastlora.integrations.peft.slots import PeftSlot


class Plan(NamedTuple):
    """Which way a layer's forward pass goes, until PEFT changes something."""

    host: Any
    found: dict[str, Found]  # the adapters that the host can compute
    active: tuple[str, ...]
    fused: bool  # what is active is what the host computes
    in_graph: bool  # so are all adapters: a graph has them all, and strengths of zero
    dropouts: tuple[nn.Module, ...]  # of active adapters
    biases: tuple[tuple[str, dict[str, Any]], ...]  # lora_bias: adapters and parameters of theirs
    base: nn.Module
    base_class: type[nn.Module]
    hooks: tuple[Any, ...]  # of the modules that the fused way does not call
    uncalled: dict[str, Any]  # the base layer's attributes, where it is one of these; accelerate's
    # hooks are a forward among them


def update_slots(host: Host, found: dict[str, Found], ratios: dict[str, float]) -> None:
    """Gives the host the slots of these adapters, with these ratios, and 0 for the others."""
    arena, slots, laid_out = host._state.arena, host.fastlora, host._state.offsets
    # Strengths are written at once, also where they will be laid out anew: a compiled graph reads
    # them where they are.
    for name in [name for name in slots if name not in found]:
        if name in laid_out:
            arena.set_ratio(host, name, 0.0)
        del slots[name]
        arena.unsettled = True
    for name, adapter in found.items():
        if name not in slots or not adapter.is_of(slots[name]):
            slots[name] = PeftSlot(adapter.places, adapter.spec)
            laid_out.pop(name, None)
            arena.unsettled = True
        ratio = ratios.get(name, 0.0)
        if slots[name].ratio != ratio:
            slots[name].ratio = ratio
            if name in laid_out:
                arena.set_ratio(host, name, ratio)
    host._state.forget()
    host._state.stale = host._state.merged


def plan_of(host: Host, base: nn.Module, found: dict[str, Found], active: list[str]) -> Plan:
    """The way of a layer that has these adapters active; `found`: those that fastlora computes."""
    fused = [found[name] for name in active if name in found]
    own = ((n, found[n].bias) for n in active if n in found)
    alone = len(active) == 1 or not any(f.dora for f in fused)  # PEFT's order matters else
    # PEFT's DoRA of scaling zero still rescales rows to its magnitude; ours is off.
    silent = any(found[n].dora and not host.fastlora[n].ratio for n in active if n in found)
    computes = len(fused) == len(active) and alone and not silent
    uncalled = () if host.beside else hooks_of(base)
    return Plan(
        host,
        found,
        tuple(active),
        fused=computes,
        in_graph=computes and bool(found),
        dropouts=tuple(f.dropout for f in fused if not isinstance(f.dropout, nn.Identity)),
        biases=tuple((name, bias) for name, bias in own if bias is not None),
        base=base,
        base_class=type(base),
        hooks=(*uncalled, *(hook for f in fused for hook in f.hooks)),
        uncalled={} if host.beside else vars(base),
    )


def with_biases(plan: Plan, y: Tensor) -> Tensor:
    """`y + Σ gate · bias` of the adapters that have a bias of their own (lora_bias)."""
    for name, own in plan.biases:
        gate = plan.host.gate(name)[..., :1]  # [1], or [batch, 1]
        change = (gate * own["bias"].to(gate.dtype)).to(y.dtype)
        if isinstance(plan.host.base_module, nn.Conv2d):
            change = change[..., None, None]
        elif change.dim() == 2:
            change = change.view(len(change), *[1] * (y.dim() - 2), -1)
        y = y + change
    return y


def strength(arena: Arena, name: str) -> float | Tensor:
    """What fastlora's functions have set for an adapter; 1 where they know of none."""
    return arena.scales.get(name, 1.0) if arena.enabled.get(name, True) else 0.0


@lru_cache(8)
@torch.inference_mode(False)
def masks(names: tuple[str, ...], device: torch.device, double: bool) -> dict[str, Tensor]:
    """[batch, 1] by name: 1 for the samples that have it."""
    dtype = torch.float64 if double else torch.float32
    rows = {name: [[float(n == name)] for n in names] for name in dict.fromkeys(names)}
    return {name: torch.tensor(row, dtype=dtype, device=device) for name, row in rows.items()}
