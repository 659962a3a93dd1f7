"""Which versions of the host libraries fastlora is tested with: one table, one warning."""

from __future__ import annotations

import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

TESTED = {  # the first and the last minor version
    "diffusers": ("0.42", "0.42"),
    "peft": ("0.21", "0.21"),
    "transformers": ("5.23", "5.23"),
}
_told: set[str] = set()  # what was warned of in this process


def warn_untested(stacklevel: int = 2) -> None:
    """One UserWarning that names the host libraries that are loaded in a version outside of
    `TESTED`, with what was tested and what is there; each library is named once in a process."""
    found = [line for name in TESTED if (line := _untested(name)) is not None]
    if found:
        warnings.warn("fastlora is not tested with " + "; ".join(found), stacklevel=stacklevel + 1)


def _untested(name: str) -> str | None:
    if name in _told or sys.modules.get(name) is None:
        return None
    try:
        got = version(name)
    except PackageNotFoundError:  # loaded from a checkout, say
        got = str(getattr(sys.modules[name], "__version__", "unknown"))
    first, last = TESTED[name]
    if _minor(first) <= _minor(got) <= _minor(last):
        return None
    _told.add(name)
    tested = first if first == last else f"{first} to {last}"
    return f"{name} {got} (tested: {tested})"


def _minor(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
