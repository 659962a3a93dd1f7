"""A row of the table of targets, how its numbers are shown, and picking what it is made of."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Items = list[dict[str, Any]]
WITHOUT_GPU = "needs a run without a GPU"


@dataclass(frozen=True)
class Row:
    measure: str
    target: str
    measured: str
    met: bool | None  # None: not measured, or not all of it
    note: str = ""


def row(
    measure: str,
    sign: str,
    target: float,
    value: float | None,
    possible: bool,
    show: Callable[[float], str],
    note: str = "",
    complete: bool = True,
    needs: str = "needs a GPU",
) -> Row:
    """`possible`: this run could have measured it; otherwise it `needs` another."""
    wanted = f"{sign} {show(target)}"
    if value is None:
        return Row(measure, wanted, "not run" if possible else needs, None)
    met = value <= target if sign == "<=" else value >= target
    return Row(measure, wanted, show(value), met if complete else None, note)


def times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def exact_times(value: float) -> str:
    return f"{value:.3f}x"


def microseconds(value: float) -> str:
    return f"{value:.1f} µs" if value < 100 else f"{value:,.0f} µs"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


# --- picking --------------------------------------------------------------------------------------


def first(values: Iterable[float | None]) -> float | None:
    return next((v for v in values if v is not None), None)


def of_device(items: Items, device: str) -> Items:
    return [i for i in items if i["extra_info"].get("device") == device]


def named(items: Items, group: str, contender: str) -> Items:
    return [
        i for i in items
        if i["group"].startswith(group) and i["params"]["contender"] == contender
    ]  # fmt: skip
