"""`fastlora extract`: the LoRA between two checkpoints."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.commands import CommandError
from fastlora.commands.approximating import Losses
from fastlora.commands.arguments import (
    DTYPES,
    FORMATS,
    explain,
    whole,
)
from fastlora.commands.naming import add_family_argument, choice, family_for
from fastlora.commands.outputs import check_output, size_of, torch_dtype

if TYPE_CHECKING:
    import torch

    from fastlora.formats.changes import Change, Target
    from fastlora.formats.checkpoints import Checkpoint, Weights
    from fastlora.formats.extraction import Difference

HELP = "the LoRA between two checkpoints"
DESCRIPTION = (
    "Subtracts a model from its fine-tuned copy and writes the difference as a LoRA: for every"
    " matrix and convolution the nearest of its rank (truncated SVD), with what is lost. Reads"
    " safetensors files, shards with their index, and diffusers' folders, one layer at a time."
    " Layers that did not change are left out; so are biases and norms, which only lycoris has."
)
SHOWN = 10  # layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("base", metavar="BASE", type=Path, help="the model before, a file or a folder")
    add("tuned", metavar="TUNED", type=Path, help="the model after, of the same form")
    add("--rank", type=whole, required=True, metavar="R", help="of every layer, at most")
    add("--out", type=Path, required=True, help="file to write (.safetensors); peft: folder")
    add(
        "--to",
        choices=FORMATS,
        metavar="FORMAT",
        default="diffusers",
        help="format to write, see below (default: diffusers)",
    )
    add("--dtype", choices=DTYPES, help="of the LoRA (default: the tuned model's)")
    add(
        "--only",
        metavar="PART",
        help="compare one part of a pipeline: unet, transformer, text_encoder, ...",
    )
    add("--component", metavar="PART", help="what a model by itself is: unet, text_encoder_2, ...")
    add_family_argument(parser)
    add("--force", action="store_true", help="replace the output if it is there")
    add("--all", action="store_true", help=f"show the error of all layers, not of {SHOWN}")
    add("--json", action="store_true", help="print JSON, with the error of every layer")
    explain(
        parser,
        "fastlora extract sd15/ tuned/ --rank 32 --to kohya --out lora.safetensors",
        "fastlora extract base/unet tuned/unet --component unet --rank 64 --out lora.safetensors",
    )


def run(options: argparse.Namespace) -> int:
    """0. Raises CommandError, FormatError, OSError; nothing is left then."""
    from fastlora.commands.terminal import say_json
    from fastlora.formats import writing
    from fastlora.formats.checkpoints import Checkpoint
    from fastlora.formats.extraction import require_alike

    check_output(options.out, options.to, options.force, [options.base, options.tuned])
    with Checkpoint(options.base) as base, Checkpoint(options.tuned) as tuned:
        pairs = paired(base, tuned, options)
        for one, other in pairs:
            require_alike(one, other)
        family = family_for(options.to, options.family, modules_of(base, options))
        found = Extraction(options)
        found.read(pairs)
    if not found.changes:
        some = ", ".join(found.left_out[:3])
        left = f" but in what {options.to} has not: {some}" if some else ""
        raise CommandError(f"{options.base} and {options.tuned} do not differ{left}")
    name = family and family.name
    packed = writing.pack(found.changes, options.to, name)
    writing.write(options.out, packed)
    large = [t for t in packed.tensors.values() if t.numel() > 1]  # no alphas
    report = {
        "base": str(options.base),
        "tuned": str(options.tuned),
        "output": str(options.out),
        "to": options.to,
        "family": name,
        "notes": choice(family),
        "modules": len(found.changes),
        "unchanged": found.unchanged,
        "left_out": found.left_out,
        "left_out_norm": found.left_out_norm,
        "bytes": size_of(options.out),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in large}),
        "error": found.losses.report(options.rank),
    }
    say_json(report) if options.json else print("\n".join(lines(report, options.all)))
    return 0


def paired(
    base: Checkpoint, tuned: Checkpoint, options: argparse.Namespace
) -> list[tuple[Weights, Weights]]:
    """The weights of both by component. Raises CommandError where they have others, and for
    several where the format is for one."""
    only = options.only
    sides = [dict(zip(c.parts, c.main(), strict=True)) for c in (base, tuned)]
    if only and base.is_pipeline and tuned.is_pipeline:
        if any(only not in side for side in sides):
            raise CommandError(f"--only {only}: expected one of {', '.join(sides[0])}")
        sides = [{only: side[only]} for side in sides]
    if sides[0].keys() != sides[1].keys():
        names = [", ".join(name or "one model" for name in side) for side in sides]
        raise CommandError(
            f"expected the same parts in both, got {names[0]} in {base.path} and {names[1]} in"
            f" {tuned.path}; --only PART compares one"
        )
    parts = sorted({t.component for w in sides[0].values() for t in w.modules})
    if only and only not in parts and parts != [""]:
        raise CommandError(f"--only {only}: expected one of {', '.join(parts)}")
    if options.to in ("peft", "fastlora") and len(parts) > 1 and not only:
        raise CommandError(
            f"{options.to} is for one model, and this is {', '.join(parts)}: write each by itself,"
            f" --only {parts[0]} and so on"
        )
    return [(sides[0][component], sides[1][component]) for component in sides[0]]


def modules_of(base: Checkpoint, options: argparse.Namespace) -> list[Target]:
    """All modules that there are, as those that are not compared tell the family as well."""
    return [named(target, options) for w in base.weights() for target in w.modules]


def named(target: Target, options: argparse.Namespace) -> Target:
    """The target with the component that a model by itself is said to be."""
    stated = options.component if not target.component else None
    return target._replace(component=stated) if stated else target


class Extraction:
    """The changes that are found, module by module, and what they say of themselves."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.dtype = torch_dtype(options.dtype)
        self.changes: dict[Target, Change] = {}
        self.losses = Losses()
        self.unchanged = 0
        self.left_out: list[str] = []  # parameters that changed
        self.left_out_norm = 0.0  # of their updates together

    def read(self, pairs: Sequence[tuple[Weights, Weights]]) -> None:
        from fastlora.commands.terminal import progress
        from fastlora.formats.extraction import differences

        total = sum(len(base.modules) for base, _ in pairs)
        every = (d for base, tuned in pairs for d in differences(base, tuned))
        for difference in progress(every, "extracting", total):
            if self.options.only and difference.target.component not in ("", self.options.only):
                continue
            self.add(difference)

    def add(self, found: Difference) -> None:
        from fastlora.formats.changes import Change
        from fastlora.formats.extraction import extract, is_embedding, with_vectors

        if found.weight is None and not found.vectors:
            self.unchanged += 1
            return
        target = named(found.target, self.options)
        kohya = self.options.to in ("kohya", "lycoris")
        if found.weight is not None and kohya and is_embedding(target.path):
            self.leave_out(target, "weight", found.weight)
            found = found._replace(weight=None)
        change = None
        if found.weight is not None:
            made = extract(found, self.options.rank, self.dtype)
            self.losses.add(target, made.lost, made.norm)
            change = Change(made.weight)
        names = sorted(found.vectors)
        if self.options.to == "lycoris":
            change, names = with_vectors(change, found.vectors, self.dtype or found.dtype)
        for name in names:
            self.leave_out(target, name, found.vectors[name])
        if change is not None:
            self.changes[target] = change

    def leave_out(self, target: Target, name: str, update: torch.Tensor) -> None:
        self.left_out.append(f"{target}.{name}")
        self.left_out_norm = math.hypot(self.left_out_norm, float(update.norm()))


