"""`inject` and `remove`: adapters go in and out of a model whose layers stay the same objects."""

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastlora.adapters.arena import Arena
from fastlora.adapters.control import adapters, arenas, known_names
from fastlora.adapters.dora import magnitude
from fastlora.adapters.folding import refolding
from fastlora.adapters.layers import (
    Adapted,
    AdaptedLinearLike,
    LayerState,
    adapted_class,
    adapted_layers,
    base_class,
)
from fastlora.adapters.slots import LoRASlot, Slot, Slots, SpectralSlot, kaiming_uniform
from fastlora.adapters.specs import AdapterError, AdapterInfo, LoRA, Spectral

log = logging.getLogger("fastlora")

Where = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def inject(
    model: nn.Module,
    spec: LoRA | Spectral,
    where: Where = None,
    name: str = "default",
    seed: int | None = None,
    freeze: bool = True,
    dtype: torch.dtype | None = None,
) -> AdapterInfo:
    """Adds the adapter `name` to the layers that `where` selects and returns what was added.

    `where`: a regex that must match the whole module path, a list of path suffixes, a predicate
    `(path, module) -> bool`, or None for every layer that `spec` can adapt. LoRA adapts Linear,
    Conv2d and Embedding (subclasses of Linear through their own forward), Spectral also norms.
    Each layer object stays what it was: it changes class, keeps its parameters and state-dict keys,
    and gets a child module `fastlora`.

    `seed` fixes the initial values. `freeze` (the default) stops gradients of all other parameters
    of the model; `remove` gives them back. `dtype` of the new parameters: by default the layer's,
    and float32 on a 16-bit or quantised base.

    Raises AdapterError when the name is taken or has a dot, nothing matches, a selected layer cannot
    be adapted, or the model is on the meta device. The model is unchanged then.
    """
    if not name or "." in name or hasattr(Slots(), name):
        raise AdapterError(f"adapter name: expected a word without dots, got {name!r}")
    if name in known_names(model):
        raise AdapterError(f"adapter name: {name!r} exists already; remove it first")
    if not isinstance(spec, LoRA | Spectral):
        raise TypeError(f"inject: spec: expected LoRA or Spectral, got {type(spec).__name__}")
    chosen = select(model, spec, where)
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    slots = {path: build(path, m, spec, generator, dtype) for path, m in chosen.items()}
    return attach(model, slots, name, freeze=freeze)


def attach(
    model: nn.Module, slots: dict[str, Slot], name: str, *, freeze: bool = True
) -> AdapterInfo:
    """Puts ready slots into the layers at their paths. Nothing here can fail half-way."""
    modules = dict(model.named_modules())
    with refolding(model):
        found = arenas(model)
        arena = merged(found) if found else Arena()
        frozen = []
        if freeze:
            own = {id(p) for layer in adapted_layers(model).values() for p in layer.fastlora.parameters()}
            frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
            for parameter in frozen:
                parameter.requires_grad_(False)
            arena.frozen += frozen
            if frozen:
                log.info("inject froze %d base parameters; remove gives them back", len(frozen))
        for path, slot in slots.items():
            layer = adapt(modules[path], path, arena)
            if isinstance(slot, SpectralSlot) and not layer.is_norm():
                layer.fastlora.decompose(layer.matrix())
            slot.train(layer.training)
            layer.fastlora[name] = slot
        relayout(model, arena)
    disable_fused_encoders(model)
    return adapters(model)[name]


def remove(model: nn.Module, name: str) -> None:
    """Takes the adapter out. Layers without any adapter get their class back: the plain model, with
    the same keys and the same bits. Raises AdapterError for an unknown name."""
    if name not in known_names(model):
        raise AdapterError(f"no adapter named {name!r}; this model has {known_names(model) or 'none'}")
    with refolding(model):
        for arena in arenas(model):
            for layer in adapted_layers(model).values():
                if layer._state.arena is arena and name in layer.fastlora:
                    del layer.fastlora[name]
                    if not len(layer.fastlora):
                        restore(layer)
            relayout(model, arena)
            if not arena.scales:
                for parameter in arena.frozen:
                    parameter.requires_grad_(True)


# --- selection --------------------------------------------------------------------------------------


def select(model: nn.Module, spec: LoRA | Spectral, where: Where) -> dict[str, nn.Module]:
    """The layers that `where` names, each of which `spec` can adapt."""
    matches = matcher(where)
    inside = {id(s) for layer in adapted_layers(model).values() for s in layer.fastlora.modules()}
    chosen: dict[str, nn.Module] = {}
    refused: list[str] = []
    for path, module in model.named_modules():
        if id(module) in inside or not matches(path, module):
            continue
        reason = unsuitable(module, spec)
        if reason is None:
            chosen[path] = module
        elif reason and where is not None and not any(module.children()):
            refused.append(f"{path} ({type(module).__name__}): {reason}")
    if refused:
        raise AdapterError("inject: where selects layers that cannot be adapted: " + "; ".join(refused))
    if not chosen:
        candidates = [p for p, m in model.named_modules() if unsuitable(m, spec) is None][:5]
        raise AdapterError(
            f"inject: where: {where!r} matches no layer that {type(spec).__name__} can adapt; "
            f"this model has for example {candidates}"
        )
    meta = [p for p, m in chosen.items() if any(q.is_meta for q in m.parameters(recurse=False))]
    if meta:
        raise AdapterError(
            f"inject: {meta[0]}: the model is on the meta device and has no weights to adapt; "
            "load it first (model.to_empty and load_state_dict)"
        )
    return chosen


