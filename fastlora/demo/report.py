"""What the demo found, in numbers, in words and as files."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora import __version__
from fastlora.demo import charts, images, slider, subject
from fastlora.demo.checks import Check, Together
from fastlora.demo.slider import Slider
from fastlora.demo.speed import Comparison, Row
from fastlora.demo.subject import Personalised, Scores, Trained
from fastlora.demo.world import WORDS, World
from fastlora.doctor import version_of


@dataclass(frozen=True)
class Findings:
    """Everything that the report is made of."""

    world: World
    out: Path
    slider: Slider
    subject: Personalised
    together: Together
    checks: list[Check]
    comparisons: list[Comparison]


def write(found: Findings, seconds: float) -> dict[str, Any]:
    """Writes the pictures, report.json and report.html; returns what report.json holds."""
    from fastlora.demo.page import page

    files = pictures(found)
    result = numbers(found, seconds)
    result["files"] = sorted(
        [*files, "report.html", "report.json"]
        + [f"{name}.safetensors" for name in (slider.NAME, subject.NAME)]
    )
    replace(found.out / "report.html", page(found, result).encode())
    replace(found.out / "report.json", json.dumps(result, indent=2).encode())
    return result


def pictures(found: Findings) -> list[str]:
    """Writes them; their names."""
    s, p = found.slider, found.subject
    strengths = [images.signed(x) for x in s.strengths]
    rows = (p.subject.images, p.before.subject_images, p.spectral.scores.subject_images)
    examples = torch.stack([row[: min(map(len, rows))] for row in rows])
    sheets = {
        "slider.png": images.sheet(s.images[:10], WORDS, strengths),
        "pairs.png": images.sheet(torch.stack([s.pairs.low, s.pairs.high]), ["thin", "thick"]),
        "subject.png": images.sheet(examples, ["the five pictures", "before", "after"]),
        "together.png": images.sheet(found.together.images[:3], (), strengths),
    }
    for name, picture in sheets.items():
        replace(found.out / name, images.png(picture))
    replace(found.out / "curve.svg", charts.standalone(curve(s)).encode())
    return [*sheets, "curve.svg"]


def curve(s: Slider) -> str:
    pair = (slider.THIN, slider.THICK)
    return charts.curve(s.strengths, s.thickness.tolist(), s.mean, s.accuracy, pair)


def replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


# --- numbers --------------------------------------------------------------------------------------


def numbers(found: Findings, seconds: float) -> dict[str, Any]:
    s, p, world = found.slider, found.subject, found.world
    return {
        "fastlora": __version__,
        "machine": machine(world),
        "seed": world.seed,
        "settings": asdict(world.settings),
        "seconds": {"total": seconds, **world.seconds},
        "slider": {
            "modules": s.modules,
            "parameters": s.parameters,
            "train_seconds": s.train_seconds,
            "sample_seconds": s.sample_seconds,
            "loss": s.loss,
            "strengths": list(s.strengths),
            "rows": [WORDS[d] for d in s.rows],
            "thickness": s.thickness.tolist(),
            "thickness_mean": s.mean,
            "class_accuracy": s.accuracy,
            "mean_rises": s.mean_rises,
            "rows_rising": s.rows_rising,
            "steps_rising": s.steps_rising,
            "worst_fall": s.worst_fall,
            "slant_mean": s.slant.mean(0).tolist(),
            "brightness_mean": s.brightness.mean(0).tolist(),
        },
        "subject": {
            "caption": p.subject.caption,
            "class_caption": p.subject.class_caption,
            "floor": p.floor,
            "before": scores(p.before),
            "svdiff": trained(p.spectral),
            "lora": trained(p.lora),
        },
        "together": {"thickness_mean": found.together.thickness, "shown": found.together.shown},
        "verify": {
            "passed": all(c.report.passed for c in found.checks),
            "models": [
                {
                    "title": c.title,
                    "passed": c.report.passed,
                    "rows": list(map(asdict, c.report.rows)),
                }
                for c in found.checks
            ],
        },
        "speed": [asdict(c) for c in found.comparisons],
        "commands": commands(found),
    }


def scores(of: Scores) -> dict[str, float]:
    return {k: v for k, v in vars(of).items() if isinstance(v, float)}


def trained(of: Trained) -> dict[str, Any]:
    return {"parameters": of.parameters, "seconds": of.seconds, **scores(of.scores)}


def machine(world: World) -> dict[str, str]:
    """Where and with what this ran."""
    from fastlora.ops._define import kernels

    packages = ("numpy", "transformers", "peft", "diffusers")
    build = kernels.build_info()
    gpu = torch.cuda.get_device_name() if world.device.type == "cuda" else "none used"
    return {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "GPU": gpu,
        "system": platform.platform(terse=True),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "fastlora": f"{__version__}, {build['cpu_isa']}, {build['compiler']}",
        **{name: version_of(name) or "not installed" for name in packages},
    }


def threads_of_processor() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)} of {processor()}"


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commands(found: Findings) -> str:
    """A program that uses the saved adapters."""
    first, second = (
        json.dumps((found.out / f"{name}.safetensors").as_posix())
        for name in (slider.NAME, subject.NAME)
    )
    settings = found.world.settings
    device = "" if found.world.device.type == "cpu" else f'device="{found.world.device.type}"'
    on = f", {device}" if device else ""
    return f'''\
import torch, fastlora
from fastlora.models import digits
from fastlora.samplers import noise

model = digits.load({device})
fastlora.load(model, {first}, name="{slider.NAME}")
fastlora.load(model, {second}, name="{subject.NAME}")

# five mirrored threes from one noise, thin to thick, in one batch
strengths = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]{on})
fastlora.set_scale(model, {{"{slider.NAME}": strengths, "{subject.NAME}": 1.0}})
table = fastlora.ddim(
    fastlora.Schedule.cosine(1000), steps={settings.steps}, prediction="v", spacing="trailing"
)
pictures = fastlora.sample(
    model,
    table,
    noise([7] * 5, model.shape{on}),
    cond=model.encode(["{found.subject.subject.caption}"] * 5),
    uncond=model.encode([""] * 5),
    guidance_scale={settings.guidance},
)  # [5, 1, 32, 32] in [-1, 1]
'''


# --- words ----------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"


def banner(world: World, out: Path) -> str:
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = threads_of_processor()
    return f"fastlora {__version__} on {device}\nseed {world.seed}, writing to {out.resolve()}"


def say_slider(s: Slider) -> str:
    rows, columns = s.thickness.shape
    return (
        f"  trained in {s.train_seconds:.1f} s: {s.parameters:,} numbers in {s.modules} layers\n"
        f"  {rows * columns} pictures in one batch in {s.sample_seconds:.1f} s\n"
        f"  stroke {s.mean[0]:.2f} to {s.mean[-1]:.2f} pixels over strength {s.strengths[0]:g} to"
        f" {s.strengths[-1]:g}; {rising(s)}\n"
        f"  the judge reads the digit asked for in {s.kept.float().mean().item():.1%}"
    )


def rising(s: Slider) -> str:
    """Whether thickness rises with strength, in the mean and in every row."""
    mean = "the mean rises at every step" if s.mean_rises else "the mean does not always rise"
    every = f"so do {s.rows_rising} of {len(s.rows)} single rows"
    falls = f" ({s.steps_rising:.1%} of all steps, the worst fall is {s.worst_fall:.2f} pixels)"
    return f"{mean}, {every}{falls if s.worst_fall else ''}"


def say_subject(p: Personalised) -> str:
    def one(name: str, of: Scores) -> str:
        return (
            f"  {name:<7} mirrored {of.shown:>4.0%}   distance {of.distance:5.2f}"
            f"   plain three mirrored {of.leaked:>4.0%}   digits right {of.classes:>4.0%}"
        )

    rows = [one("before", p.before)]
    for found in (p.spectral, p.lora):
        cost = f"{found.parameters:>7,} numbers, {found.seconds:.1f} s"
        rows.append(f"{one(found.method, found.scores)}   {cost}")
    rows.append(f"  (distance of the five pictures themselves: {p.floor:.2f})")
    return "\n".join(rows)


def say_checks(together: Together, checks: list[Check]) -> str:
    lines = [
        f"  mirrored three, {together.thickness[0]:.2f} to {together.thickness[-1]:.2f} pixels,"
        f" mirrored in {min(together.shown):.0%} to {max(together.shown):.0%}"
    ]
    for check in checks:
        good = sum(row.passed for row in check.report.rows)
        verdict = "ok    " if check.report.passed else "FAILED"
        lines.append(
            f"  {verdict} {good} of {len(check.report.rows)}, worst {max(check.shares):.2f} of the"
            f" allowed error: {check.title}"
        )
    return "\n".join(lines)


def label(row: Row) -> str:
    if row.seconds is None or row.ratio is None:
        return "not installed"
    return f"{row.ratio:.2f}×  {duration(row.seconds)}"


def say_comparisons(comparisons: list[Comparison]) -> str:
    lines = []
    for c in comparisons:
        lines.append(f"  {c.title}: {c.what}")
        lines += [f"    {row.name:<22} {label(row)}" for row in c.rows]
    return "\n".join([*lines, *(f"  slower than another: {line}" for line in losses(comparisons))])


def losses(comparisons: list[Comparison]) -> list[str]:
    """Where another way of doing the same was faster: the task, who, and by how much."""
    found = []
    for c in comparisons:
        ours = next(r.ratio for r in c.rows if r.ours)  # the unmerged one, where there are two
        for row in c.rows:
            if row.ours or row.name in ("no adapter", "copying the weights"):
                continue
            if ours is not None and row.ratio is not None and row.ratio < ours:
                words = f"{row.name}, {row.ratio:.2f}× against {ours:.2f}×"
                found.append(f"{c.title.lower()}, {c.what} ({words})")
    return found
