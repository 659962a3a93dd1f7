"""What loading a file did: the file's keys that were applied, those that were not, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fastlora.adapters.specs import AdapterError, AdapterInfo


class Applied(NamedTuple):
    """One layer that a file has changed."""

    component: str  # of a pipeline; "": the model
    module: str  # path in it
    kind: str  # "lora", "loha", "full", ...
    rank: int | None
    ratio: float  # the factor on the update at strength 1: alpha / rank
    keys: tuple[str, ...]  # of the file

    def __str__(self) -> str:
        return ".".join(filter(None, (self.component, self.module)))


@dataclass(frozen=True)
class LoadReport:
    """One file on one model or pipeline. `str(report)` is a table."""

    path: str
    format: str
    name: str
    applied: tuple[Applied, ...]
    unused: Mapping[str, str] = field(default_factory=dict)  # keys of the file, and why
    missing: tuple[str, ...] = ()  # modules that the file is for and the model does not have
    adapters: Mapping[str, AdapterInfo] = field(default_factory=dict)  # by component

    @property
    def adapter(self) -> AdapterInfo:
        """What `fastlora.adapters` says of the one model that was loaded into. Raises AdapterError
        where there are several: `adapters` has them by component."""
        if len(self.adapters) != 1:
            raise AdapterError(
                f"adapter: expected one model, got {', '.join(self.adapters)}: see "
                f"report.adapters[{next(iter(self.adapters), '')!r}]"
            )
        (info,) = self.adapters.values()
        return info

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(map(str, self.applied))

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for a in self.applied:
            rank = "" if a.rank is None else str(a.rank)
            row = (a.component or "the model", a.kind, rank, f"{a.ratio:g}")
            groups.setdefault(row, []).append(a.module)
        rows = [("part", "kind", "rank", "scale", "layers", "for example")]
        rows += [(*row, str(len(paths)), paths[0]) for row, paths in groups.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [f"{self.path}: {self.format}, loaded as {self.name!r}"]
        lines += [
            "  " + "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[5]])
            for row in rows
        ]
        lines += listed("not in the model", dict.fromkeys(self.missing, ""))
        lines += listed("keys not used", self.unused)
        return "\n".join(lines)


def listed(title: str, reasons: Mapping[str, str], most: int = 10) -> list[str]:
    """Lines about names and reasons: at most so many of them."""
    if not reasons:
        return []
    lines = [f"{title}: {len(reasons)}"]
    for name, reason in list(reasons.items())[:most]:
        lines.append(f"  {name}: {reason}" if reason else f"  {name}")
    if len(reasons) > most:
        lines.append(f"  and {len(reasons) - most} more")
    return lines
