"""The report of `fastlora inspect` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastlora.commands.terminal import (
    aligned,
    bar,
    clean,
    number,
    plural,
    shortened,
    size,
    table,
    width,
)

MOST_SETTINGS = 8  # rows for a part; trained ranks differ in few ways, extracted ones in many
MOST_UNUSED = 10
WIDEST_BAR = 60


def lines(report: Mapping[str, Any], all_metadata: bool) -> list[str]:
    said = [*summary(report), "", *settings(report["parts"])]
    if "blocks" in report:
        said += ["", *picture(report["blocks"])]
    if report["unused"]:
        said += ["", *unused(report["unused"])]
    if report["metadata"]:
        said += ["", *metadata(report["metadata"], all_metadata)]
    return said


def summary(report: Mapping[str, Any]) -> list[str]:
    base, dtypes = report["base"], report["dtypes"]
    encoders = [f"{part or 'text encoder'} {name}" for part, name in base["text_encoders"].items()]
    reasons = "; ".join([base["reason"], *encoders])
    modules = sum(part["modules"] for part in report["parts"])
    most = max(dtypes, key=dtypes.get, default="no tensors")
    others = [f"{name} ({count})" for name, count in dtypes.items() if name != most]
    count = len(report["unused"])
    keys = plural(count, "unused key") if count else "every key is used"
    rows = [
        ("format", report["format"]),
        ("base", clean(f"{base['name'] or 'unknown'}: {reasons}")),
        ("size", f"{size(report['bytes'])}, {report['parameters']:,} parameters"),
        ("dtype", ", ".join([most, *others])),
        ("modules", f"{modules:,}, {keys}"),
    ]
    return [clean(report["file"]), *("  " + line for line in table(rows))]


def settings(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [("part", "modules", "kind", "rank", "alpha", "scale")]
    for part in parts:
        name, found = part["part"] or "(the model)", part["settings"]
        for row in found[:MOST_SETTINGS]:
            figures = (number(row[key]) for key in ("rank", "alpha", "ratio"))
            rows.append((name, f"{row['modules']:,}", row["kind"], *figures))
            name = ""
        if rest := found[MOST_SETTINGS:]:
            count = sum(row["modules"] for row in rest)
            rows.append(("", f"{count:,}", f"{len(rest)} more settings: --json", "", "", ""))
    return ["  " + line for line in table(rows, right=(1, 3, 4, 5))]


def picture(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A bar for each block, all on one scale."""
    largest = max((row["norm"] for row in blocks), default=0.0)
    names = [clean(row["block"]) for row in blocks]
    label = max([len(name) for name in names], default=0)
    columns = min(max(width() - label - 2 * 4 - 9 - 1, 10), WIDEST_BAR)
    said = ["  norms of the updates at strength 1"]
    part = None
    for row, name in zip(blocks, names, strict=True):
        if row["part"] != part:
            part = row["part"]
            said.append(f"  {part or '(the model)'}")
        share = row["norm"] / largest if largest else 0.0
        said.append(
            f"    {name.ljust(label)}  {aligned(row['norm']):>8}  {bar(share, columns)}".rstrip()
        )
    return said


def unused(keys: Mapping[str, str]) -> list[str]:
    """Keys that mean nothing, by the reason why."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in keys.items():
        by_reason.setdefault(reason, []).append(key)
    said = [f"  {plural(len(keys), 'unused key')}"]
    for reason, found in by_reason.items():
        said.append(f"    {clean(reason)}:")
        said += [f"      {clean(key)}" for key in found[:MOST_UNUSED]]
        if len(found) > MOST_UNUSED:
            said.append(f"      and {len(found) - MOST_UNUSED:,} more: --json")
    return said


def metadata(values: Mapping[str, str], in_full: bool) -> list[str]:
    names = {key: clean(key) for key in sorted(values)}
    label = min(max(map(len, names.values())), 32)
    said, is_short = [], False
    for key, name in names.items():
        start, value = f"    {name.ljust(label)}  ", clean(values[key])
        shown = value if in_full else shortened(value, width() - len(start))
        is_short = is_short or shown != value
        said.append(start + shown)
    return ["  metadata" + (" (long values: --metadata)" if is_short else ""), *said]
