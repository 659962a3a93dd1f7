"""report.html: one file, nothing from elsewhere, in light and in dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import torch

from fastlora.demo import charts, images
from fastlora.demo.checks import Check
from fastlora.demo.findings import Findings, threads_of_processor
from fastlora.demo.slider import THICK, THIN, Slider
from fastlora.demo.style import CSS, SCRIPT
from fastlora.demo.subject import Personalised, Scores, Trained
from fastlora.demo.words import duration, label, losses, rising
from fastlora.demo.world import WORDS


def page(found: Findings, numbers: dict[str, Any]) -> str:
    s = found.slider
    sheet = images.data_uri(images.enlarged(s.images, 3))
    rows, columns = s.images.shape[:2]
    atlas = (
        f".atlas{{background-image:url({sheet});background-size:{100 * columns}% {100 * rows}%}}"
    )
    sections = [
        header(found, numbers),
        live(s),
        strip(s),
        personal(found.subject),
        together(found),
        verification(found.checks),
        speed(found),
        use(numbers),
        facts(numbers),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>fastlora demo</title><style>{CSS}{atlas}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


# --- pieces ---------------------------------------------------------------------------------------


def cell(row: int, rows: int, column: int | None, columns: int, label: str) -> str:
    """One picture of the slider's sheet; without a column, the one that the page shows now."""
    at = "var(--c)" if column is None else str(column)
    x = f"calc({at} * {100 / max(columns - 1, 1):.4f}%)"
    y = f"{100 * row / max(rows - 1, 1):.4f}%"
    return (
        f'<div class="tile atlas" role="img" aria-label="{escape(label, True)}"'
        f' style="background-position:{x} {y}"></div>'
    )


def tiles(pictures: torch.Tensor, label: str) -> str:
    """A row of pictures [N, 1, H, W], each embedded."""
    return f'<div class="tiles">{"".join(tile(picture, label) for picture in pictures)}</div>'


def tile(picture: torch.Tensor, label: str) -> str:
    """One picture [1, H, W], embedded."""
    uri = images.data_uri(images.enlarged(picture[None, None], 2))
    style = f"background-image:url({uri});background-size:100% 100%"
    return f'<div class="tile" role="img" aria-label="{label}" style="{style}"></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], ours: Sequence[int] = ()) -> str:
    """Cells are HTML."""
    body = ""
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{c}</td>" for c in row)
        body += f"<tr{' class=ours' if i in ours else ''}>{cells}</tr>"
    top = "".join(f"<th>{h}</th>" for h in head)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def figure(value: str, words: str) -> str:
    return f'<div class="figure"><b>{value}</b><span>{words}</span></div>'


# --- sections -------------------------------------------------------------------------------------


def header(found: Findings, numbers: dict[str, Any]) -> str:
    s, passed = found.slider, sum(r.passed for c in found.checks for r in c.report.rows)
    total = sum(len(c.report.rows) for c in found.checks)
    count = s.images.shape[0] * s.images.shape[1]
    p = found.subject
    figures = [
        figure(
            f"{s.mean[0]:.1f} → {s.mean[-1]:.1f} px",
            f"stroke over strength {images.signed(s.strengths[0])} to"
            f" {images.signed(s.strengths[-1])}, digit kept in {s.kept.float().mean().item():.0%}",
        ),
        figure(f"{s.train_seconds:.1f} s", f"to train the slider’s {s.parameters:,} numbers"),
        figure(
            f"{p.before.shown:.0%} → {p.spectral.scores.shown:.0%}",
            "of samples show the mirrored subject after SVDiff’s"
            f" {p.spectral.parameters:,} numbers",
        ),
        figure(f"{passed} of {total}", "comparisons of fused with reference are within the rule"),
    ]
    device = numbers["machine"]["GPU"]
    if found.world.device.type == "cpu":
        device = threads_of_processor()
    return (
        '<header><div class="brand">fastlora demo</div>'
        f"<h1>{count} pictures, {spelt(len(s.strengths))} strengths of one slider, one batch</h1>"
        '<p class="lead">A small diffusion model of handwritten digits, two adapters trained from'
        " a handful of pictures, and a judge that measures what they do. All of it was made in"
        f" {numbers['seconds']['total']:.0f} seconds on {escape(device)}, seed"
        f" {numbers['seed']}.</p><div class=figures>{''.join(figures)}</div></header>"
    )


