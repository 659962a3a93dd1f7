"""Arguments that several commands have: files with strengths, formats, outputs."""

from __future__ import annotations

import argparse
import math
import shutil
import textwrap
from pathlib import Path

from fastlora.commands.naming import add_family_argument

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = {
    "fastlora": "fastlora's own",
    "peft": "folder with adapter_model.safetensors, adapter_config.json",
    "diffusers": "unet.<module>.lora_A.weight, ranks and alphas in the header",
    "diffusers-lora": "unet.<module>.lora.down.weight, no alphas",
    "diffusers-old": "unet.<attention>.processor.to_q_lora.down.weight",
    "kohya": "lora_unet_<module>.lora_down.weight, as most programs read it",
    "lycoris": "as kohya, with LoHa, LoKr and full updates beside LoRA",
}


def explain(parser: argparse.ArgumentParser, *examples: str) -> None:
    """Formats and examples below the help, line by line."""
    formats = [f"  {name:14}  {content}" for name, content in FORMATS.items()]
    lines = ["formats:", *formats, "", "examples:", *(f"  {example}" for example in examples)]
    parser.epilog = "\n".join(lines)
    parser.description = filled(parser.description or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def filled(text: str) -> str:
    """A paragraph in lines as long as argparse makes its own, whose raw formatter leaves it."""
    return textwrap.fill(text, shutil.get_terminal_size().columns - 2)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", choices=DTYPES, help="of the tensors that are written (default: as they are)")
    add(
        "--only",
        metavar="PART",
        help="take one part of the pipeline: unet, transformer, text_encoder, ...",
    )
    add(
        "--component",
        metavar="PART",
        help="what the model is where a file does not say it (fastlora, peft): unet, ...",
    )
    add_family_argument(parser)
    add("--force", action="store_true", help="replace the output if it is there")
    add("--json", action="store_true", help="print JSON")


def add_files(parser: argparse.ArgumentParser) -> None:
    """Adapter files with strengths: `options.files` is a list of (path, strength)."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE=STRENGTH",
        type=file_and_strength,
        help="adapter files of any format; the strength is 1 without =STRENGTH",
    )


def file_and_strength(text: str) -> tuple[Path, float]:
    """argparse's type of "FILE=0.8" and of "FILE", even if the name has an = in it."""
    path, mark, number = text.rpartition("=")
    if not mark or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), strength(number)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"expected FILE=STRENGTH with a number not 0, got {text}"
        ) from None


def strength(text: str) -> float:
    """argparse's type of a strength: with 0 there is nothing to do, and nothing to check."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not math.isfinite(value) or value == 0:
        raise argparse.ArgumentTypeError(f"expected a finite number that is not 0, got {text}")
    return value


def whole(text: str) -> int:
    """argparse's type of a rank."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return value
