"""`fastlora verify`: an adapter file on a model, against float64."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.commands import CommandError
from fastlora.commands.arguments import strength

if TYPE_CHECKING:
    from fastlora.commands.verifying import Row

HELP = "an adapter file on a model, against float64"
DESCRIPTION = (
    "Loads an adapter file onto a model and checks every adapted layer on random inputs, with the"
    " adapter beside the weight and folded into it, against what the file's own tensors say in"
    " float64. The rule: the error is at most twice that of the same expression in plain PyTorch in"
    " the layer's dtype. Exit code 1 if a layer breaks it, 2 if the file does not fit the model."
)
SHOWN = 15  # rows of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="adapter file of any format, or folder with one")
    add(
        "--model",
        required=True,
        metavar="MODEL",
        help="digits (fastlora's own), or a folder of a pipeline or a component of diffusers",
    )
    add("--strength", type=strength, default=1.0, metavar="S", help="of the adapter (default: 1)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the model (default: float32)",
    )
    add("--device", help="cpu, cuda, ... (default: cuda where it is usable)")
    add("--seed", type=int, default=0, help="of the inputs (default: 0)")
    add("--all", action="store_true", help=f"show all layers, not the {SHOWN} nearest to the limit")
    add("--json", action="store_true", help="print JSON with all layers")


def run(options: argparse.Namespace) -> int:
    """0, or 1 where a layer is wrong. Raises CommandError, AdapterError, FormatError, OSError."""
    import torch

    from fastlora.commands.models import chosen_device, load_models
    from fastlora.commands.terminal import progress, say_json
    from fastlora.commands.verifying import adapted_changes, checked, folding
    from fastlora.formats import detect

    if not Path(options.file).exists():
        raise CommandError(f"{options.file}: no such file or folder")
    file = detect.read(options.file)
    device = chosen_device(options.device)
    parts = {target.component for target in file.changes}
    models = load_models(options.model, parts, device, getattr(torch, options.dtype))
    changes = adapted_changes(models, options.file, file, options.strength)
    rows: list[Row] = []
    with torch.no_grad():
        for way in ("unmerged", "folded"):
            with folding(models, way == "folded"):
                for path, (layer, base, change) in progress(changes.items(), way, len(changes)):
                    generator = torch.Generator().manual_seed(options.seed)
                    rows.append(
                        checked(path, way, layer, base, change, options.strength, generator)
                    )
    rows.sort(key=lambda row: row.used, reverse=True)
    good = all(row.passed for row in rows)
    report = {
        "file": str(options.file),
        "format": file.format,
        "model": options.model,
        "dtype": options.dtype,
        "device": str(device),
        "strength": options.strength,
        "passed": good,
        "layers": len(changes),
        "rows": [row._asdict() for row in rows],
    }
    say_json(report) if options.json else print("\n".join(lines(report, rows, options.all)))
    return 0 if good else 1


def lines(report: Mapping[str, Any], rows: Sequence[Row], every: bool) -> list[str]:
    from fastlora.commands.terminal import clean, plural, table

    shown = rows if every else rows[:SHOWN]
    cells = [("layer", "kind", "way", "max error", "relative", "allowed", "")]
    for row in shown:
        numbers = (f"{row.error:.1e}", f"{row.relative:.1e}", f"{row.allowed:.1e}")
        verdict = "ok" if row.passed else "WRONG"
        cells.append((clean(row.path), row.kind, row.way, *numbers, verdict))
    said = [
        f"{clean(report['file'])} ({report['format']}) on {clean(report['model'])}, "
        f"{report['dtype']} on {report['device']}, strength {report['strength']:g}",
        "",
        *table(cells, right=(3, 4, 5)),
    ]
    if len(rows) > len(shown):
        said.append(f"... and {plural(len(rows) - len(shown), 'check')} further from the limit")
    wrong = sum(not row.passed for row in rows)
    said.append("")
    if wrong:
        said.append(f"WRONG: {wrong} of {plural(len(rows), 'check')} beyond twice the plain error")
    else:
        said.append(
            f"right: {plural(report['layers'], 'layer')}, unmerged and folded, within twice the"
            " error of plain PyTorch"
        )
    return said
