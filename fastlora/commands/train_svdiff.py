"""`fastlora train svdiff`: shifts of singular values from a folder of pictures."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.commands import CommandError

if TYPE_CHECKING:
    import torch

    from fastlora.commands.targets import Target

NAME = "subject"
COUNT = 200  # class pictures, where a class caption is given
CHECKPOINT_EVERY = 100  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def whole(text: str) -> int:
        return _checked(text, int, 1, 2**31 - 1, "an integer from 1 to 2^31 - 1")

    def seed(text: str) -> int:
        return _checked(text, int, 0, 2**63 - 1, "an integer from 0 to 2^63 - 1")

    def least_zero(text: str) -> float:
        return _checked(text, float, 0.0, sys.float_info.max, "a number >= 0")

    add = parser.add_argument
    add("--model", required=True, help="digits, or a folder with Stable Diffusion (diffusers)")
    add(
        "--images", type=Path, required=True, help="folder of pictures of the subject; five will do"
    )
    add("--caption", required=True, help='what they show, with a rare word: "a photo of sks dog"')
    add("--out", type=Path, required=True, help="file to write (.safetensors)")
    add("--class-caption", help='its class, for prior preservation: "a photo of a dog"')
    add("--prior", type=whole, help=f"class pictures to sample before (default: {COUNT})")
    add("--prior-weight", type=least_zero, default=1.0, help="of the class's loss (default: 1)")
    add("--steps", type=whole, default=500, help="default: 500")
    add("--batch", type=whole, default=1, help="pictures a step, and as many of the class (1)")
    add("--lr", type=least_zero, help="of the shifts (default: 1e-3; digits: 2e-2)")
    add("--norm-lr", type=least_zero, help="of norms (default: 1e-6; digits: 3e-3)")
    add(
        "--norms",
        choices=("elementwise", "scalar", "skip"),
        default="elementwise",
        help="shifts of norms: one an element, one a layer, none (default: elementwise)",
    )
    add(
        "--materialize",
        choices=("forward", "step"),
        default="forward",
        help="changed weights are made in each layer when it is called (forward), or together once"
        " a step, which is quicker and keeps one more copy of them (default: forward)",
    )
    add("--text-encoder", action="store_true", help="train the text encoder's shifts as well")
    add("--size", type=whole, help="pixels of a side (default: the model's)")
    add("--seed", type=seed, default=0, help="default: 0")
    add(
        "--cache",
        type=Path,
        help="folder that keeps class pictures and the decompositions of all weights between runs,"
        " once to twice the size of the model (default: none for the pictures, for decompositions"
        " fastlora/factors in the user's cache folder)",
    )
    add("--resume", action="store_true", help="go on from the checkpoint beside --out")
    add("--device", help="cpu or cuda (default: the GPU where there is one)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the model",
    )
    add("--json", action="store_true", help="print JSON")


def _checked(text: str, kind: Any, least: float, most: float, expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
    return value


def run(options: argparse.Namespace) -> int:
    """Trains and writes `--out`; 0. Raises CommandError for what cannot be done, OSError."""
    try:
        return _run(options)
    except (ValueError, FloatingPointError) as error:  # what recipes and files refuse
        # The command's name is said already, and the training loop has the same.
        raise CommandError(" ".join(str(error).split()).removeprefix("train: ")) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise CommandError(
            f"there is not enough memory for --batch {options.batch} at this --size"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    # On the CPU it is a plain RuntimeError.
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "DefaultCPUAllocator" in str(error)


def _run(options: argparse.Namespace) -> int:
    from fastlora import Spectral, decompose, save
    from fastlora.commands.targets import find_pictures, load_target
    from fastlora.commands.terminal import say_json
    from fastlora.methods import personalise
    from fastlora.training import ensure_writable

    start = time.perf_counter()
    out, checkpoint = _outputs(options)
    files = find_pictures(options.images)
    ensure_writable(out.parent, "--out")
    if options.cache:
        ensure_writable(options.cache, "--cache")
    target = load_target(options.model, options.size, options.device, options.dtype)
    images = target.read(files)
    own = _condition(target, options.caption, options.text_encoder)
    prior = _prior(target, options)
    where = None if options.text_encoder else rf"{target.unet}\..*"
    factors = options.cache / "factors" if options.cache else True
    decompose(target.model, where, cache=factors, progress=True)
    result = personalise(
        target.model,
        images,
        own,
        target.schedule,
        prediction=target.prediction,
        name=NAME,
        adapter=Spectral(norms=options.norms),
        where=where,
        prior_weight=options.prior_weight,
        steps=options.steps,
        batch=options.batch,
        lr=target.lr if options.lr is None else options.lr,
        norm_lr=target.norm_lr if options.norm_lr is None else options.norm_lr,
        seed=options.seed,
        checkpoint=checkpoint,
        checkpoint_every=CHECKPOINT_EVERY,
        materialize=options.materialize,
        progress=True,
        description="training",
        **prior,
    )
    saved = []
    for part, module in target.parts.items():
        if part and not options.text_encoder:
            continue
        path = out.with_name(f"{out.stem}.{part}{out.suffix}") if part else out
        save(module, path, name=NAME)
        saved.append(_facts(path, part, module))
    checkpoint.unlink(missing_ok=True)
    report = {
        "model": options.model,
        "pictures": len(files),
        "steps": options.steps,
        "loss": _first_and_last(result.metrics),
        "seconds": time.perf_counter() - start,
        "files": saved,
    }
    say_json(report) if options.json else print("\n".join(_lines(report)))
    return 0


def _outputs(options: argparse.Namespace) -> tuple[Path, Path]:
    out = options.out
    if out.suffix != ".safetensors":
        raise CommandError(f"--out: expected a name that ends with .safetensors, got {out}")
    if out.is_dir():
        raise CommandError(f"--out: {out} is a folder")
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    if options.resume:
        _check_resumable(checkpoint, options.steps)
    if checkpoint.exists() and not options.resume:
        raise CommandError(
            f"{checkpoint} is of a run that was stopped: --resume goes on from it, deleting it"
            " begins anew"
        )
    return out, checkpoint


def _check_resumable(checkpoint: Path, steps: int) -> None:
    from fastlora.training import load_checkpoint

    if not checkpoint.exists():
        raise CommandError(f"--resume: there is no checkpoint {checkpoint}")
    done = load_checkpoint(checkpoint)["step"]
    if done > steps:
        raise CommandError(
            f"--resume: {checkpoint} is at step {done}, which is beyond --steps {steps}"
        )


def _condition(target: Target, caption: str, trained: bool) -> Any:
    """A tensor, computed once, or a function where the text encoder is trained along."""
    if trained:
        return lambda drawn: target.encode([caption] * len(drawn))
    return _encoded(target, caption)


def _encoded(target: Target, caption: str) -> torch.Tensor:
    import torch

    with torch.no_grad():
        return target.encode([caption])


def _prior(target: Target, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `personalise` about the class."""
    from fastlora.methods import sample_prior

    caption = options.class_caption
    if caption is None:
        if options.prior is not None:
            raise CommandError("--prior: expected --class-caption with it, got none")
        return {}
    if options.prior_weight == 0:
        raise CommandError("--prior-weight 0 and --class-caption: expected one of them, got both")
    images = sample_prior(
        target.model,
        target.prior_table,
        _encoded(target, caption),
        _encoded(target, ""),
        shape=target.shape,
        count=options.prior or COUNT,
        guidance_scale=target.guidance,
        seed=options.seed,
        cache=options.cache,
        progress=True,
    )
    return {
        "prior_images": images,
        "prior_cond": _condition(target, caption, options.text_encoder),
    }


def _facts(path: Path, part: str, module: Any) -> dict[str, Any]:
    """A file that was written, and what of a user's to load it into."""
    from fastlora import adapters

    into = f"pipe.{part or 'unet'}" if part or hasattr(module, "config") else "model"
    shifts = adapters(module)[NAME].parameters
    return {"file": str(path), "into": into, "shifts": shifts, "bytes": path.stat().st_size}


def _first_and_last(metrics: dict[str, list[float]]) -> dict[str, float]:
    """The subject's loss: means of the first and the last tenth of the steps."""
    losses = metrics["subject" if "subject" in metrics else "loss"]
    few = max(1, len(losses) // 10)
    return {"first": sum(losses[:few]) / few, "last": sum(losses[-few:]) / few}


def _lines(report: Mapping[str, Any]) -> list[str]:
    loss = "{first:.4f} -> {last:.4f}".format(**report["loss"])
    said = [f"{report['pictures']} pictures, loss {loss}, {report['seconds']:.0f} s"]
    for own in report["files"]:
        load = f"fastlora.load({own['into']}, {own['file']!r})"
        megabytes = own["bytes"] / 1e6
        said.append(f"{own['file']}: {own['shifts']:,} shifts, {megabytes:.2f} MB; {load}")
    return said
