"""Looking at a model's adapters and changing their strength."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from fastlora.adapters.arena import Arena, Scale, checked
from fastlora.adapters.folded_weight import fold_layers
from fastlora.adapters.folding import check_strengths, folded_by, unfold
from fastlora.adapters.lookup import (
    adapted_layers,
    arenas,
    known_names,
    require_known,
    walked,
)
from fastlora.adapters.specs import AdapterError, AdapterInfo

Scales = Mapping[str, Scale] | Scale
Changes = list[tuple[Arena, dict[str, Any], dict[str, bool]]]

# Re-entrant: collecting an abandoned block may end it while its thread is inside here.
_tiling = threading.RLock()


def adapters(model: nn.Module) -> dict[str, AdapterInfo]:
    """The adapters of a model by name."""
    layers = adapted_layers(model)
    result = {}
    for arena in arenas(model):
        for name, scale in arena.scales.items():
            slots = {
                path: layer.fastlora[name]
                for path, layer in layers.items()
                if name in layer.fastlora
            }
            if not slots:  # in a part of the model that is not under `model`
                continue
            ranks = [s.rank for s in slots.values() if s.rank is not None]
            result[name] = AdapterInfo(
                kind="+".join(dict.fromkeys(s.kind for s in slots.values())),
                modules=tuple(slots),
                rank=max(ranks) if ranks else None,
                parameters=sum(map(numbers_of, slots.values())),
                scale=scale,
                enabled=arena.enabled[name],
            )
    return result


def numbers_of(slot: nn.Module) -> int:
    """How many numbers a slot has; its parameters are all its own."""
    return sum(p.numel() for p in slot._parameters.values() if p is not None)


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """What an optimiser should train: the parameters of one adapter, or of all."""
    if name is not None:
        require_known(model, name)
    return [
        p
        for layer in adapted_layers(model).values()
        for other, slot in layer.fastlora.items()
        if name is None or other == name
        for p in slot.parameters()
    ]


def set_scale(model: nn.Module, scales: Scales) -> None:
    """Sets strengths by adapter name, or of all adapters at once.

    A number, or a tensor `[batch]`: one strength per sample; then the leading size of the input of
    every layer with that adapter has to be `batch`. A tensor that requires a gradient gets it. The
    gates are `scale · α/r`, float32 also beside float64 weights. A scale of 0.0 leaves the base
    layer alone, bit for bit. A folded model is folded again.

    Raises AdapterError, and changes nothing, for unknown names, for a strength per sample where the
    model is folded or the adapter is more than low-rank products somewhere (DoRA, spectral shifts,
    LoHa, a bias, ...), and for strengths that are not finite, by themselves or times α/r. Values of
    tensors on an accelerator are not looked at, which would wait for the device.
    """
    if not isinstance(scales, Mapping):
        scales = dict.fromkeys(some_names(model, "set_scale"), scales)
    apply(model, scales, {})


def enable(model: nn.Module, *names: str) -> AbstractContextManager[nn.Module]:
    """Switches adapters on (all of them without names); their scales are what they were.

    Stays so, or for a block of code: `with fastlora.enable(model): ...`.
    """
    before = strengths(model)
    apply(model, {}, dict.fromkeys(names or some_names(model, "enable"), True))
    return restoring(model, before)


def disable(model: nn.Module, *names: str) -> AbstractContextManager[nn.Module]:
    """Switches adapters off (all of them without names): the plain base layers run.

    Stays so, or for a block of code: `with fastlora.disable(model): ...`.
    """
    before = strengths(model)
    apply(model, {}, dict.fromkeys(names or some_names(model, "disable"), False))
    return restoring(model, before)


@contextmanager
def scaled(model: nn.Module, scales: Scales) -> Iterator[nn.Module]:
    """`set_scale` for a block of code; scales and switches are put back at its end."""
    before = strengths(model)
    set_scale(model, scales)
    with restoring(model, before):
        yield model


def some_names(model: nn.Module, what: str) -> list[str]:
    names = known_names(model)
    if not names:
        raise AdapterError(f"{what}: the model has no adapters")
    return names


def strengths(model: nn.Module) -> Changes:
    return [(a, dict(a.scales), dict(a.enabled)) for a in arenas(model)]


@contextmanager
def restoring(model: nn.Module, before: Changes) -> Iterator[nn.Module]:
    """Puts scales and switches back at the end of a block."""
    try:
        yield model
    finally:
        now = arenas(model)
        changes = []
        for arena in now:
            scales: dict[str, Any] = {}
            enabled: dict[str, bool] = {}
            for old, old_scales, old_enabled in before:
                # Its own strengths, and those of an arena that has become part of it; an adapter
                # that has been removed meanwhile stays so.
                if old is arena or old not in now:
                    scales |= {n: s for n, s in old_scales.items() if n in arena.scales}
                    enabled |= {n: e for n, e in old_enabled.items() if n in arena.scales}
            changes.append((arena, scales, enabled))
        try:
            write(changes)
        except AdapterError:  # folded within the block, and strengths per sample come back
            unfold(model)
            write(changes)


@contextmanager
def tiled(model: nn.Module, copies: int) -> Iterator[nn.Module]:
    """Within it, per-sample strengths repeat `copies` times along the batch, as classifier-free
    guidance concatenates its conditional and unconditional halves.

    Blocks multiply: inside of two, nested or in two threads, strengths repeat as often as both say,
    and after both as often as before. Raises AdapterError unless `copies` is an integer >= 1.
    """
    if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
        raise AdapterError(f"tiled: copies: expected an integer >= 1, got {copies!r}")
    found = arenas(model)
    try:
        retile(found, copies, 1)
        yield model
    finally:
        retile(found, 1, copies)


def retile(found: Iterable[Arena], times: int, over: int) -> None:
    """Multiplies the copies of arenas: blocks of several threads may end in any order."""
    with _tiling:
        for arena in found:  # all of them first: a failing write leaves the numbers right
            arena.copies = arena.copies * times // over
        for arena in found:
            if times != over and arena.per_sample:
                arena.write()


def apply(model: nn.Module, scales: Mapping[str, Any], enabled: Mapping[str, bool]) -> None:
    """Sets scales and switches in all arenas of a model, or raises and changes nothing."""
    walk = walked(model)  # once: it is most of the time that changing a strength takes
    walk.require(*scales, *enabled)
    scales = {name: checked(name, scale) for name, scale in scales.items()}
    changes: Changes = [
        (
            arena,
            {n: s for n, s in scales.items() if n in arena.scales},
            {n: e for n, e in enabled.items() if n in arena.scales},
        )
        for arena in walk.arenas
    ]
    for arena, new, _ in changes:
        arena.check_each(new)
    write(changes)


def write(changes: Changes) -> None:
    """Writes checked strengths into arenas and folds again what is folded there."""
    folded = []
    for arena, scales, enabled in changes:
        arena.check(scales)
        here = folded_by([arena])
        check_strengths(here, scales, enabled)
        folded += here
    for arena, scales, enabled in changes:
        arena.set(scales, enabled)
    if folded:
        fold_layers(folded)
