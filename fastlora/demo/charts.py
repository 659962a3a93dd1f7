"""Charts as SVG by hand. Colours are the page's custom properties; `standalone` brings its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fastlora.demo.images import signed

FONT = "font-family:Inter,system-ui,-apple-system,'Segoe UI',Roboto,sans-serif"

# For a chart outside the page, where there is no stylesheet.
COLOURS = """
svg{--card:#fff;--ink:#1d1b19;--muted:#6f6a64;--line:#e4dfd8;--accent:#d9480f;--good:#2b8a3e;
background:#fff}
@media(prefers-color-scheme:dark){
svg{--card:#1c1b19;--ink:#efece8;--muted:#a29b92;--line:#35322e;--accent:#ff7a45;--good:#69db7c;
background:#1c1b19}}
"""


def text(
    x: float,
    y: float,
    words: str,
    anchor: str = "middle",
    size: float = 13,
    fill: str = "muted",
    weight: int = 400,
    halo: bool = False,
) -> str:
    """`halo`: in front of lines, with a rim of the background's colour."""
    rim = ' paint-order="stroke" stroke="var(--card)" stroke-width="5" stroke-linejoin="round"'
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}"'
        f' font-weight="{weight}" fill="var(--{fill})"{rim if halo else ""}>{escape(words)}</text>'
    )


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    stroke: str = "line",
    width: float = 1,
    dash: str = "",
) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        f' stroke="var(--{stroke})" stroke-width="{width:g}"{dashes}/>'
    )


def path(
    points: Sequence[tuple[float, float]], stroke: str, width: float, opacity: float = 1
) -> str:
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return (
        f'<path d="{d}" fill="none" stroke="var(--{stroke})" stroke-width="{width:g}"'
        f' stroke-opacity="{opacity:g}" stroke-linejoin="round" stroke-linecap="round"/>'
    )


def svg(width: float, height: float, label: str, *parts: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, True)}"'
        f' xmlns="http://www.w3.org/2000/svg" style="{FONT}">{"".join(parts)}</svg>'
    )


def standalone(chart: str) -> str:
    """The same as a file of its own, in light and in dark."""
    start, _, rest = chart.partition(">")
    return f"{start}><style>{COLOURS}</style>{rest}\n"


# --- the slider's curve ---------------------------------------------------------------------------


def curve(
    strengths: Sequence[float],
    rows: Sequence[Sequence[float]],  # thickness [R][S]
    mean: Sequence[float],
    accuracy: Sequence[float],
    pair: tuple[float, float],  # what the pairs were drawn with
    gutter: float = 92,
    column: float = 100,
) -> str:
    """Stroke thickness over strength: every row thin, the mean strong, the judge's accuracy below.

    Columns are as wide as a strip's tiles and stand below them.
    """
    high = math.ceil(max(max(map(max, rows)), pair[1]) + 0.2)
    top, bottom = 48.0, 308.0
    width, height = gutter + column * len(strengths), bottom + 66

    def x(i: float) -> float:
        return gutter + column * (i + 0.5)

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / high

    title = f"stroke width in pixels: every row, and the mean of all {len(rows)}"
    parts = []
    for value in range(high + 1):
        parts += [
            line(gutter, y(value), width, y(value)),
            text(gutter - 12, y(value) + 4, f"{value}", "end"),
        ]
    parts.append(text(gutter, 22, title, "start", 14, "ink", 600))
    for value, name in zip(pair, ("thin pictures of the pairs", "thick pictures"), strict=True):
        parts.append(line(gutter, y(value), width, y(value), "muted", 1.2, "2 5"))
        at = (width - 6, "end") if value == pair[0] else (gutter + 6, "start")
        parts.append(text(at[0], y(value) - 6, f"{name}, {value:g}", at[1], 12, halo=True))
    for row in rows:
        parts.append(path([(x(i), y(v)) for i, v in enumerate(row)], "accent", 1.2, 0.28))
    parts.append(path([(x(i), y(v)) for i, v in enumerate(mean)], "accent", 3.5))
    for i, (strength, value, share) in enumerate(zip(strengths, mean, accuracy, strict=True)):
        parts.append(f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="5" fill="var(--accent)"/>')
        up = i < len(strengths) / 2
        parts.append(
            text(
                x(i),
                y(value) + (-13 if up else 24),
                f"{value:.2f}",
                size=14,
                fill="ink",
                weight=650,
                halo=True,
            )
        )
        parts.append(text(x(i), bottom + 24, signed(strength), size=14, fill="ink", weight=600))
        parts.append(
            text(
                x(i), bottom + 50, f"{share:.0%}", size=13, fill="good" if share > 0.9 else "accent"
            )
        )
    parts.append(text(gutter - 12, bottom + 24, "strength", "end", 13))
    parts.append(text(gutter - 12, bottom + 50, "digit kept", "end", 13))
    return svg(width, height, "Stroke thickness against the slider's strength", *parts)


# --- speed ----------------------------------------------------------------------------------------


def bars(rows: Sequence[tuple[str, float | None, str, bool]]) -> str:
    """Horizontal bars of (name, ratio or None, label, ours) on one scale from zero."""
    gutter, width, step = 150.0, 480.0, 30.0
    room = width - gutter - 122
    longest = max((ratio for _, ratio, _, _ in rows if ratio is not None), default=1.0)
    parts = []
    for i, (name, ratio, label, ours) in enumerate(rows):
        y = i * step
        parts.append(text(gutter - 12, y + 19, name, "end", 14, "ink", 650 if ours else 400))
        if ratio is None:
            parts.append(text(gutter + 2, y + 19, "not installed", "start", 13))
            continue
        length = max(3.0, room * ratio / longest)
        fill = "accent" if ours else "bar"
        parts.append(
            f'<rect x="{gutter:g}" y="{y + 5:g}" width="{length:.1f}" height="{step - 11:g}" rx="4"'
            f' fill="var(--{fill})"/>'
        )
        parts.append(
            text(gutter + length + 9, y + 19, label, "start", 13, "ink", 650 if ours else 400)
        )
    return svg(width, step * len(rows), "Times, shorter is faster", *parts)


# --- verification ---------------------------------------------------------------------------------


def histogram(shares: Sequence[float], bins: int = 50) -> str:
    """How many comparisons used which share of the allowed error; 1 is the limit."""
    width, left, right, top, floor = 1000.0, 12.0, 988.0, 26.0, 130.0
    shares = [min(share, 3.0) for share in shares]  # how far beyond is in the table
    end = max(1.1, math.ceil(10 * max(shares)) / 10 + 0.1)
    counts = [0] * bins
    for share in shares:
        counts[min(bins - 1, int(bins * share / end))] += 1
    step = (right - left) / bins

    def x(share: float) -> float:
        return left + (right - left) * share / end

    parts = []
    for i, count in enumerate(counts):
        if count:
            height = max(2.0, (floor - top) * count / max(counts))
            fill = "good" if (i + 0.5) * end / bins <= 1 else "accent"
            parts.append(
                f'<rect x="{left + i * step + 1:.1f}" y="{floor - height:.1f}" rx="2"'
                f' width="{step - 2:.1f}" height="{height:.1f}" fill="var(--{fill})"/>'
            )
    parts.append(line(left, floor, right, floor))
    parts.append(line(x(1), top - 8, x(1), floor, "ink", 1.5, "3 3"))
    parts.append(text(x(1), top - 13, "the limit", "middle", 13, "ink", 600))
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(text(x(tick), floor + 19, f"{tick:g}"))
    return svg(width, floor + 26, "Shares of the allowed error that were used up", *parts)
