"""Adapters that are on for a part of a sampling alone: sliders with a start step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fastlora.adapters.control import apply, restoring, strengths
from fastlora.adapters.folding import fold, is_folded, unfold
from fastlora.adapters.lookup import layers_of, require_known
from fastlora.adapters.slots import LoRASlot
from fastlora.adapters.specs import AdapterError
from fastlora.ops._routes import extra_seconds, fold_seconds

Seen = dict[nn.Module, int]  # tokens of a call


@contextmanager
def phases(
    model: nn.Module, start: Mapping[str, float], timesteps: Sequence[float]
) -> Iterator[Callable[[float], None]]:
    """Yields a function of a timestep that switches the adapters named in `start`: on where the
    timestep is at most theirs, off above it, and off where they were off before.

    `timesteps` are those that will come, in their order: a model that was folded is folded again
    for a run of equal switches where that is worth it, and is unmerged in others. Strengths,
    switches and folding are put back at the end. Raises AdapterError, and changes nothing, for
    unknown names and for what is no number.
    """
    if not isinstance(start, Mapping):
        raise AdapterError(f"start: expected timesteps by adapter name, got {start!r}")
    require_known(model, *start)
    start = {name: as_timestep(name, first) for name, first in start.items()}
    folded, before = is_folded(model), strengths(model)
    was_on = {name: on for _, _, enabled in before for name, on in enabled.items()}

    def pattern(timestep: float) -> dict[str, bool]:
        return {name: was_on[name] and timestep <= first for name, first in start.items()}

    left = [pattern(timestep) for timestep in timesteps]
    first_of_all = now = {name: was_on[name] for name in start}
    seen: Seen = {}
    watching = watch(model, seen) if folded else []

    def switch(timestep: float) -> None:
        nonlocal now
        while seen and watching:  # one call has told
            watching.pop().remove()
        wanted = pattern(timestep)
        if wanted != now:
            run = next((i for i, other in enumerate(left) if other != wanted), len(left))
            if folded:
                unfold(model)
            apply(model, {}, wanted)
            if folded and worth_folding(model, max(run, 1), seen):
                fold(model)
            now = wanted
        del left[:1]

    try:
        with restoring(model, before):
            try:
                yield switch
            finally:
                for handle in watching:
                    handle.remove()
                if folded and now != first_of_all:
                    unfold(model)  # so that putting strengths back does not fold
    finally:
        if folded and not is_folded(model):
            fold(model)


def as_timestep(name: str, value: Any) -> float:
    """A number of Python, numpy or torch."""
    try:
        number = float("nan") if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = float("nan")
    if number != number:
        raise AdapterError(f"start of {name!r}: expected a timestep, got {value!r}")
    return number


def watch(model: nn.Module, seen: Seen) -> list[Any]:
    """Hooks that note how many tokens (positions of an image) each adapted layer gives a call."""

    def note(layer: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and layer.weight.dim() > 1:
            channels = layer.weight.shape[1 if layer.transposed else 0]
            seen[layer] = output.numel() // max(channels, 1)

    return [layer.register_forward_hook(note) for layer in layers_of(model)]


def worth_folding(model: nn.Module, calls: int, seen: Seen) -> bool:
    """Whether folding takes less time than the adapters that are on in so many calls, as predicted;
    a fold is taken to be worth it while nobody has `seen` the sizes of a call."""
    size, extra, like = 0, 0.0, None
    for layer in layers_of(model):
        arena, weight = layer._state.arena, layer.weight
        on = [s for n, s in layer.fastlora.items() if not arena.off(n)]
        size += 2 * weight.nbytes
        like = weight if on else like
        ranks = [s for s in on if isinstance(s, LoRASlot)]
        size += sum(s.down.nbytes + s.up.nbytes for s in ranks)
        if ranks and layer in seen:
            rank, out = sum(s.width for s in ranks), ranks[0].up.shape[0]
            extra += extra_seconds(weight, seen[layer], ranks[0].down[0].numel(), out, rank)
    if like is None:
        return False  # nothing is on: the plain model
    return not seen or fold_seconds(like, size) < calls * extra
