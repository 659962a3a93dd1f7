"""Adapters that are on for a part of a sampling alone: sliders with a start step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from fastlora.adapters.control import apply, restoring, strengths
from fastlora.adapters.folding import fold, is_folded, unfold
from fastlora.adapters.lookup import arenas, require_known
from fastlora.adapters.specs import AdapterError, is_number


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
    for name, first in start.items():
        if not is_number(first) or first != first:
            raise AdapterError(f"start of {name!r}: expected a timestep, got {first!r}")
    folded, before = is_folded(model), strengths(model)
    was_on = {name: on for _, _, enabled in before for name, on in enabled.items()}

    def pattern(timestep: float) -> dict[str, bool]:
        return {name: was_on[name] and timestep <= first for name, first in start.items()}

    left = [pattern(timestep) for timestep in timesteps]
    first_of_all = now = {name: was_on[name] for name in start}

    def switch(timestep: float) -> None:
        nonlocal now
        wanted = pattern(timestep)
        run = next((i for i, other in enumerate(left) if other != wanted), len(left))
        if wanted != now:
            if folded:
                unfold(model)
            apply(model, {}, wanted)
            if folded and worth_folding(model, max(run, 1)):
                fold(model)
            now = wanted
        del left[:1]

    try:
        with restoring(model, before):
            try:
                yield switch
            finally:
                if folded and now != first_of_all:
                    unfold(model)  # so that putting strengths back does not fold
    finally:
        if folded and not is_folded(model):
            fold(model)


def worth_folding(model: nn.Module, calls: int) -> bool:
    """Whether folding takes less time than the adapters in that many calls."""
    return any(not arena.off(name) for arena in arenas(model) for name in arena.scales)
