"""What the demo found, in words."""

from __future__ import annotations

from pathlib import Path

import torch

from fastlora import __version__
from fastlora.demo.checks import Check, Together
from fastlora.demo.findings import threads_of_processor
from fastlora.demo.slider import Slider
from fastlora.demo.speed import Comparison, Row
from fastlora.demo.subject import Personalised, Scores
from fastlora.demo.world import World


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
