"""`fastlora inspect`: what an adapter file holds: format, layers, ranks, norms."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlora.formats.changes import Change, Target
    from fastlora.formats.outlines import Outline

HELP = "what an adapter file holds: format, base model, layers, ranks, norms"
DESCRIPTION = (
    "Says what is in an adapter file of any format: which format and which base model, how many"
    " modules of which part of the pipeline with which rank and alpha, metadata, and how much is"
    " added to the weights of each block: the Frobenius norms of the updates. Exit code 1 if the"
    " file has keys that mean nothing."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "file", type=Path, help="safetensors file, or folder with one as PEFT and diffusers save it"
    )
    add("--no-norms", action="store_true", help="read the file's header only: no norms")
    add("--metadata", action="store_true", help="print metadata in full")
    add(
        "--json",
        action="store_true",
        help="print JSON, with every module, instead of tables and bars",
    )


def run(options: argparse.Namespace) -> int:
    """0, or 1 for unused keys. Raises FormatError, OSError."""
    from fastlora.commands.inspect_text import lines
    from fastlora.commands.terminal import progress, say_json
    from fastlora.formats.outlines import norms, outline

    found = outline(options.file)
    sizes = None
    if not options.no_norms:
        count = len(found.file.changes)
        sizes = dict(progress(norms(found), "norms", count))
    report = describe(found, sizes)
    if options.json:
        say_json(report)
    else:
        print("\n".join(lines(report, options.metadata)))
    return 1 if found.file.unused else 0


def describe(found: Outline, norms: Mapping[Target, float] | None) -> dict[str, Any]:
    """All that is said of a file, as JSON has it; `norms` None: they were not asked for."""
    from fastlora.formats.base import base_of

    file = found.file
    base = base_of(file)
    large = [t for t in found.tensors.values() if t.numel() > 1]  # no alphas
    report: dict[str, Any] = {
        "file": str(found.path),
        "format": file.format,
        "bytes": found.path.stat().st_size,
        "parameters": sum(t.numel() for k, t in found.tensors.items() if k not in file.unused),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in large)),
        "base": {"name": base.name, "reason": base.reason, "text_encoders": base.encoders},
        "parts": parts(file.changes),
        "modules": [module(t, c, norms) for t, c in file.changes.items()],
        "unused": dict(file.unused),
        "metadata": dict(file.metadata),
    }
    if norms is not None:
        report["blocks"] = blocks(norms)
    return report


def parts(changes: Mapping[Target, Change]) -> list[dict[str, Any]]:
    """By part of the pipeline: how many modules have which kind, rank and alpha."""
    counts: dict[str, Counter[tuple[Any, ...]]] = {}
    for target, change in changes.items():
        key = (change.kind, *rank_and_alpha(change))
        counts.setdefault(target.component, Counter())[key] += 1
    names = ("kind", "rank", "alpha", "ratio")
    return [
        {
            "part": part,
            "modules": sum(found.values()),
            "kinds": dict(Counter(c.kind for t, c in changes.items() if t.component == part)),
            "settings": [
                {**dict(zip(names, key, strict=True)), "modules": count}
                for key, count in found.most_common()
            ],
        }
        for part, found in counts.items()
    ]


def rank_and_alpha(change: Change) -> tuple[int | None, float | None, float | None]:
    """Rank, alpha and what the product is multiplied by; None for kinds without."""
    rank = getattr(change.weight, "rank", None)
    if rank is None:
        return None, None, getattr(change.weight, "ratio", None)
    alpha = getattr(change.weight, "alpha", None)
    return rank, float(rank if alpha is None else alpha), change.weight.ratio  # type: ignore[union-attr]


def module(target: Target, change: Change, norms: Mapping[Target, float] | None) -> dict[str, Any]:
    from fastlora.formats.files import FormatError
    from fastlora.formats.measures import shape_of

    try:
        shape = list(shape_of(change))
    except FormatError:  # shifts and biases do not tell
        shape = None
    rank, alpha, ratio = rank_and_alpha(change)
    told = {
        "module": str(target),
        "kind": change.kind,
        "rank": rank,
        "alpha": alpha,
        "ratio": ratio,
        "shape": shape,
        "bias": change.bias is not None,
    }
    return told if norms is None else {**told, "norm": norms[target]}


def blocks(norms: Mapping[Target, float]) -> list[dict[str, Any]]:
    """Norms of blocks: roots of their modules' sums of squares."""
    from fastlora.formats.outlines import by_block

    return [
        {"part": part, "block": name, "modules": len(sizes), "norm": math.hypot(*sizes)}
        for (part, name), sizes in by_block(norms.items()).items()
    ]
