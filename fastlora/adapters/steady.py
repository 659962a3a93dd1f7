"""A block of code in which weights stay as they are, so that what is made of them is kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastlora.adapters.components import Models, as_one
from fastlora.adapters.lookup import arenas
from fastlora.adapters.state import is_capturing

_counting = threading.RLock()  # re-entrant, as in `control`


@contextmanager
def steady(model: Models) -> Iterator[Any]:
    """Within it DoRA's norms take `W Dᵀ`, `D Dᵀ` and `‖W‖²` from the first call, on every device.

    The caller says that base weights and adapters keep their values until its end: what is written
    into them meanwhile by an optimiser, an average, or through `.data` may not be seen. Strengths,
    switches, adapters that come and go, `load_state_dict`, `.to()` and offloading are followed as
    ever. `sample` does this for a whole sampling. Blocks nest, also in several threads.

    A CUDA graph keeps what was made while it was captured, in a block that began in its capture,
    and nothing that is from outside of it.
    """
    capturing = is_capturing()
    found = arenas(as_one(model, "steady"))
    with _counting:
        for arena in found:
            arena.steady[capturing] += 1
    try:
        yield model
    finally:
        with _counting:
            for arena in found:
                arena.steady[capturing] -= 1
                if not arena.steady[capturing]:
                    for layer in arena.layers():
                        layer._state.kept[capturing].clear()
