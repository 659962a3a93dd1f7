"""Which way the forward pass of one of PEFT's layers goes, and what it needs on that way."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.adapters.arena import Arena
from fastlora.adapters.specs import AdapterError
from fastlora.adapters.state import LayerState, interposed
from fastlora.integrations.peft.hosts import Host, hooks_of
from fastlora.integrations.peft.reading import Found
from fastlora.integrations.peft.slots import PeftSlot
from fastlora.ops._define import kernels

FAINT = 1e-30


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
    # Of the modules that the fused way does not call, the base layer mostly among them:
    hooks: tuple[dict[int, Any], ...]
    attributes: tuple[dict[str, Any], ...]  # accelerate's hooks are a forward among them
    # PEFT's dicts of its modules, and what was in them: others may put their own there.
    dicts: tuple[dict[str, Any], ...]
    children: tuple[Any, ...]

    def untouched(self, base: nn.Module) -> bool:
        """Whether the base layer is what it was, the modules that the fused way does not call are
        those that it knows, and nobody asks to hear of their calls or looks on (torch.func takes no
        gradients of operators)."""
        if base is not self.base or type(base) is not self.base_class:
            return False
        for own in self.attributes:
            if "forward" in own:
                return False
        same = kernels.same_children(self.dicts, self.children)
        return same and not any(self.hooks) and not interposed()


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


def ratio(adapter: Found, scaling: float) -> float:
    """The gate of an active adapter of this scaling. PEFT's DoRA of scaling zero still rescales
    rows to its magnitude, while ours is off at zero: it gets a gate that adds nothing."""
    return FAINT if adapter.dora and not scaling else float(scaling)


def plan_of(host: Host, layer: Any, found: dict[str, Found], active: list[str]) -> Plan:
    """The way of a layer that has these adapters active; `found`: those that fastlora computes."""
    base = layer.base_layer
    fused = [found[name] for name in active if name in found]
    own = ((n, found[n].bias) for n in active if n in found)
    alone = len(active) == 1 or not any(f.dora for f in fused)  # PEFT's order matters else
    computes = len(fused) == len(active) and alone
    uncalled = [module for f in fused for module in f.modules]
    if not host.beside:
        uncalled.append(base)
    dicts = tuple(own._modules for own in (layer.lora_A, layer.lora_B, layer.lora_dropout))
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
        hooks=tuple(hooks for module in uncalled for hooks in hooks_of(module)),
        attributes=tuple(vars(module) for module in uncalled),
        dicts=dicts,
        children=tuple(child for modules in dicts for child in modules.values()),
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


def peft_reads(layer: Any, state: LayerState) -> dict[str, Any]:
    """What PEFT's own forward pass has to find on a layer for the strengths that fastlora's
    functions have set; nothing where these are all 1. Raises AdapterError for one per sample."""
    scaling, changed = {}, False
    for name, value in layer.scaling.items():
        factor = strength(state.arena, name)
        if isinstance(factor, Tensor):
            raise AdapterError(
                f"{state.path}: the strength of {name!r} is per sample, and PEFT computes this "
                "layer now, with one for all; use a number"
            )
        changed |= factor != 1.0
        scaling[name] = value if factor == 1.0 else value * factor
    if not changed:
        return {}
    # A DoRA of strength zero is off; one of PEFT's scaling zero still rescales rows.
    on = [n for n in layer.active_adapters if n in scaling and strength(state.arena, n) != 0]
    return {"scaling": scaling, "_active_adapter": on}


@lru_cache(8)
@torch.inference_mode(False)
def masks(names: tuple[str, ...], device: torch.device, double: bool) -> dict[str, Tensor]:
    """[batch, 1] by name: 1 for the samples that have it."""
    dtype = torch.float64 if double else torch.float32
    rows = {name: [[float(n == name)] for n in names] for name in dict.fromkeys(names)}
    return {name: torch.tensor(row, dtype=dtype, device=device) for name, row in rows.items()}