def live(s: Slider) -> str:
    rows, columns = s.images.shape[:2]
    shown = min(rows, 20)
    middle = columns // 2
    names = [images.signed(x) for x in s.strengths]
    cells = "".join(cell(r, rows, None, columns, f"a {WORDS[s.rows[r]]}") for r in range(shown))
    return (
        '<section class="card slider"><div class="control"><h3>thickness</h3>'
        f'<input id="strength" type="range" min="0" max="{columns - 1}" value="{middle}"'
        f" aria-label=\"strength of the slider\" data-names='{json_list(names)}'>"
        f'<output id="shown" for="strength">{names[middle]}</output></div>'
        f'<div class="tiles" id="live" style="--c:{middle}">{cells}</div></section>'
    )


def spelt(number: int) -> str:
    return WORDS[number] if number < len(WORDS) else str(number)


def json_list(names: Sequence[str]) -> str:
    import json

    return escape(json.dumps(list(names), ensure_ascii=False), True)


def curve(s: Slider) -> str:
    return charts.curve(s.strengths, s.thickness.tolist(), s.mean, s.accuracy, (THIN, THICK))


def strip(s: Slider) -> str:
    rows, columns = s.images.shape[:2]
    last = columns - 1
    gutter = 92 / (92 + 100 * columns)
    style = f"grid-template-columns:{100 * gutter:.3f}% repeat({columns},1fr)"
    cells = []
    for r in range(min(rows, 10)):
        word = WORDS[s.rows[r]]
        cells.append(f"<span>{word}</span>")
        for c, strength in enumerate(s.strengths):
            cells.append(cell(r, rows, c, columns, f"a {word} at strength {strength:g}"))
    pairs = (
        '<div class="rows"><div class="name"><b>thin</b>strength −1</div>'
        f"{tiles(s.pairs.low, 'a thin digit')}"
        '<div class="name"><b>thick</b>strength +1</div>'
        f"{tiles(s.pairs.high, 'a thick digit')}</div>"
    )
    return (
        '<h2>A thickness slider</h2><div class="aside"><div>'
        f"<p>A LoRA of rank 4 in {s.modules} layers, trained on {len(s.pairs)} pairs: one"
        " forward pass over both pictures of every pair, with gate +1 for the thick and −1 for the"
        f" thin half of the batch. {len(s.loss) * 10} steps took"
        f" {s.train_seconds:.1f} seconds.</p>"
        f"<p>Then {len(s.rows)} rows (ten digits from several noises) at {columns} strengths were"
        f" sampled together, {rows * columns} pictures with a gate for each, in"
        f" {s.sample_seconds:.1f} seconds. A row starts from one noise. Strengths beyond ±1 were"
        f" never trained.</p></div><div class='card'>{pairs}</div></div>"
        f'<div class="card"><div class="strip" style="{style}">{"".join(cells)}</div>'
        f'<div class="chart">{curve(s)}</div></div>'
        f"<p>The judge measures the stroke's width in the pixels (a closed form, no network) and"
        f" reads the digit (a small network). Over all {len(s.rows)} rows {escape(rising(s))}."
        f" The digit is the one asked for in {s.kept.float().mean().item():.1%} of all pictures,"
        f" in {min(s.accuracy):.0%} at the worst strength. What else moved, on average: slant from"
        f" {degrees(s.slant, 0)} over {degrees(s.slant, last // 2)} to {degrees(s.slant, last)},"
        f" brightness from {s.brightness[:, 0].mean():.2f} over"
        f" {s.brightness[:, last // 2].mean():.2f} to {s.brightness[:, last].mean():.2f}.</p>"
    )


def degrees(slant: torch.Tensor, column: int) -> str:
    return f"{slant[:, column].mean().item():.1f}°".replace("-", "−")


