"""LoRAs in place of changes that are none or of a larger rank, and what that loses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastlora.commands import CommandError

if TYPE_CHECKING:
    import torch

    from fastlora.formats.changes import Change, Target


class Losses:
    """What truncated decompositions leave out, module by module."""

    def __init__(self) -> None:
        self.by_module: dict[str, float] = {}
        self._lost = self._norm = 0.0

    def add(self, target: Target, lost: float, norm: float) -> None:
        self.by_module[str(target)] = lost / norm if norm else 0.0
        self._lost, self._norm = math.hypot(self._lost, lost), math.hypot(self._norm, norm)

    def report(self, rank: int | None) -> dict[str, Any] | None:
        """Relative errors; None if nothing was decomposed."""
        if not self.by_module:
            return None
        worst = max(self.by_module, key=self.by_module.__getitem__)
        return {
            "rank": rank,
            "total": self._lost / self._norm if self._norm else 0.0,
            "largest": self.by_module[worst],
            "largest_module": worst,
            "modules": self.by_module,
        }


def approximated(
    changes: Mapping[Target, Change], rank: int, dtype: torch.dtype | None, lora: bool
) -> tuple[dict[Target, Change], Losses]:
    """LoRAs of at most `rank`, in `dtype` (None: the parts'), for all that has such a form.

    LoRAs themselves stay what they are unless `lora` is set. Raises FormatError.
    """
    from fastlora.commands.terminal import progress
    from fastlora.formats.changes import LowRank, Shift
    from fastlora.formats.compressing import compress
    from fastlora.formats.files import FormatError
    from fastlora.formats.measures import kernel_of, shape_of

    made, losses = dict(changes), Losses()
    for target, change in progress(changes.items(), "decomposing", len(changes)):
        weight = change.weight
        if isinstance(weight, Shift | None) or (isinstance(weight, LowRank) and not lora):
            continue
        if len(shape_of(change)) < 2:  # of a norm
            continue
        try:
            found = compress(change, rank, dtype, kernel_of(target, change))
        except FormatError as error:
            raise FormatError(f"{target}: {error}") from None
        made[target] = dataclasses.replace(change, weight=found.weight)
        losses.add(target, found.lost, found.norm)
    return made, losses


def refuse_others(changes: Mapping[Target, Change], format: str) -> None:
    """Raises CommandError with the way out for kinds that only LyCORIS' files have."""
    from fastlora.commands.terminal import plural
    from fastlora.formats.changes import Dense, Hadamard, Kronecker

    if format == "lycoris":
        return
    found = [t for t, c in changes.items() if isinstance(c.weight, Hadamard | Kronecker | Dense)]
    if found:
        kinds = " and ".join(sorted({changes[target].kind for target in found}))
        verb = "is" if len(found) == 1 else "are"
        raise CommandError(
            f"{plural(len(found), 'module')}, {found[0]} first, {verb} {kinds}, which"
            f" {format} cannot hold: --rank 16 makes LoRAs of them and says what is lost, --to"
            " lycoris keeps them"
        )
