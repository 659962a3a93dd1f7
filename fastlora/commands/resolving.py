"""Which modules of a checkpoint adapter files change, and what does not fit it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.commands import CommandError

if TYPE_CHECKING:
    from fastlora.formats.changes import AdapterFile, Change, Target
    from fastlora.formats.checkpoints import Checkpoint
    from fastlora.formats.rewriting import Edit


def resolve(
    found: Sequence[tuple[Path, float, AdapterFile]], checkpoint: Checkpoint
) -> tuple[dict[Target, list[Edit]], dict[str, dict[str, str]], list[str]]:
    """The changes of each of the checkpoint's modules; for each file, the keys that are left out
    and why; the same for people, module by module.

    Raises CommandError where two names of a file mean the same module.
    """
    from fastlora.formats.names import find
    from fastlora.formats.rewriting import Edit

    edits: dict[Target, list[Edit]] = {}
    unused: dict[str, dict[str, str]] = {}
    misfits: list[str] = []
    indices = checkpoint.indices()
    for path, strength, file in found:
        reasons = unused.setdefault(str(path), dict(file.unused))
        misfits += [f"{path}: {key}: {why}" for key, why in file.unused.items()]
        taken: dict[Target, Target] = {}
        for target, change in file.changes.items():
            places = find(target, indices)
            reason = misfit_of(target, change, places, checkpoint)
            if reason is not None:
                reasons.update(dict.fromkeys(change.keys or (str(target),), reason))
                misfits.append(f"{path}: {reason}")
                continue
            (place,) = places
            if place in taken:
                raise CommandError(f"{path}: {target} and {taken[place]} are the same layer")
            taken[place] = target
            edits.setdefault(place, []).append(Edit(change, strength))
    return edits, unused, misfits


def misfit_of(
    target: Target, change: Change, places: Sequence[Target], checkpoint: Checkpoint
) -> str | None:
    """Why a change cannot be made in the modules that its name may mean; None: it can."""
    from fastlora.formats.misfits import misfit

    if not places:
        return f"the model has no {target}"
    if len(places) > 1:
        return f"{target} may be {' or '.join(map(str, places))}"
    own = (w for w in checkpoint.weights() if places[0] in w.modules)
    return next(filter(None, (misfit(weights, places[0], change) for weights in own)), None)


def require(
    edits: Mapping[Target, Any], misfits: Sequence[str], options: argparse.Namespace
) -> None:
    """Raises CommandError where nothing fits, and where something does not and it has to."""
    some = "; ".join(misfits[:3])
    some += f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    if not edits:
        raise CommandError(f"nothing fits {options.into}: {some}")
    if misfits and options.strict:
        raise CommandError(f"{some} (--no-strict folds the rest)")
