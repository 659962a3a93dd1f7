"""What commands take from adapter files and write to them, and how they say so."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.commands import CommandError
from fastlora.commands.naming import choice

if TYPE_CHECKING:
    import torch

    from fastlora.formats.changes import AdapterFile, Change, Target
    from fastlora.formats.families import Family


def read(path: Path, options: argparse.Namespace) -> AdapterFile:
    """The file with the parts that are asked for. Raises CommandError where it has not got them."""
    from fastlora.formats import detect

    file = detect.read(path)
    if options.component:
        changes = {
            (t._replace(component=options.component) if not t.component else t): c
            for t, c in file.changes.items()
        }
        file = dataclasses.replace(file, changes=changes)
    return only_part(path, file, options.only)


def only_part(path: Path, file: AdapterFile, part: str | None) -> AdapterFile:
    """The file with one part of the pipeline; None: all. Raises CommandError without it."""
    if part is None:
        return file
    changes = {t: c for t, c in file.changes.items() if t.component == part}
    if not changes:
        parts = ", ".join(sorted({t.component or "a model by itself" for t in file.changes}))
        raise CommandError(f"--only {part}: {path} has {parts or 'nothing'}")
    return dataclasses.replace(file, changes=changes)


def check_output(out: Path, format: str, force: bool, inputs: Iterable[Path]) -> None:
    """Raises CommandError for an output that cannot or must not be written."""
    is_file = out.suffix == ".safetensors"
    if format == "peft" and is_file:
        raise CommandError(f"{out}: peft is a folder: expected a name without .safetensors")
    if format != "peft" and not is_file:
        raise CommandError(f"{out}: expected a name that ends with .safetensors")
    if format != "peft" and out.is_dir():
        raise CommandError(f"{out}: expected a file or nothing, got a folder")
    if not out.parent.is_dir():
        raise CommandError(f"{out}: its folder does not exist")
    if not os.path.lexists(out):
        return
    real = out.resolve()
    for path in (path.resolve() for path in inputs):
        if real in (path, path.parent) or path == real.parent and path.is_dir():
            raise CommandError(f"{out}: expected another place than the input's, {path}")
    if not force:
        raise CommandError(f"{out} is there already; --force replaces it")


def torch_dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)


def cast(changes: Mapping[Target, Change], name: str | None) -> dict[Target, Change]:
    """All tensors in the dtype. Raises CommandError where values leave its range."""
    dtype = torch_dtype(name)
    if dtype is None:
        return dict(changes)
    return {target: _cast(target, change, dtype) for target, change in changes.items()}


def _cast(target: Target, change: Change, dtype: torch.dtype) -> Change:
    weight = change.weight
    if weight is not None:
        parts = {k: _fitting(target, t, dtype) for k, t in weight.tensors().items()}
        weight = dataclasses.replace(weight, **parts)
    own = {k: getattr(change, k) for k in ("bias", "magnitude")}
    own = {k: t if t is None else _fitting(target, t, dtype) for k, t in own.items()}
    return dataclasses.replace(change, weight=weight, **own)


def _fitting(target: Target, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    import torch

    values = tensor.to(dtype)
    if not torch.isfinite(values).all():
        raise CommandError(
            f"--dtype: {target}: a value of {tensor.abs().max():.3g} is beyond {dtype}"
        )
    return values


def carried(files: Sequence[AdapterFile]) -> dict[str, str]:
    """What trainers say of the base, the data and the like, where all files say the same.

    What says how the file itself is made is left out: ranks, alphas, hashes.
    """
    first, *others = (file.metadata for file in files)
    return {
        key: value
        for key, value in first.items()
        if key.startswith(("ss_", "modelspec."))
        and not key.startswith(("ss_network_", "modelspec.hash"))
        and all(other.get(key) == value for other in others)
    }


def finish(
    changes: Mapping[Target, Change],
    files: Sequence[AdapterFile],
    report: dict[str, Any],
    out: Path,
    format: str,
    options: argparse.Namespace,
    family: Family | None,
) -> int:
    """Writes the changes, made of those of `files`, and says so, beside what `report` has.

    1 where the files have keys that mean nothing.

    Raises CommandError, FormatError, OSError, and leaves nothing behind then.
    """
    from fastlora.commands.terminal import say_json
    from fastlora.formats import writing
    from fastlora.formats.combining import without_alpha

    parts = sorted({target.component for target in changes})
    if format in ("peft", "fastlora") and len(parts) > 1:
        raise CommandError(
            f"{format} is for one model, and this is {', '.join(parts)}: write each by itself,"
            f" --only {parts[0]} and so on"
        )
    if format in ("diffusers-lora", "diffusers-old"):
        changes = {target: without_alpha(change) for target, change in changes.items()}
    known = dtypes(change for file in files for change in file.changes.values())
    notes = choice(family)
    if not options.dtype and dtypes(changes.values()) - known:
        names = " or ".join(sorted(known))
        notes += [f"float32 where {names} would lose digits; --dtype {min(known)} rounds"]
    name = family and family.name
    packed = writing.pack(cast(changes, options.dtype), format, name)
    packed = packed._replace(metadata={**carried(files), **packed.metadata})
    large = [t for t in packed.tensors.values() if t.numel() > 1]  # no alphas
    writing.write(out, packed)
    report = {
        **report,
        "output": str(out),
        "to": format,
        "family": name,
        "modules": len(changes),
        "bytes": size_of(out),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in large}),
        "notes": notes,
    }
    if options.json:
        say_json(report)
    else:
        print("\n".join(_lines(report)))
    return 1 if any(report["unused"].values()) else 0


def size_of(out: Path) -> int:
    """Bytes of the safetensors file that was written, as `inspect` and the disk have them."""
    from fastlora.formats.writing import WEIGHTS

    return (out / WEIGHTS if out.is_dir() else out).stat().st_size


def dtypes(changes: Iterable[Change]) -> set[str]:
    weights = [change.weight for change in changes if change.weight is not None]
    return {str(t.dtype).removeprefix("torch.") for w in weights for t in w.tensors().values()}


def _lines(report: Mapping[str, Any]) -> list[str]:
    from fastlora.commands.terminal import clean, percent, plural, size

    said = [
        f"{report['output']}: {report['to']}, {plural(report['modules'], 'module')}, "
        f"{', '.join(report['dtypes'])}, {size(report['bytes'])}"
    ]
    said += [f"  {line}" for line in report["notes"]]
    if errors := report["error"]:
        count = len(errors["modules"])
        said.append(
            f"  rank {errors['rank']}: {plural(count, 'module')} approximated, relative error "
            f"(Frobenius) {percent(errors['total'])} in total, at most "
            f"{percent(errors['largest'])} ({clean(errors['largest_module'])})"
        )
    for path, keys in report["unused"].items():
        for key, reason in list(keys.items())[:5]:
            said.append(f"  left out of {path}: {clean(key)}: {clean(reason)}")
        if len(keys) > 5:
            said.append(f"  and {len(keys) - 5:,} more keys of {path}: fastlora inspect")
    return said
