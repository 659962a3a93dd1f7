"""Layers with a `forward` on the object itself: hooks of accelerate (offloading, `device_map`) and
of diffusers (group offloading, caching) put one there and keep the class's own.

What they keep is bound to the class that the layer had. It has to be bound again when that changes,
or the hooks would go past the adapters without a word.
"""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

Place = tuple[dict[str, Any], str]  # where a forward is kept: a namespace and a name in it


def places(module: nn.Module) -> Iterator[Place]:
    """Where a forward may be kept: on the module, by accelerate, by diffusers."""
    own = vars(module)
    yield own, "forward"
    yield own, "_old_forward"
    for reference in getattr(own.get("_diffusers_hook"), "_fn_refs", ()):
        yield vars(reference), "forward"
        yield vars(reference), "original_forward"


def kept(module: nn.Module, forward: Callable[..., Any]) -> list[Place]:
    """The places that have `forward`, a function, bound to the module."""
    bound = MethodType(forward, module)
    return [(space, name) for space, name in places(module) if space.get(name) == bound]


def rebind(module: nn.Module, before: Callable[..., Any]) -> None:
    """Where the forward of the class that the module had is kept, puts that of its class now."""
    for space, name in kept(module, before):
        space[name] = MethodType(type(module).forward, module)


def is_bypassed(module: nn.Module) -> bool:
    """Whether calls of a module end in something else than its class's forward, as far as is known:
    somebody has put another one on the object."""
    return "forward" in vars(module) and not kept(module, type(module).forward)
