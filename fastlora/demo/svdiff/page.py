"""svdiff.html: one file, nothing from elsewhere, in light and in dark."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from fastlora.demo import charts, images
from fastlora.demo.page import table, tiles
from fastlora.demo.style import CSS
from fastlora.demo.svdiff.editing import Edited
from fastlora.demo.svdiff.methods import Compared, Run
from fastlora.demo.svdiff.pair import Paired
from fastlora.demo.svdiff.settings import ShiftSettings

NAMES = {"SVDiff": "SVDiff", "LoRA": "LoRA, rank 4", "all": "all weights"}
MEASURES = ("distance", "shown", "kept", "leaked", "classes")
PLUS_MINUS = "±"


@dataclass(frozen=True)
class Found:
    settings: ShiftSettings
    compared: Compared
    paired: Paired
    edited: Edited


def measure(run: Run, name: str) -> float:
    return run.kept if name == "kept" else getattr(run.scores, name)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def spread(values: list[float]) -> float:
    """Half of the distance from the least to the largest."""
    return (max(values) - min(values)) / 2


def numbers(found: Found, seed: int, seconds: dict[str, float]) -> dict[str, Any]:
    """What svdiff.json holds."""
    c, p, e = found.compared, found.paired, found.edited

    def rows(runs: list[Run]) -> dict[str, Any]:
        values = {m: [measure(r, m) for r in runs] for m in MEASURES}
        first = runs[0]
        return {
            "parameters": first.parameters,
            "bytes": first.size,
            "seconds": mean([r.seconds for r in runs]),
            **values,
        }

    return {
        "seed": seed,
        "seconds": seconds,
        "floor": c.floor,
        "before": rows(c.before),
        "methods": [
            {"method": method, "prior_weight": weight, **rows(c.of(method, weight))}
            for weight in found.settings.weights
            for method, _ in found.settings.rates
        ],
        "pair": {
            "ceiling": p.ceiling,
            **{
                name: {
                    key: getattr(way, key)
                    for key in ("placed", "present", "either", "apart", "strayed")
                }
                for name, way in p.ways.items()
            },
        },
        "edit": {
            "captions": e.captions,
            "thickness": e.thickness,
            "distance": e.start,
            **{
                name: {key: getattr(way, key) for key in ("thickness", "kept", "distance")}
                for name, way in e.ways.items()
            },
        },
    }


# --- tables ---------------------------------------------------------------------------------------


def method_rows(found: Found) -> tuple[list[str], list[list[str]]]:
    c = found.compared
    n = len(c.before)
    head = ["", "λ", "numbers", "bytes", "distance", "subject shown", "plain class kept", "digits"]

    def cells(name: str, weight: str, runs: list[Run]) -> list[str]:
        first = runs[0]
        distance = [measure(r, "distance") for r in runs]
        shares = [mean([measure(r, m) for r in runs]) for m in ("shown", "kept", "classes")]
        near = f"{mean(distance):.2f}" + (f" {PLUS_MINUS} {spread(distance):.2f}" if n > 1 else "")
        counts = [f"{x:,}" if x else "" for x in (first.parameters, first.size)]
        return [name, weight, *counts, near, *(f"{x:.0%}" for x in shares)]

    rows = [cells("before", "", c.before)]
    for weight in found.settings.weights:
        for method, _ in found.settings.rates:
            rows.append(cells(NAMES[method], f"{weight:g}", c.of(method, weight)))
    return head, rows


def pair_rows(p: Paired) -> tuple[list[str], list[list[str]]]:
    head = ["", "two things apart", "a subject", "both subjects", "both, as asked", "unmix"]
    rows = []
    for name, way in p.ways.items():
        shares = (way.apart, way.either, way.present, way.placed)
        rows.append([name, *(f"{x:.0%}" for x in shares), f"{way.strayed:.4f}"])
    return head, rows


def edit_rows(e: Edited) -> tuple[list[str], list[list[str]]]:
    head = ["", "stroke, pixels", "digit kept", "distance to the line drawn thick"]
    rows = [["the picture itself", f"{e.thickness[0]:.2f}", "", f"{e.start:.2f}"]]
    for name, way in e.ways.items():
        rows.append([name, f"{way.thickness:.2f}", f"{way.kept:.0%}", f"{way.distance:.2f}"])
    return head, [*rows, ["wanted", f"{e.thickness[1]:.2f}", "", "0"]]


def say(found: Found) -> str:
    """The three tables in words of one width."""
    parts = []
    for head, rows in (method_rows(found), pair_rows(found.paired), edit_rows(found.edited)):
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        for row in (head, *rows):
            cells = [row[0].ljust(widths[0])]
            cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
            parts.append("  " + "  ".join(cells))
        parts.append("")
    return "\n".join(parts).rstrip()


# --- the page -------------------------------------------------------------------------------------


def scatter(found: Found) -> str:
    """Distance to the subject against digits kept, a dot for every run; hollow without a prior."""
    c, width, height, left, bottom = found.compared, 640.0, 300.0, 56.0, 40.0
    far = 1.1 * max(r.scores.distance for r in c.runs)
    colours = dict(zip(NAMES, ("accent", "good", "muted"), strict=True))

    def at(distance: float, share: float) -> tuple[float, float]:
        x = left + (width - left - 20) * distance / far
        return x, 20 + (height - 20 - bottom) * (1 - share)

    parts = []
    for share in (0.0, 0.5, 1.0):
        y = at(0, share)[1]
        parts += [
            charts.line(left, y, width - 20, y),
            charts.text(left - 8, y + 4, f"{share:.0%}", "end"),
        ]
    words = "distance to the subject, less is better; height: digits right, more is better"
    parts.append(charts.text((left + width) / 2, height - 8, words))
    x = at(c.floor, 0)[0]
    parts.append(charts.line(x, 20, x, height - bottom, "muted", 1, "2 5"))
    for run in c.runs:
        px, py = at(run.scores.distance, run.scores.classes)
        colour = f"var(--{colours[run.method]})"
        fill = colour if run.prior_weight else "var(--card)"
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" fill="{fill}" stroke="{colour}"'
            ' stroke-width="2.5" fill-opacity=".75"/>'
        )
    for i, (key, name) in enumerate(NAMES.items()):
        parts.append(
            charts.text(
                width - 24, height - bottom - 14 - 20 * i, name, "end", 13, colours[key], 650
            )
        )
    return charts.svg(width, height, "Distance to the subject against digits kept", *parts)


def wide_tiles(pictures: torch.Tensor, label: str) -> str:
    """Pictures [N, 1, 32, 64] in a row."""
    cells = []
    for picture in pictures:
        uri = images.data_uri(images.enlarged(picture[None, None], 2))
        style = f"background-image:url({uri});background-size:100% 100%;aspect-ratio:2"
        cells.append(f'<div class="tile" role="img" aria-label="{label}" style="{style}"></div>')
    style = "grid-template-columns:repeat(8,1fr)"
    return f'<div class="tiles" style="{style}">{"".join(cells)}</div>'


def named(rows: list[tuple[str, str, str]]) -> str:
    cells = [
        f'<div class="name"><b>{escape(name)}</b>{escape(note)}</div>{pictures}'
        for name, note, pictures in rows
    ]
    return f'<div class="card"><div class="rows">{"".join(cells)}</div></div>'


def methods_section(found: Found) -> str:
    c, s = found.compared, found.settings
    head, rows = method_rows(found)
    subject = c.task.subject
    pictures = [("five pictures", "all it gets", tiles(subject.images, "a mirrored digit"))]
    for weight in s.weights:
        for method, _ in s.rates:
            scores = c.of(method, weight)[0].scores
            shown = torch.cat([scores.subject_images[:6], scores.class_images[:6]])
            pictures.append((NAMES[method], f"λ = {weight:g}", tiles(shown, "a sample")))
    seeds = len(c.before)
    return (
        "<h2>A subject from five pictures</h2>"
        f"<p>Five mirrored threes, called “{subject.caption}”, {s.steps} steps of {s.batch}"
        f" pictures (with λ = 1 and of {s.batch} class pictures that the plain model made), {seeds}"
        f" seed{'s' if seeds > 1 else ''} with other pictures each. UNet and text encoder are"
        " trained. Distance: to the nearest held-out mirrored three; the five pictures themselves"
        f" are {c.floor:.2f} away. “Subject shown”: samples of “{subject.caption}” that are"
        f" mirrored threes; “plain class kept”: samples of “{subject.class_caption}” that the judge"
        " reads as one; “digits”: all ten. ± is half of the range over the seeds. Each method has"
        " the learning rate that did well for it on this model.</p>"
        f'<div class="card">{table(head, rows)}</div><div class="card">{scatter(found)}</div>'
        "<p>Filled dots: with the prior. The dotted line is as near as the five pictures are.</p>"
        f"<p class=note>Left: “{subject.caption}”, right: “{subject.class_caption}”; first"
        " seed.</p>"
        f"{named(pictures)}"
    )


def pair_section(found: Found) -> str:
    p, s = found.paired, found.settings
    head, rows = pair_rows(p)
    n = s.pair_judged
    pictures = [("collages", "trained on", wide_tiles(p.examples[:4], "two mirrored digits"))]
    for name, way in p.ways.items():
        shown = torch.cat([way.images[: min(n, 4)], way.images[n : n + min(n, 4)]])
        pictures.append((name, "", wide_tiles(shown, "a sample")))
    return (
        "<h2>Two subjects in one picture</h2>"
        f"<p>A mirrored three and a mirrored seven, {s.pair_steps} steps of {s.pair_batch}; the"
        f" samples are of “{escape(p.captions[0])}” (left) and “{escape(p.captions[1])}” (right)."
        " The canvas is twice as wide as what the model was made for, so that the judge can read"
        " each half as it is: a half counts as a subject if it is nearer to the subject's held-out"
        " pictures than to their mirror images and reads as the digit in a mirror; collages of"
        f" held-out pictures pass in {p.ceiling:.0%}. “Two things apart” asks for no subject,"
        " only for ink in both halves and none between them. “Unmix” is the loss on held-out"
        " collages: how much each subject's words look at the other's half.</p>"
        f'<div class="card">{table(head, rows)}</div>{named(pictures)}'
    )


def edit_section(found: Found) -> str:
    e, s = found.edited, found.settings
    head, rows = edit_rows(e)
    pictures = [("the picture", "", tiles(e.originals, "a thin digit"))]
    pictures += [(name, "", tiles(way.images, "an edit")) for name, way in e.ways.items()]
    pictures.append(("wanted", "the same line", tiles(e.wanted, "a thick digit")))
    return (
        "<h2>One picture, edited by its caption</h2>"
        f"<p>“{escape(e.captions[0][0])}” becomes “{escape(e.captions[0][1])}” and so on: shifts"
        f" are trained on the one picture ({s.edit_steps} steps), it is inverted under the new"
        " caption, and sampled from there with guidance 3. As the pictures are drawn, the right"
        " answer is known: the same line under a thick pen, which no model has seen.</p>"
        f'<div class="card">{table(head, rows)}</div>{named(pictures)}'
    )


def page(found: Found, result: dict[str, Any]) -> str:
    seconds = result["seconds"]["total"]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>fastlora demo svdiff</title><style>{CSS}</style></head>\n<body><main>\n"
        '<header><div class="brand">fastlora demo svdiff</div>'
        "<h1>Shifts of singular values, beside what else there is</h1>"
        '<p class="lead">A small diffusion model of handwritten digits and a judge that measures.'
        f" Made in {seconds:.0f} seconds, seed {result['seed']}. Short trainings of a small model:"
        " a demonstration, not a benchmark.</p></header>\n"
        + "\n".join((methods_section(found), pair_section(found), edit_section(found)))
        + "\n</main></body></html>\n"
    )
