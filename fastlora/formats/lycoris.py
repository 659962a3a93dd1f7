"""Files of LyCORIS: kohya's names with LoHa, LoKr, full updates, norms and biases beside LoRA."""

from __future__ import annotations

from collections.abc import Mapping

from fastlora.formats._kohya_write import write
from fastlora.formats.changes import Change, Packed, Target
from fastlora.formats.kohya import unpack

__all__ = ["pack", "unpack"]


def pack(changes: Mapping[Target, Change], family: str | None = None) -> Packed:
    """The file for a "sd", "sdxl" or "flux" model; None: as `family_of` tells.

    Targets without a component need no family: they get the names of a model by itself. Where
    the modules that FLUX has as one have updates of their own that are no LoRAs, that one gets a
    full difference, in float32. Raises FormatError naming the target that such a file cannot have,
    and the way out.
    """
    return write(changes, family, "lycoris.kohya")
