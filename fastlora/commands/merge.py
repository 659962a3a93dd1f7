"""`fastlora merge`: several adapters with strengths in one file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastlora.commands.approximating import approximated, refuse_others
from fastlora.commands.arguments import (
    FORMATS,
    add_files,
    add_output_arguments,
    explain,
    whole,
)
from fastlora.commands.naming import family_for
from fastlora.commands.outputs import check_output, finish, read, torch_dtype

HELP = "several adapters with strengths in one file"
DESCRIPTION = (
    "Adds adapters, each at its strength, in one file: the sum is exact, as ranks are put beside"
    " each other, and a module's rank is the sum of its ranks. --rank cuts it down, and says what"
    " is lost. DoRA and spectral shifts cannot be added without the model; fastlora fold adds them"
    " to one. Exit code 1 if keys that mean nothing were left out."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_files(parser)
    add("--out", type=Path, required=True, help="file to write (.safetensors); peft: folder")
    add(
        "--to",
        choices=FORMATS,
        metavar="FORMAT",
        help="format to write, see below (default: the first file's)",
    )
    add(
        "--rank",
        type=whole,
        metavar="R",
        help="at most this rank for every module, by truncated SVD; the error is printed",
    )
    add_output_arguments(parser)
    explain(
        parser,
        "fastlora merge style.safetensors=0.8 subject.safetensors=0.5 --out both.safetensors",
        "fastlora merge a.safetensors b.safetensors=-1 --rank 16 --out difference.safetensors",
    )


def run(options: argparse.Namespace) -> int:
    """0, or 1 for unused keys. Raises CommandError, FormatError, OSError; nothing is left then."""
    from fastlora.commands.terminal import progress
    from fastlora.formats.combining import combined, shares_of

    paths = [path for path, _ in options.files]
    found = [read(path, options) for path in paths]
    format = options.to or found[0].format
    check_output(options.out, format, options.force, paths)
    shares = shares_of([f.changes for f in found], [strength for _, strength in options.files])
    family = family_for(format, options.family, shares, found)
    parts = progress(shares.items(), "adding", len(shares))
    changes = {target: combined(target, own) for target, own in parts}
    error = None
    if options.rank is not None:
        changes, losses = approximated(changes, options.rank, torch_dtype(options.dtype), lora=True)
        error = losses.report(options.rank)
    else:
        refuse_others(changes, format)
    report = {
        "inputs": [
            {"file": str(path), "format": file.format, "strength": strength}
            for (path, strength), file in zip(options.files, found, strict=True)
        ],
        "error": error,
        "unused": {str(p): f.unused for p, f in zip(paths, found, strict=True) if f.unused},
    }
    return finish(changes, found, report, options.out, format, options, family)
