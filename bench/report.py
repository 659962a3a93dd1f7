"""Reports of pytest-benchmark as tables that a person reads, as text or as Markdown.

Works on the JSON; knows nothing of torch. What counts are ratios within one run.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bench.rows import Items
from bench.shapes import MODELS, NAMES, counts
from bench.targets import CPU, CPU_FLOOR, FORWARD, layers, mean, rows

WIDE_SPREAD = 0.10  # of a ratio's quartiles: something else was running
FORMS = ("products", "tiled", "extended", "appended")
PEERS = ("addmm", "torch", "peft", "peft + compile", "diffusers", "peft, numbers only",
         "peft, as set_adapters", "u @ diag(s) @ vh", "W' then linear")  # fmt: skip
VERDICTS = {True: "met", False: "MISSED", None: ""}


@dataclass
class Table:
    title: str
    header: list[str]
    lines: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def tables(report: dict[str, Any]) -> list[Table]:
    """All of a report: layers, other jobs, where peers win, targets."""
    items, machine = report["benchmarks"], report.get("machine_info", {})
    if not items:
        return []
    found = [*layer_tables(items), others(items, machine), peers_that_win(items), targets(report)]
    return [t for t in found if t.lines]


def text(found: Iterable[Table]) -> str:
    return "\n".join(line for t in found for line in as_text(t))


def as_text(t: Table) -> list[str]:
    widths = [max(map(len, column)) for column in zip(t.header, *t.lines, strict=True)]
    left = {0} if t.header[-1] != "note" else {0, len(t.header) - 1}

    def shown(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  " + "  ".join(padded).rstrip()

    return ["", t.title, shown(t.header), *map(shown, t.lines), *(f"  {n}" for n in t.notes)]


def markdown(found: Iterable[Table]) -> str:
    return "\n".join(line for t in found for line in as_markdown(t))


def as_markdown(t: Table) -> list[str]:
    def shown(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.strip() for cell in cells)} |"

    def group(cells: list[str]) -> list[str]:
        """The name of a group stands alone in its line."""
        return cells if any(cells[1:]) else [f"**{cells[0]}**", *cells[1:]]

    under = ["---"] + ["---" if title == "note" else "---:" for title in t.header[1:]]
    notes = [line for note in t.notes for line in ("", note)]
    lines = [shown(group(line)) for line in t.lines]
    return [f"## {t.title}", "", shown(t.header), shown(under), *lines, *notes, ""]


# --- layers ---------------------------------------------------------------------------------------


def layer_tables(items: Items) -> list[Table]:
    kinds = dict.fromkeys(
        (i["extra_info"]["rank"], i["extra_info"]["dtype"], i["extra_info"]["device"])
        for i in items
        if "layer" in i["extra_info"]
    )
    return [layer_table(items, *kind) for kind in kinds]


def layer_table(items: Items, rank: int, dtype: str, device: str) -> Table:
    """Ratios to the plain layer, a layer a line and a contender a column; then the means."""
    names = list(dict.fromkeys(i["params"]["contender"] for i in items if "layer" in i["extra_info"]
                               and i["extra_info"]["rank"] == rank))  # fmt: skip
    peers = [n for n in names if n != "floor"]
    found = {name: layers(items, name, rank, dtype) for name in names}
    floors = {
        tuple(i["extra_info"]["layer"]): i["stats"]
        for i in items
        if "layer" in i["extra_info"]
        and i["params"]["contender"] == "floor"
        and i["extra_info"]["rank"] == rank
    }
    chosen = [m for m in MODELS if any(m in e["counts"] for e in found["floor"].values())]
    calls: dict[Any, dict[str, int]] = counts(chosen)
    how = "median of rounds in turns ± half the distance of their quartiles"
    how = f"one CUDA graph of layers with cold weights, {how}" if device == "cuda" else how
    stacked = ", 8 stacked adapters" if rank == 128 else ""
    t = Table(
        f"lora_linear r={rank}{stacked}, {dtype}, time over F.linear's ({how})",
        ["tokens x in x out", "calls", "F.linear", *peers],
    )
    for shape, stats in floors.items():
        cells = [ratio_of(found[name].get(shape)) for name in peers]
        often = str(sum(calls[shape].values()))
        t.lines.append(["x".join(map(str, shape)), often, duration(stats["median"]), *cells])
    titles = {model: name for name, model in NAMES.items()}
    for models in [[m] for m in chosen] + ([chosen] if len(chosen) > 1 else []):
        which = " + ".join(titles[m] for m in models)
        for label, key in (("mean", "over_floor"), ("fastest rounds", "fastest")):
            cells = [mean_of(found[name], models, key) for name in peers]
            t.lines.append([f"{label}, {which}", "", "", *cells])
    slowed = [stats["median"] / stats["min"] for stats in floors.values()]
    t.notes = layer_notes(found, rank, device, slowed)
    return t


def mean_of(layers_of: dict[Any, Any], models: list[str], key: str) -> str:
    value, missing = mean({s: e[key] for s, e in layers_of.items() if key in e}, models)
    return "" if value is None or missing else f"{value:.3f}"


def layer_notes(found: dict[str, Any], rank: int, device: str, slowed: list[float]) -> list[str]:
    notes = ["Means are geometric, weighted by how often a pass of the model calls the layer."]
    if device == "cpu" and rank == 16:
        notes.append(f"Target for fastlora: {CPU} over SD 1.5; FLOP floor {CPU_FLOOR}.")
    elif device == "cuda":
        notes.append("Target for fastlora over all three: {}; roofline {}.".format(*FORWARD[rank]))
        ratios: dict[Any, list[float]] = {}
        for form in FORMS:
            for shape, extra in found.get(form, {}).items():
                ratios.setdefault(shape, []).extend(r for r in [extra.get("over_floor")] if r)
        best = {shape: min(rs) for shape, rs in ratios.items() if rs}
        value, missing = mean(best, MODELS)
        if value is not None and not missing:
            notes.append(f"With the fastest form of the operator for every layer: {value:.3f}.")
    reasons = {e["why"] for extras in found.values() for e in extras.values() if e.get("why")}
    notes += [f"Not captured: {reason}" for reason in sorted(reasons)]
    ours = [e for e in found.get("fastlora", {}).values() if "high" in e]
    noisy = sum(e["high"] - e["low"] > 2 * WIDE_SPREAD for e in ours)
    noisy = max(noisy, sum(slow > (1 + 2 * WIDE_SPREAD) for slow in slowed))
    if noisy:
        notes.append(
            f"On {noisy} of {len(ours)} layers fastlora's ratio or F.linear itself varies by more "
            f"than ±{WIDE_SPREAD:.2f}: something else was running, and the medians say little."
        )
    return notes


def ratio_of(extra: dict[str, Any] | None) -> str:
    if extra is None or "over_floor" not in extra:
        return ""
    return f"{extra['over_floor']:.2f} ±{(extra['high'] - extra['low']) / 2:.2f}"


# --- everything else ------------------------------------------------------------------------------


def others(items: Items, machine: dict[str, Any]) -> Table:
    """Group by group: what a call takes, and fastlora's time over it."""
    gpu = "gpu" in machine
    t = Table("Other jobs", ["", *(["in a graph", "eager"] if gpu else []), "fastest", "median",
                             "fastlora / it", "note"])  # fmt: skip
    empty = [""] * (len(t.header) - 1)
    for group, contenders in grouped(i for i in items if "layer" not in i["extra_info"]).items():
        t.lines.append([group, *empty])
        ours = contenders.get("fastlora")
        for name, item in contenders.items():
            extra = item["extra_info"]
            device = [micro(extra.get("captured")), micro(extra.get("eager"))] if gpu else []
            clock = [duration(host(item, which)) for which in ("min", "median")]
            ratio = "" if ours is None or item is ours else f"{between(ours, item):.2f}"
            t.lines.append([f"  {name}", *device, *clock, ratio, remark(item, machine)])
    if t.lines:
        clocks = "graphs, else eager, else fastest by the host's clock" if gpu else "fastest times"
        t.notes = [f"Ratios: of rounds in turns, else {clocks}."]
    return t


