"""Strengths and addresses of a model inside of a CUDA graph of a whole sampling."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.folding import is_folded
from fastlora.adapters.lookup import arenas, require_known, unwrapped
from fastlora.adapters.phases import as_timestep
from fastlora.adapters.slots import Slots
from fastlora.adapters.specs import AdapterError


class CapturedStrengths:
    """The gates of every step in buffers of their own, which a captured graph reads.

    So a graph follows strengths, switches and start steps that change between replays, and what
    happens to the model's own gates meanwhile does not reach it. The adapters are those that the
    model has at the capture, or what a reserve holds: `fits` says whether that is still so.
    """

    @torch.inference_mode(False)
    def __init__(self, model: nn.Module, device: torch.device, steps: int, copies: int) -> None:
        self.model, self.device, self.copies = model, device, copies
        self.arenas = arenas(model)
        if any(arena.learned for arena in self.arenas):
            raise AdapterError(
                "capture: strengths that require a gradient cannot be captured; detach them"
            )
        now = [arena.gates(device, {}, copies) for arena in self.arenas]
        self.values = [torch.empty_like(gates) for gates in now]
        self.by_step = [gates.expand(steps, *gates.shape).clone() for gates in now]
        self.addresses = addresses(model, device)

    def fits(self) -> bool:
        """Whether a graph that was captured before would read what the model has now."""
        now = arenas(self.model)
        same = len(now) == len(self.arenas) and all(
            a is b for a, b in zip(now, self.arenas, strict=True)
        )
        return same and self.addresses == addresses(self.model, self.device)

    def write(self, timesteps: Sequence[float], start: Mapping[str, float] | None) -> None:
        """Takes up the model's strengths; adapters in `start` are off above their timestep. Raises
        AdapterError for a `start` that does not fit, and changes nothing."""
        first = checked_start(self.model, start)
        patterns = [tuple(t <= limit for limit in first.values()) for t in timesteps]
        for arena, rows in zip(self.arenas, self.by_step, strict=True):
            at = 0
            while at < len(patterns):  # neighbours with the same switches together
                end = at
                while end < len(patterns) and patterns[end] == patterns[at]:
                    end += 1
                switches = dict(zip(first, patterns[at], strict=True))
                enabled = {
                    name: on and switches.get(name, True) for name, on in arena.enabled.items()
                }
                rows[at:end].copy_(arena.gates(self.device, enabled, self.copies))
                at = end

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within it the model reads the gates of the step that was `load`ed."""
        with ExitStack() as stack:
            for arena, values in zip(self.arenas, self.values, strict=True):
                stack.enter_context(arena.lent(self.device, values))
            yield

    def load(self, row: Tensor) -> None:
        """Part of the graph: the gates of the step `row` [], a number on the device."""
        for values, rows in zip(self.values, self.by_step, strict=True):
            torch.index_select(rows, 0, row.view(1), out=values[None])


def checked_start(model: nn.Module, start: Mapping[str, float] | None) -> dict[str, float]:
    """Timesteps by adapter name. Raises AdapterError for unknown names, for what is no number, and
    where the model is folded: a graph has one way through a layer."""
    if start is None:
        return {}
    if not isinstance(start, Mapping):
        raise AdapterError(f"start: expected timesteps by adapter name, got {start!r}")
    require_known(model, *start)
    if start and is_folded(model):
        raise AdapterError(
            "start: a captured sampling of a folded model cannot switch adapters between its steps;"
            " unfold the model before"
        )
    return {name: as_timestep(name, first) for name, first in start.items()}


def addresses(model: nn.Module, device: torch.device) -> tuple[Any, ...]:
    """What a captured graph of the model has in it: where its tensors are, and which way each
    adapted layer computes. Adapters in a reserve are not among it: they come and go."""
    found: list[Any] = []
    for arena in arenas(model):
        found += [arena._total, arena.batch, arena.copies, arena.per_sample]
    stack: list[nn.Module] = [unwrapped(model)]
    seen: set[int] = set()
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            found.append(None if tensor is None else tensor.data_ptr())
        children = [child for child in module._modules.values() if child is not None]
        if isinstance(module, Adapted):
            state = module._state
            found += [state.merged, state.offset, state.rows]
        if isinstance(module, Slots):
            outside = module.outside()
            found += [name for name, _ in outside]
            children = [slot for _, slot in outside]
        stack += children
    return tuple(found)
