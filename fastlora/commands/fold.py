"""`fastlora fold`: adapters into the files of a model."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.commands import CommandError
from fastlora.commands.arguments import add_files, filled
from fastlora.commands.outputs import only_part
from fastlora.commands.resolving import require, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from fastlora.formats.changes import Change, Target
    from fastlora.formats.checkpoints import Checkpoint, Weights
    from fastlora.formats.rewriting import Written

HELP = "adapters into a model's files"
DESCRIPTION = (
    "Writes a copy of a model with adapters in its weights, so that programs without adapters have"
    " them: W' = W + strength · ΔW, computed in float32 and rounded once to the dtype that the file"
    " has. All kinds can be folded: LoRA, DoRA, LoHa, LoKr, full updates, norms, biases, spectral"
    " shifts. The model is never changed, and a fold that fails leaves nothing behind. Exit code 1"
    " if --no-strict left something out."
)
EXAMPLES = """
models:
  folder of a pipeline    as diffusers saves it, with model_index.json
  folder of a component   with one model's safetensors, in shards or not
  safetensors file        of one model, or of a whole pipeline with the original names
                          (model.diffusion_model.input_blocks...: SD 1, SD 2, SDXL, FLUX)

examples:
  fastlora fold style.safetensors=0.8 --into sd15/ --out sd15-style/
  fastlora fold a.safetensors b.safetensors=-1 --into sdxl.safetensors --out new.safetensors
"""
MOST = 2.0**24  # digits of float32
# Weights that would stay what they were, and be taken for the others.
STALE = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = filled(DESCRIPTION)
    parser.epilog = EXAMPLES.strip("\n")
    add = parser.add_argument
    add_files(parser)
    add("--into", type=Path, required=True, metavar="MODEL", help="safetensors file or folder")
    add("--out", type=Path, required=True, help="what to write: a file or a folder, as MODEL is")
    add(
        "--only",
        metavar="PART",
        help="fold one part of the adapters: unet, transformer, text_encoder, ...",
    )
    add("--force", action="store_true", help="replace OUT if it is there")
    add(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="leave out what does not fit the model (default: an error)",
    )
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """0, or 1 for what was left out. Raises CommandError, FormatError, OSError; nothing is left
    then."""
    from fastlora.commands.terminal import progress, say_json
    from fastlora.formats import detect
    from fastlora.formats.checkpoints import Checkpoint
    from fastlora.formats.copying import copy, replacing
    from fastlora.formats.rewriting import overwrite, rewritten, touched

    check_places(options)
    found = [
        (path, strength, only_part(path, detect.read(path), options.only))
        for path, strength in options.files
    ]
    with Checkpoint(options.into) as checkpoint:
        edits, unused, misfits = resolve(found, checkpoint)
        require(edits, misfits, options)
        work = [(w, touched(w, edits)) for w in checkpoint.weights()]
        stale = stale_files(checkpoint, [w for w, keys in work if keys])
        written: dict[str, list[Written]] = {}
        dtypes: dict[str, set[str]] = {}
        with replacing(options.out) as made:
            copy(options.into, made, stale)
            steps = [(w, key, places) for w, keys in work for key, places in keys.items()]
            for weights, key, places in progress(steps, "folding", len(steps)):
                tensor, done = rewritten(weights, key, places, edits, check_base)
                file = weights.file(key)
                copied = made / file.path.relative_to(options.into)
                overwrite(copied, file.offset(key), tensor)
                component = places[0][0].component
                written.setdefault(component, []).append(done)
                dtypes.setdefault(component, set()).add(str(tensor.dtype).removeprefix("torch."))
            components = {c: summary(written[c], dtypes[c]) for c in sorted(written)}
            require_sane(components)
    report = {
        "model": str(options.into),
        "output": str(options.out),
        "inputs": [
            {"file": str(path), "format": file.format, "strength": strength}
            for path, strength, file in found
        ],
        "modules": len(edits),
        "components": components,
        "unused": {path: keys for path, keys in unused.items() if keys},
        "not_copied": sorted(str(path) for path in stale),
    }
    say_json(report) if options.json else print("\n".join(lines(report)))
    return 1 if report["unused"] else 0


def check_places(options: argparse.Namespace) -> None:
    """Raises CommandError for an output that cannot or must not be written, and inputs that are
    not there."""
    model, out = options.into, options.out
    for path in (*(path for path, _ in options.files), model):
        if not path.exists():
            raise CommandError(f"{path}: no such file or folder")
    if model.is_file() and model.suffix != ".safetensors":
        raise CommandError(f"{model}: expected a safetensors file or a folder (also for shards)")
    if model.is_file() and out.suffix != ".safetensors":
        raise CommandError(f"{out}: expected a name that ends with .safetensors, as the model's")
    if not out.parent.is_dir():
        raise CommandError(f"{out}: its folder does not exist")
    real, source = out.resolve(), model.resolve()
    inputs = [path.resolve() for path, _ in options.files]
    inside = model.is_dir() and source in real.parents
    if real == source or inside or any(p == real or real in p.parents for p in (*inputs, source)):
        raise CommandError(f"{out}: expected another place than the inputs'")
    if not os.path.lexists(out):
        return
    if not options.force:
        raise CommandError(f"{out} is there already; --force replaces it")
    if out.is_dir() != model.is_dir():
        kinds = {True: "a folder", False: "a file"}
        raise CommandError(f"{out}: expected {kinds[model.is_dir()]}, got {kinds[out.is_dir()]}")


def require_sane(components: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises CommandError for changes beside which nothing is left of the weights in float32."""
    for component, own in components.items():
        change = own["change"]
        if change is not None and not change < MOST:
            raise CommandError(
                f"{component or 'the model'}: expected changes smaller than {MOST:.2g} times the"
                f" weights, of which nothing is left otherwise, got {change:.2g} times: give a"
                " smaller strength"
            )


