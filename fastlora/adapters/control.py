"""Looking at a model's adapters and changing their strength."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from fastlora.adapters.arena import Arena
from fastlora.adapters.folding import refolding
from fastlora.adapters.layers import adapted_layers
from fastlora.adapters.slots import LoRASlot
from fastlora.adapters.specs import AdapterError, AdapterInfo

Scales = Mapping[str, float | Tensor] | float | Tensor


def arenas(model: nn.Module) -> list[Arena]:
    """The arenas of a model's adapted layers: one, unless its parts were adapted separately."""
    found: dict[int, Arena] = {}
    for layer in adapted_layers(model).values():
        found.setdefault(id(layer._state.arena), layer._state.arena)
    return list(found.values())


def known_names(model: nn.Module) -> list[str]:
    return sorted({name for arena in arenas(model) for name in arena.scales})


def adapters(model: nn.Module) -> dict[str, AdapterInfo]:
    """The adapters of a model by name."""
    layers = adapted_layers(model)
    result = {}
    for arena in arenas(model):
        for name, scale in arena.scales.items():
            slots = {
                path: layer.fastlora[name] for path, layer in layers.items() if name in layer.fastlora
            }
            if not slots:  # in a part of the model that is not under `model`
                continue
            ranks = [s.width for s in slots.values() if isinstance(s, LoRASlot)]
            result[name] = AdapterInfo(
                kind=next(iter(slots.values())).kind,
                modules=tuple(slots),
                rank=max(ranks) if ranks else None,
                parameters=sum(p.numel() for s in slots.values() for p in s.parameters()),
                scale=scale,
                enabled=arena.enabled[name],
            )
    return result


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """What an optimiser should train: the parameters of one adapter, or of all."""
    if name is not None and name not in known_names(model):
        raise AdapterError(f"no adapter named {name!r}; this model has {known_names(model) or 'none'}")
    return [
        p
        for layer in adapted_layers(model).values()
        for other, slot in layer.fastlora.items()
        if name is None or other == name
        for p in slot.parameters()
    ]


def set_scale(model: nn.Module, scales: Scales) -> None:
    """Sets strengths by adapter name, or of all adapters at once.

    A number, or a tensor `[batch]`: one strength per sample; then the leading size of every adapted
    layer's input has to be `batch`. The gates are `scale · α/r`. A scale of 0.0 leaves the base
    layer alone, bit for bit. A folded model is folded again. Raises AdapterError for unknown names.
    """
    apply(model, scales, {})


def enable(model: nn.Module, *names: str) -> None:
    """Switches adapters on (all of them without names); their scales are what they were."""
    apply(model, {}, dict.fromkeys(names or known_names(model), True))


def disable(model: nn.Module, *names: str) -> None:
    """Switches adapters off (all of them without names): the plain base layers run."""
    apply(model, {}, dict.fromkeys(names or known_names(model), False))


@contextmanager
def scaled(model: nn.Module, scales: Scales) -> Iterator[nn.Module]:
    """`set_scale` for a block of code; scales and switches are put back at its end."""
    before = [(a, dict(a.scales), dict(a.enabled)) for a in arenas(model)]
    set_scale(model, scales)
    try:
        yield model
    finally:
        with refolding(model):
            for arena, old, enabled in before:  # an adapter may have been removed meanwhile
                arena.set(
                    {n: s for n, s in old.items() if n in arena.scales},
                    {n: e for n, e in enabled.items() if n in arena.scales},
                )


@contextmanager
def tiled(model: nn.Module, copies: int) -> Iterator[nn.Module]:
    """Within it, per-sample strengths repeat `copies` times along the batch, as classifier-free
    guidance concatenates its conditional and unconditional halves."""
    found = arenas(model)
    before = [arena.copies for arena in found]
    try:
        for arena in found:
            arena.tile(arena.copies * copies)
        yield model
    finally:
        for arena, old in zip(found, before, strict=True):
            arena.tile(old)


def apply(model: nn.Module, scales: Scales, enabled: dict[str, bool]) -> None:
    names = known_names(model)
    if not isinstance(scales, Mapping):
        scales = dict.fromkeys(names, scales)
    for name in (*scales, *enabled):
        if name not in names:
            raise AdapterError(f"no adapter named {name!r}; this model has {names or 'none'}")
    with refolding(model):
        for arena in arenas(model):
            own = arena.scales
            arena.set(
                {n: s for n, s in scales.items() if n in own},
                {n: e for n, e in enabled.items() if n in own},
            )
