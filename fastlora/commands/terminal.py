"""What the file commands share: lines for people, JSON, a progress bar, checks of outputs."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def say_json(report: Any) -> None:
    """JSON as the standard has it, without NaN and infinity."""
    print(json.dumps(_finite(report), indent=2))


def width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return max(shutil.get_terminal_size().columns, 40)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """A bar on stderr for what takes longer than a second, if stderr is a terminal."""
    from tqdm import tqdm

    return tqdm(
        items, desc=description, total=total, delay=1, disable=None, leave=False, file=sys.stderr
    )


def prints(text: str) -> bool:
    """Whether stdout's encoding has these characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def bar(share: float, columns: int) -> str:
    """A bar of `share` (0 to 1) of the columns, in eighths of one where the encoding has them."""
    if not prints(_EIGHTHS):
        return "#" * round(share * columns)
    eighths = round(share * columns * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines with the columns aligned, those of `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(n) if i in right else cell.ljust(n)
            for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def clean(text: str) -> str:
    """One line that stdout can print and that does not steer a terminal: a file's text may be
    anything."""
    words = " ".join(text.split())
    return "".join(
        c if c.isprintable() and prints(c) else c.encode("unicode_escape").decode() for c in words
    )


def shortened(text: str, columns: int) -> str:
    """At most so many columns; says how long the text was."""
    if len(text) <= columns:
        return text
    note = f"... ({len(text):,} characters)"
    return text[: max(columns - len(note), 0)] + note


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def number(value: float | None) -> str:
    """Four digits of a number."""
    return "-" if value is None else f"{value:.4g}"


def aligned(value: float) -> str:
    """Four digits, zeros at the end too."""
    return f"{value:#.4g}"


def percent(value: float) -> str:
    """Two digits, however small, and all those before the point."""
    share = 100 * value
    return f"{share:.0f} %" if 99.5 <= abs(share) < 1e6 else f"{share:.2g} %"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