def personal(p: Personalised) -> str:
    name, plain = p.subject.caption, p.subject.class_caption
    spectral, lora = p.spectral.scores, p.lora.scores

    def row(words: str, of: Scores, method: Trained | None = None) -> list[str]:
        size = "" if method is None else f"{method.parameters:,}"
        took = "" if method is None else f"{method.seconds:.1f} s"
        shares = [f"{x:.0%}" for x in (of.shown, of.leaked, of.classes)]
        return [words, size, took, shares[0], f"{of.distance:.2f}", *shares[1:]]

    head = (
        "",
        "numbers trained",
        "training",
        f"“{name}” mirrored",
        "distance to the subject",
        f"“{plain}” mirrored",
        "digits right",
    )
    rows = [
        row("before", p.before),
        row("SVDiff", spectral, p.spectral),
        row("LoRA, rank 4", lora, p.lora),
    ]
    gap = spectral.distance - p.floor
    wide = p.before.distance - p.floor
    left = f"{gap / wide:.0%}" if wide > 0 else "all"
    pictures = (
        '<div class="rows"><div class="name"><b>five pictures</b>all it gets</div>'
        f"{tiles(p.subject.images, 'a mirrored digit')}"
        f'<div class="name"><b>before</b>“{name}”</div>'
        f"{tiles(p.before.subject_images[:12], 'a sample')}"
        f'<div class="name"><b>after</b>“{name}”</div>'
        f"{tiles(spectral.subject_images[:12], 'a sample')}"
        f'<div class="name"><b>after</b>“{plain}”</div>'
        f"{tiles(spectral.class_images[:12], 'a sample')}"
        '<div class="name"><b>after</b>all ten digits</div>'
        f"{tiles(spectral.digit_images[:10], 'a sample')}</div>"
    )
    return (
        "<h2>A subject from five pictures</h2>"
        "<p>SVDiff trains one shift for every singular value of every weight, here of the UNet and"
        f" of the text encoder: {p.spectral.parameters:,} numbers. The subject is a mirrored"
        f" {WORDS[p.subject.digit]}, called “{name}”; {len(p.prior)} pictures that the model itself"
        " made before hold on to the classes (prior preservation).</p>"
        f'<div class="card">{pictures}</div>'
        f'<div class="card">{table(head, rows, ours=[1])}</div>'
        f"<p>Both sides: the subject is there in {spectral.shown:.0%} of its samples, and"
        f" {left} of the distance that it began with is left (the five pictures themselves lie"
        f" {p.floor:.2f} from the {len(p.subject.held_out)} held-out ones). The plain word stayed"
        f" itself in {1 - spectral.leaked:.0%}, and the judge reads {spectral.classes:.0%} of the"
        f" ten digits as asked for, {p.before.classes:.0%} before. A LoRA with"
        f" {p.lora.parameters / p.spectral.parameters:.0f} times the numbers, trained for as many"
        f" steps on the same pictures, {beside(p)}. One subject, one seed: a demonstration, not a"
        " benchmark.</p>"
    )


def beside(p: Personalised) -> str:
    """How the LoRA did next to SVDiff, whichever way it went."""
    spectral, lora = p.spectral.scores, p.lora.scores
    nearer = "came nearer" if lora.distance < spectral.distance else "stayed further away"
    kept = lora.classes - spectral.classes
    same = "kept as many digits" if kept == 0 else f"kept {'more' if kept > 0 else 'fewer'} digits"
    return f"{nearer} ({lora.distance:.2f}) and {same} ({lora.classes:.0%})"


def together(found: Findings) -> str:
    t, s = found.together, found.slider
    columns = t.images.shape[1]
    style = f"grid-template-columns:repeat({columns},1fr)"
    cells = []
    for row in t.images[:3]:
        for picture in row:
            cells.append(tile(picture, "a mirrored digit"))
    marks = "".join(f"<span>{images.signed(x)}</span>" for x in s.strengths)
    return (
        "<h2>Both at once</h2>"
        "<p>Both adapters loaded from their files into a fresh model: the slider with a strength"
        f" for every picture, the subject at 1. From {len(t.images)} noises the stroke goes from"
        f" {t.thickness[0]:.2f} to {t.thickness[-1]:.2f} pixels, and the subject is there in"
        f" {min(t.shown):.0%} of the pictures at the worst strength, in {max(t.shown):.0%} at the"
        " best, though the two were never trained together.</p>"
        f'<div class="card"><div class="strip under" style="{style}">{"".join(cells)}{marks}'
        "</div></div>"
    )