def check_base(target: Target, change: Change, weight: Tensor) -> None:
    """Raises CommandError for spectral shifts of another weight."""
    from fastlora.adapters.base_hash import base_hash, same_base
    from fastlora.formats.changes import Shift

    if isinstance(change.weight, Shift) and not same_base(
        change.weight.base_hash, base_hash(weight)
    ):
        raise CommandError(
            f"{target}: spectral shifts belong to the weight that they were trained on, and this is"
            " another one"
        )


def stale_files(checkpoint: Checkpoint, changed: Sequence[Weights]) -> list[Path]:
    """Files with weights, beside those that change, that would stay what they were."""
    if checkpoint.path.is_file():
        return []
    known = {path for weights in checkpoint.weights() for path in weights.paths}
    folders = {path.parent for weights in changed for path in weights.paths}
    suffixes = (*STALE, ".safetensors")
    here = {p for f in folders | {checkpoint.path} for p in f.iterdir() if p.suffix in suffixes}
    return sorted(here - known)


def summary(written: Sequence[Written], dtypes: set[str]) -> dict[str, Any]:
    before, change, rounding = (
        math.sqrt(math.fsum(column)) for column in zip(*written, strict=True)
    )
    return {
        "tensors": len(written),
        "dtypes": sorted(dtypes),
        "change": change / before if before else None,
        "rounding": rounding / change if change else None,
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    from fastlora.commands.terminal import clean, number, percent, plural

    inputs = " + ".join(f"{number(i['strength'])} × {i['file']}" for i in report["inputs"])
    said = [f"{report['output']}: {report['model']} + {inputs}"]
    for component, own in report["components"].items():
        part = f"{component}: " if component else ""
        change = (
            "" if own["change"] is None else f" changed by {percent(own['change'])} (Frobenius)"
        )
        said.append(f"  {part}{plural(own['tensors'], 'tensor')}{change}")
        if own["rounding"]:
            dtypes = ", ".join(own["dtypes"])
            said[-1] += f"; rounding to {dtypes}: {percent(own['rounding'])} of the change"
    for path, keys in report["unused"].items():
        for key, reason in list(keys.items())[:5]:
            said.append(f"  left out of {path}: {clean(key)}: {clean(reason)}")
        if len(keys) > 5:
            said.append(f"  and {len(keys) - 5:,} more keys of {path}: --json")
    said += [f"  not copied, as its weights are the old ones: {p}" for p in report["not_copied"]]
    return said