def matcher(where: Where) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda path, module: True
    if isinstance(where, str):
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise AdapterError(f"inject: where: {where!r} is not a regex: {error}") from None
        return lambda path, module: pattern.fullmatch(path) is not None
    if callable(where):
        return where
    suffixes = list(where)
    return lambda path, module: any(path == s or path.endswith("." + s) for s in suffixes)


def unsuitable(module: nn.Module, spec: LoRA | Spectral) -> str | None:
    """None if `spec` can adapt the module, else why not."""
    base = base_class(type(module)) if isinstance(module, Adapted) else type(module)
    if issubclass(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention reads this layer's weight and never calls it"
    if adapted_class(base) is None:
        return "this kind of layer is not supported"
    if base in NORMS:
        if isinstance(spec, LoRA):
            return "LoRA needs a matrix"
        if spec.norms == "skip" or module.weight is None:
            return "norms are skipped"
        return None
    if isinstance(spec, Spectral) and base not in (nn.Linear, nn.Conv2d, nn.Embedding):
        return "spectral shifts need the plain weight of a Linear, Conv2d or Embedding"
    if isinstance(spec, LoRA) and spec.dora and base not in (nn.Linear, nn.Conv2d, nn.Embedding):
        return "DoRA needs the plain weight of a Linear, Conv2d or Embedding"
    return None


# --- building ---------------------------------------------------------------------------------------


def build(
    path: str, module: Any, spec: LoRA | Spectral, generator: torch.Generator, dtype: Any = None
) -> Slot:
    """The slot of one layer at its start: the layer computes what it computed before."""
    weight = module.weight
    if dtype is None:
        low = not weight.is_floating_point() or weight.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if low else weight.dtype
    at = {"dtype": dtype, "device": weight.device}
    if isinstance(spec, Spectral):
        if isinstance(module, NORMS):
            size = weight.numel() if spec.norms == "elementwise" else 1
        else:
            size = min(weight.shape[0], weight[0].numel())
        return SpectralSlot(spec, torch.zeros(size, **at))
    spec = spec.at(path)
    rank = spec.rank
    if isinstance(module, nn.Embedding):
        vocabulary, dim = weight.shape
        # The looked-up factor starts at zero, as in PEFT: its rows are not a fan-in.
        up = torch.randn((dim, rank), generator=generator).to(**at)
        down, rows = torch.zeros((rank, vocabulary), **at), weight.t()
    elif isinstance(module, nn.Conv2d):
        if rank % module.groups:
            raise AdapterError(
                f"inject: {path}: rank {rank} is not divisible by the convolution's {module.groups} "
                "groups"
            )
        down = kaiming_uniform((rank, *weight.shape[1:]), generator, **at)
        up = torch.zeros((module.out_channels, rank // module.groups, 1, 1), **at)
        rows = weight
    else:
        down = kaiming_uniform((rank, module.in_features), generator, **at)
        up, rows = torch.zeros((module.out_features, rank), **at), weight
    return LoRASlot(spec, down, up, magnitude(rows).to(**at) if spec.dora else None)


def adapt(module: nn.Module, path: str, arena: Arena) -> Adapted:
    if not isinstance(module, Adapted):
        adapted = adapted_class(type(module))
        assert adapted is not None
        module.__class__ = adapted
        module.__dict__["_state"] = LayerState(arena, path)
        module.add_module("fastlora", Slots())
    assert isinstance(module, Adapted)
    return module


def restore(layer: Adapted) -> None:
    """The plain layer again."""
    del layer._modules["fastlora"]
    del layer.__dict__["_state"]
    layer.__class__ = base_class(type(layer))


def relayout(model: nn.Module, arena: Arena) -> None:
    """Gives every layer its entries in the arena."""
    layers = [a for a in adapted_layers(model).values() if a._state.arena is arena]
    slots = [[(n, s.width, s.ratio) for n, s in layer.fastlora.items()] for layer in layers]
    for layer, offset in zip(layers, arena.layout(slots), strict=True):
        layer._state.offset = offset
        layer._state.forget()
        arena.prepare(layer.weight.device)


def merged(found: list[Arena]) -> Arena:
    """One arena for a model whose parts were adapted separately before."""
    first = found[0]
    for other in found[1:]:
        clash = sorted(set(first.scales) & set(other.scales))
        if clash:
            raise AdapterError(f"parts of the model have different adapters of one name: {clash}")
    for other in found[1:]:
        first.scales.update(other.scales)
        first.enabled.update(other.enabled)
        first.frozen += other.frozen
    return first


def disable_fused_encoders(model: nn.Module) -> None:
    """nn.TransformerEncoderLayer's inference path reads the weights of its linear layers and never
    calls them; without this attribute it takes its ordinary path."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(m, Adapted) for m in module.modules()
        ):
            module.activation_relu_or_gelu = 0


__all__ = ["AdaptedLinearLike", "LoRASlot", "attach", "build", "inject", "remove", "select"]