def verification(checks: list[Check]) -> str:
    shares = [share for check in checks for share in check.shares]
    rows = []
    for check in checks:
        good = sum(r.passed for r in check.report.rows)
        kind, word = ("ok", "passed") if check.report.passed else ("bad", "FAILED")
        output = check.report.rows[-1]
        rows.append(
            [
                escape(check.title),
                f"{good} of {len(check.report.rows)}",
                f"{max(check.shares):.2f}",
                f"{output.relative:.1e}",
                f'<span class="{kind}">{word}</span>',
            ]
        )
    every = "".join(
        f"<tr><td>{escape(r.path)}</td><td>{escape(r.kind)}</td><td>{r.error:.2e}</td>"
        f"<td>{r.allowed:.2e}</td><td>{'ok' if r.passed else 'FAILED'}</td></tr>"
        for check in checks
        for r in check.report.rows
    )
    head = ("", "within the rule", "worst share of the allowed error", "error of the output", "")
    return (
        "<h2>Fused against reference</h2>"
        "<p>Every adapted layer gets its own input again and is compared with the formula in"
        " float64; so is the whole model. The rule has no tolerance to choose: an error may be at"
        " most twice that of the same formula in plain PyTorch. The chart counts the comparisons by"
        " the share of the allowed error that was used up.</p>"
        f'<div class="card"><div class="used">{charts.histogram(shares)}</div>{table(head, rows)}'
        f"<details><summary>All {len(shares)} comparisons</summary>"
        '<div class="long"><table><tr><th>layer</th><th>adapter</th><th>max error</th>'
        f"<th>allowed</th><th></th></tr>{every}</table></div></details></div>"
    )


def speed(found: Findings) -> str:
    cards = []
    for c in found.comparisons:
        bars = charts.bars([(r.name, r.ratio, label(r), r.ours) for r in c.rows])
        cards.append(
            f'<div class="card"><h3>{escape(c.title)}</h3>'
            f'<p class="note">{escape(c.what)}</p>{bars}</div>'
        )
    lost = losses(found.comparisons)
    honest = (
        "Where something else was faster in this run: " + "; ".join(lost) + "."
        if lost
        else "Nothing else was faster at any of these in this run."
    )
    return (
        "<h2>Speed</h2>"
        "<p>Contestants take turns within one run; a number is the median of a call's time, a ratio"
        " the median of the ratios to the first row within a turn. Shorter is faster."
        f" {escape(honest)}</p>"
        f'<div class="speed">{"".join(cards)}</div>'
    )


def use(numbers: dict[str, Any]) -> str:
    return (
        "<h2>Use these adapters</h2><p>This program runs as it stands, in the directory where the"
        f" demo ran.</p><pre>{escape(numbers['commands'])}</pre>"
    )


def facts(numbers: dict[str, Any]) -> str:
    def definitions(rows: dict[str, str]) -> str:
        found = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows.items())
        return f"<dl>{''.join(found)}</dl>"

    times = {name: duration(s) for name, s in numbers["seconds"].items() if name != "total"}
    times["all of it"] = duration(numbers["seconds"]["total"])
    files = " ".join(f"<code>{escape(name)}</code>" for name in numbers["files"])
    return (
        "<h2>This run</h2><div class=two>"
        f'<div class="card"><h3>Machine and versions</h3>{definitions(numbers["machine"])}</div>'
        f'<div class="card"><h3>Time and files</h3>'
        f"{definitions({'seed': str(numbers['seed']), **times})}"
        f'<p class="files">{files}</p></div></div>'
        "<footer>The numbers are in report.json. The model was trained on scikit-learn's digits;"
        " its weights are part of the package.</footer>"
    )