def grouped(items: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for item in items:
        groups.setdefault(item["group"], {})[item["params"]["contender"]] = item
    return groups


def host(item: dict[str, Any], which: str = "min") -> float:
    """Seconds of a call by the host's clock."""
    return item["stats"][which] / item["extra_info"].get("calls", 1)


def between(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Our time over theirs, by the best clock that both have."""
    a, b = ours["extra_info"], theirs["extra_info"]
    if "over_floor" in a and "over_floor" in b:
        return a["over_floor"] / b["over_floor"]
    for key in ("captured", "eager"):
        if a.get(key) and b.get(key):
            return a[key] / b[key]
    return host(ours) / host(theirs)


def remark(item: dict[str, Any], machine: dict[str, Any]) -> str:
    """Rates of products, and the time that the machine's ceilings allow."""
    extra = item["extra_info"]
    if extra.get("gemm") and extra.get("captured"):
        rate = f"{extra['operations'] / extra['captured'] * 1e-6:.0f} TFLOPS"
        if "over_floor" not in extra or item["params"]["contender"] == "floor":
            return rate
        return f"{rate}, {100 / extra['over_floor']:.0f} % of cuBLAS"
    limit = machine.get("ceilings", {})
    dtype = "bfloat16" if "bfloat16" in item["group"] else "float32"
    floors = [
        extra[what] / limit[by] * 1e6
        for what, by in (("bytes", "bytes"), ("operations", dtype))
        if extra.get(what) and limit.get(by)
    ]
    why = f"; {extra['why']}" if extra.get("why") else ""
    return (f"at least {micro(max(floors))}" if floors else "") + why


def peers_that_win(items: Items) -> Table:
    """Where somebody else is faster; floors are no contest. Layers of one rank share a line."""
    t = Table("Where a peer is faster than fastlora", ["", "peer", "at most", "note"])
    kinds: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for group, contenders in grouped(items).items():
        ours = contenders.get("fastlora")
        for name in PEERS:
            if ours is not None and name in contenders:
                extra = ours["extra_info"]
                kind = f"lora_linear r={extra['rank']}" if "layer" in extra else group
                case = "x".join(map(str, extra.get("layer", [])))
                kinds.setdefault((kind, name), []).append((between(ours, contenders[name]), case))
    for (kind, name), ratios in kinds.items():
        wins = sorted(r for r in ratios if r[0] > 1.005)
        if wins:
            worst, case = wins[-1]
            note = f"on {len(wins)} of {len(ratios)} layers, most on {case}" if case else ""
            t.lines.append([kind, name, f"{worst:.2f}x", note])
    return t


def targets(report: dict[str, Any]) -> Table:
    found, machine = rows(report), report.get("machine_info", {})
    load, cores = machine.get("load", 0.0), machine.get("cores", 1)
    busy = load > cores / 2
    t = Table("Targets", ["measure", "target", "measured", "", "note"])
    for r in found:
        verdict = VERDICTS[r.met] + " (busy)" * (busy and r.met is False)
        t.lines.append([r.measure, r.target, r.measured, verdict, r.note])
    met, missed = (sum(r.met is v for r in found) for v in (True, False))
    t.notes = [f"{met} met, {missed} missed, {len(found) - met - missed} not measured here."]
    if busy:
        t.notes.append(
            f"The machine was busy before it began (load {load:.1f}, {cores} cores): times by the "
            "host's clock may be those of something else."
        )
    return t


# --- units ----------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    return micro(seconds * 1e6)


def micro(value: float | None) -> str:
    """Microseconds, three digits of them."""
    if value is None:
        return ""
    unit, scaled = ("s", value / 1e6) if value >= 1e6 else ("ms", value / 1e3)
    if value < 1e3:
        unit, scaled = "µs", value
    digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {unit}"
