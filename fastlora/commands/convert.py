"""`fastlora convert`: another format of an adapter file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastlora.commands.approximating import approximated, refuse_others
from fastlora.commands.arguments import (
    FORMATS,
    add_output_arguments,
    explain,
    whole,
)
from fastlora.commands.naming import family_for
from fastlora.commands.outputs import check_output, finish, read, torch_dtype

HELP = "another format of an adapter file"
DESCRIPTION = (
    "Writes an adapter file in another format: names are translated, ranks and alphas of every"
    " module stay what they are. What the format cannot hold is refused; --rank makes LoRAs of"
    " LoHa, LoKr and full updates, and says what is lost. The input is never changed. Exit code 1"
    " if keys that mean nothing were left out."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", metavar="IN", type=Path, help="adapter file of any format, or folder with one")
    add("output", metavar="OUT", type=Path, help="file to write (.safetensors); peft: folder")
    add("--to", required=True, choices=FORMATS, metavar="FORMAT", help="format to write, see below")
    add(
        "--rank",
        type=whole,
        metavar="R",
        help="LoHa, LoKr and full updates become LoRAs of this rank, by truncated SVD; the error is"
        " printed",
    )
    add_output_arguments(parser)
    explain(
        parser,
        "fastlora convert kohya.safetensors diffusers.safetensors --to diffusers",
        "fastlora convert kohya.safetensors folder --to peft --only unet",
        "fastlora convert loha.safetensors lora.safetensors --to kohya --rank 16",
    )


def run(options: argparse.Namespace) -> int:
    """0, or 1 for unused keys. Raises CommandError, FormatError, OSError; nothing is left then."""
    check_output(options.output, options.to, options.force, [options.input])
    file = read(options.input, options)
    family = family_for(options.to, options.family, file.changes, [file])
    changes, error = file.changes, None
    if options.rank is not None:
        changes, losses = approximated(
            changes, options.rank, torch_dtype(options.dtype), lora=False
        )
        error = losses.report(options.rank)
    else:
        refuse_others(changes, options.to)
    report = {
        "input": str(options.input),
        "format": file.format,
        "error": error,
        "unused": {str(options.input): file.unused} if file.unused else {},
    }
    return finish(changes, [file], report, options.output, options.to, options, family)
