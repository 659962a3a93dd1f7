"""Looking at a model's adapters and changing their strength."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from fastlora.adapters.arena import Arena, Scale, checked
from fastlora.adapters.components import (
    Models,
    as_one,
    components_of,
    info_of_parts,
    without_text_encoders,
)
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


def adapters(model: Models) -> dict[str, AdapterInfo]:
    """The adapters of a model by name.

    `model`: a module, a dict of them by component ("unet", "text_encoder", ...), or a diffusers
    pipeline. Of several components, `modules` have the component in front, `rank` is the largest
    and `parameters` the sum; `scale` and `enabled` are dicts by component where they differ, as
    after `set_scale(pipe.unet, ...)`.
    """
    if isinstance(model, nn.Module):
        return adapters_of(model)
    found = {c: adapters_of(part) for c, part in components_of(model, "adapters").items()}
    return {
        name: info_of_parts({c: infos[name] for c, infos in found.items() if name in infos})
        for name in dict.fromkeys(name for infos in found.values() for name in infos)
    }


def adapters_of(model: nn.Module) -> dict[str, AdapterInfo]:
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


def parameters(model: Models, name: str | None = None) -> list[nn.Parameter]:
    """What an optimiser should train: the parameters of one adapter, or of all."""
    one = as_one(model, "parameters")
    if name is not None:
        require_known(one, name)
    return [
        p
        for layer in adapted_layers(one).values()
        for other, slot in layer.fastlora.items()
        if name is None or other == name
        for p in slot.parameters()
    ]


def set_scale(model: Models, scales: Scales) -> None:
    """Sets strengths by adapter name, or of all adapters at once.

    Of a dict of models or a pipeline: in each component that has the adapter.

    A number, or a tensor `[batch]`: one strength per sample; then the leading size of the input of
    every layer with that adapter has to be `batch`. A tensor that requires a gradient gets it. The
    gates are `scale · α/r`, float32 also beside float64 weights. A scale of 0.0 leaves the base
    layer alone, bit for bit. A folded model is folded again.

    The samples of a pipeline's denoiser are images, those of its text encoders prompts. One tensor
    for both works where there are as many of one as of the other; where not, the call of a layer
    raises ContractError and names it: set the components' strengths apart, `set_scale(pipe.unet,
    {"a": rows})`.

    Raises AdapterError, and changes nothing, for names that no component has, for a strength per
    sample where the model is folded or the adapter is more than low-rank products somewhere (DoRA,
    spectral shifts, LoHa, a bias, ...), and for strengths that are not finite, by themselves or
    times α/r. Values of tensors on an accelerator are not looked at, which would wait for the
    device.
    """
    one = as_one(model, "set_scale")
    if not isinstance(scales, Mapping):
        scales = dict.fromkeys(some_names(one, "set_scale"), scales)
    apply(one, scales, {})


def enable(model: Models, *names: str) -> AbstractContextManager[Any]:
    """Switches adapters on (all of them without names); their scales are what they were.

    Stays so, or for a block of code: `with fastlora.enable(model): ...`.
    """
    return switched(model, "enable", names, True)


def disable(model: Models, *names: str) -> AbstractContextManager[Any]:
    """Switches adapters off (all of them without names): the plain base layers run.

    Stays so, or for a block of code: `with fastlora.disable(model): ...`.
    """
    return switched(model, "disable", names, False)


def switched(
    model: Models, what: str, names: tuple[str, ...], on: bool
) -> AbstractContextManager[Any]:
    one = as_one(model, what)
    before = strengths(one)
    apply(one, {}, dict.fromkeys(names or some_names(one, what), on))
    return restoring(one, before, model)


@contextmanager
def scaled(model: Models, scales: Scales) -> Iterator[Any]:
    """`set_scale` for a block of code; scales and switches are put back at its end."""
    one = as_one(model, "scaled")
    before = strengths(one)
    set_scale(one, scales)
    with restoring(one, before, model):
        yield model


def some_names(model: nn.Module, what: str) -> list[str]:
    names = known_names(model)
    if not names:
        raise AdapterError(f"{what}: the model has no adapters")
    return names


def strengths(model: nn.Module) -> Changes:
    return [(a, dict(a.scales), dict(a.enabled)) for a in arenas(model)]


@contextmanager
def restoring(model: nn.Module, before: Changes, given: Models = None) -> Iterator[Any]:
    """Puts scales and switches back at the end of a block; `given` is what it is a block of."""
    try:
        yield model if given is None else given
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
def tiled(model: Models, copies: int) -> Iterator[Any]:
    """Within it, per-sample strengths repeat `copies` times along the batch, as classifier-free
    guidance concatenates its conditional and unconditional halves.

    Not those of a pipeline's text encoders, through which prompts and negative prompts go in calls
    of their own; a dict means all of its models.

    Blocks multiply: inside of two, nested or in two threads, strengths repeat as often as both say,
    and after both as often as before. Raises AdapterError unless `copies` is an integer >= 1.
    """
    if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
        raise AdapterError(f"tiled: copies: expected an integer >= 1, got {copies!r}")
    found = arenas(without_text_encoders(model, "tiled"))
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