def lines(report: Mapping[str, Any], every: bool) -> list[str]:
    from fastlora.commands.terminal import clean, number, percent, plural, size, table

    said = [
        f"{report['output']}: {report['to']}, {plural(report['modules'], 'module')}, "
        f"{', '.join(report['dtypes'])}, {size(report['bytes'])}"
    ]
    said += [f"  {line}" for line in report["notes"]]
    if report["unchanged"]:
        said.append(f"  {plural(report['unchanged'], 'module')} did not change")
    if left := report["left_out"]:
        way = "" if report["to"] == "lycoris" else "; --to lycoris has biases and norms"
        said.append(
            f"  left out: {plural(len(left), 'parameter')} that changed, by "
            f"{number(report['left_out_norm'])} (Frobenius) together, as {clean(left[0])}{way}"
        )
    if errors := report["error"]:
        layers = sorted(errors["modules"].items(), key=lambda item: -item[1])
        layers = [(module, error) for module, error in layers if error]
        said.append(
            f"  rank {errors['rank']}: relative error (Frobenius) {percent(errors['total'])} in"
            f" total{', by layer:' if layers else ''}"
        )
        shown = layers if every else layers[:SHOWN]
        rows = [(percent(error), clean(module)) for module, error in shown]
        said += [f"    {row}" for row in table(rows, right=(0,))]
        if len(layers) > len(shown):
            said.append(f"    and {plural(len(layers) - len(shown), 'layer')} with less: --all")
    return said
