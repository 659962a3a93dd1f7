"""What fastlora sets out to reach, row by row, beside what a run has measured.

Works on the benchmarks of pytest-benchmark's JSON reports; knows nothing of torch.
"""

from collections.abc import Iterable
from typing import Any

from bench import targets_files, targets_pipelines
from bench.rows import (
    WITHOUT_GPU,
    Items,
    Row,
    exact_times,
    first,
    microseconds,
    named,
    of_device,
    percent,
    row,
    times,
)
from bench.shapes import MODELS, counts, geometric_mean

# Over the plain layers, by rank: the target, and what the roofline of the best form allows.
FORWARD = {16: (1.10, 1.048), 64: (1.20, 1.106), 128: (1.35, 1.159)}
CPU, CPU_FLOOR = 1.07, 1.053
PEFT, COMPILED = 2.5, 1.05
# The share of the library's rate that the main loop is to reach, by compute capability.
LOOP = {80: 0.90, 90: 0.55}
GEMM = [4096, 4096, 4096]
# A sampler step with guidance: against diffusers by shape, over a copy of its bytes, of bandwidth.
STEPS = {"1x4x64x64": 10.0, "4x4x128x128": 5.0}
SOLVERS = {"DDIM": "epsilon eta=0", "2M": "2M"}
COPIED, LARGE = 1.5, "16x4x128x128"
BANDWIDTH, HUGE = 0.85, "64x16x128x128"
# W' of every layer of SD 1.5: of the library's matrix rate; against torch's loop over the layers,
# eager and captured, and the reference repositories'. Single layers on the CPU, over torch's way.
MATRIX_RATE = 0.60
RECONSTRUCTIONS = [("addmm", "eager", 1.2), ("addmm", "captured", 0.9),
                   ("u @ diag(s) @ vh", "eager", 3.0)]  # fmt: skip
SINGLE = 1.05


def rows(report: dict[str, Any]) -> list[Row]:
    """Every row of the table of targets for a report of pytest-benchmark."""
    items, machine = report["benchmarks"], report.get("machine_info", {})
    on_gpu, on_cpu = of_device(items, "cuda"), of_device(items, "cpu")
    gpu = "gpu" in machine
    found = [forward(on_gpu, rank, gpu) for rank in FORWARD]
    found += [against_peft(on_gpu, gpu), against_compiled(on_gpu, gpu)]
    for form, name, most in (("appended", "F2", 5.0), ("extended", "F1", 8.0)):
        value = first(i["extra_info"].get("host") for i in named(on_gpu, "lora_linear call", form))
        found.append(
            row(f"eager call, {name} ({form}), host time", "<=", most, value, gpu, microseconds)
        )
    found.append(loop(on_gpu, machine, gpu))
    found += folding(on_gpu, machine, gpu)
    found += [*spectral(on_gpu, machine, gpu), cpu_spectral(on_cpu, gpu)]
    strengths = [i for i in items if i["extra_info"].get("strengths")]
    value = first(i["extra_info"].get("host") for i in named(strengths, "set_scale", "fastlora"))
    where = "" if gpu else ", on the CPU"
    found.append(
        row(f"new strengths of 3 adapters, SDXL-shaped{where}", "<=", 50.0, value, True,
            microseconds, "that nothing waits for the device: tests/gpu")
    )  # fmt: skip
    found.append(cpu_forward(on_cpu, gpu))
    found += stepping(on_cpu, on_gpu, gpu)
    found += targets_files.rows(on_cpu, gpu)
    return found + targets_pipelines.rows(on_cpu, on_gpu, gpu)


def some(missing: int) -> str:
    return f"{missing} layers missing" if missing else ""


def joined(notes: Iterable[str]) -> str:
    return ", ".join(note for note in notes if note)


def forward(items: Items, rank: int, gpu: bool) -> Row:
    target, roofline = FORWARD[rank]
    value, missing = mean_over_floor(items, "fastlora", rank, "bfloat16", MODELS)
    notes = [f"roofline {roofline}", some(missing)]
    stacked = " (8 stacked)" if rank == 128 else ""
    return row(f"forward r={rank}{stacked}, bf16, CUDA graph, over F.linear", "<=", target, value,
               gpu, exact_times, joined(notes), not missing)  # fmt: skip


def cpu_forward(items: Items, gpu: bool) -> Row:
    value, missing = mean_over_floor(items, "fastlora", 16, "float32", MODELS[:1])
    fastest, _ = mean_over_floor(items, "fastlora", 16, "float32", MODELS[:1], "fastest")
    measure = "forward r=16, fp32, CPU, SD 1.5, over F.linear"
    torch, _ = mean_over_floor(items, "addmm", 16, "float32", MODELS[:1])
    notes = [
        "" if fastest is None else f"fastest rounds {exact_times(fastest)}",
        "" if torch is None else f"addmm_ {exact_times(torch)}",
        f"FLOP floor {CPU_FLOOR}",
        some(missing),
    ]
    return row(measure, "<=", CPU, value, not gpu, exact_times, joined(notes), not missing,
               WITHOUT_GPU)  # fmt: skip


def against_peft(items: Items, gpu: bool) -> Row:
    value, missing = mean_between(items, "peft", "eager", 16, MODELS)
    return row("layer r=16 against PEFT, both eager", ">=", PEFT, value, gpu, times,
               some(missing), not missing)  # fmt: skip


def against_compiled(items: Items, gpu: bool) -> Row:
    value, missing = mean_between(items, "peft + compile", "captured", 16, MODELS)
    return row("layer r=16 against PEFT + torch.compile, both in a CUDA graph", ">=", COMPILED,
               value, gpu, times, some(missing), not missing)  # fmt: skip


def loop(items: Items, machine: dict[str, Any], gpu: bool) -> Row:
    found = [
        i for i in items
        if i["extra_info"].get("gemm") == GEMM and i["extra_info"]["dtype"] == "bfloat16"
    ]  # fmt: skip
    ours = first(i["extra_info"].get("over_floor") for i in named(found, "gemm", "fastlora"))
    share = None if not ours else 1 / ours
    measure = "main loop alone, 4096^3 bf16, of cuBLAS's rate"
    capability = machine.get("capability")
    if gpu and capability not in LOOP:
        shown = "not run" if share is None else percent(share)
        return Row(measure, "none for this GPU", shown, None)
    return row(measure, ">=", LOOP.get(capability or 90, 0), share, gpu, percent)


def folding(items: Items, machine: dict[str, Any], gpu: bool) -> list[Row]:
    """In microseconds of a graph beside bytes over copy bandwidth; in wall time beside PEFT."""
    found = {i["params"]["contender"]: i for i in items if i["extra_info"].get("fold") == "SD 1.5"}
    bandwidth = machine.get("ceilings", {}).get("bytes")
    over = faster = floor = None
    if "fastlora" in found:
        ours = found["fastlora"]["extra_info"]
        if bandwidth and ours.get("captured"):
            floor = ours["bytes"] / bandwidth * 1e6
            over = ours["captured"] / floor
        if "peft" in found:
            faster = found["peft"]["stats"]["median"] / found["fastlora"]["stats"]["median"]
    note = "" if floor is None else f"{floor / 1e3:.2f} ms"
    return [
        row("fold of SD 1.5, bf16, over copy bandwidth", "<=", 1.3, over, gpu, times, note),
        row("fold of SD 1.5, bf16, against PEFT's merge", ">=", 50.0, faster, gpu, times),
    ]


def spectral(items: Items, machine: dict[str, Any], gpu: bool) -> list[Row]:
    """In microseconds, of a graph and of eager calls one behind another."""
    group = "spectral_weights SD 1.5"
    found = {
        i["params"]["contender"]: i["extra_info"] for i in items if i["group"].startswith(group)
    }
    ours, rate = found.get("fastlora", {}), machine.get("ceilings", {}).get("bfloat16")
    share, note = None, ""
    if rate and ours.get("captured"):
        floor = ours["operations"] / rate * 1e6
        share, note = floor / ours["captured"], f"{floor / 1e3:.2f} ms"
    rows_of = [
        row("spectral weights of SD 1.5, bf16, of the matrix rate", ">=", MATRIX_RATE, share, gpu,
            percent, note)
    ]  # fmt: skip
    for peer, clock, target in RECONSTRUCTIONS:
        theirs = found.get(peer, {}).get(clock)
        value = theirs / ours[clock] if theirs and ours.get(clock) else None
        measure = f"spectral weights of SD 1.5, bf16, against {peer}, both {clock}"
        rows_of.append(row(measure, ">=", target, value, gpu, times))
    return rows_of


def cpu_spectral(items: Items, gpu: bool) -> Row:
    """Geometric mean over single layers."""
    found: dict[str, dict[str, float]] = {}
    for i in items:
        if i["group"].startswith("spectral_weight ") and "over_floor" in i["extra_info"]:
            ratio = i["extra_info"]["over_floor"]
            found.setdefault(i["group"], {})[i["params"]["contender"]] = ratio
    ratios = [r["fastlora"] / r["addmm"] for r in found.values() if {"fastlora", "addmm"} <= set(r)]
    measure = "spectral weight, fp32, CPU, over torch's addmm"
    value = geometric_mean((1, r) for r in ratios) if ratios else None
    note = f"at most {times(max(ratios))}, of {len(ratios)} sizes" if ratios else ""
    return row(measure, "<=", SINGLE, value, not gpu, times, note, needs=WITHOUT_GPU)


def stepping(on_cpu: Items, on_gpu: Items, gpu: bool) -> list[Row]:
    """Medians of one run: `sampler_step` beside diffusers, and beside copying the same bytes."""

    def ratio(items: Items, group: str, over: str, clock: str | None = None) -> float | None:
        """How often longer `over` takes than fastlora."""

        def taken(contender: str) -> float | None:
            found = named(items, f"sampler_step {group}", contender)
            return first(
                i["extra_info"].get(clock) if clock else i["stats"]["median"] for i in found
            )

        ours, other = taken("fastlora"), taken(over)
        return other / ours if ours and other else None

    found = [
        row(f"CFG + {solver} step, {shape}, CPU, against diffusers", ">=", target,
            ratio(on_cpu, f"{shape} {group}", "diffusers"), not gpu, times, needs=WITHOUT_GPU)
        for solver, group in SOLVERS.items()
        for shape, target in STEPS.items()
    ]  # fmt: skip
    copy = ratio(on_cpu, f"{LARGE} epsilon eta=0", "floor")
    found.append(
        row(f"CFG + DDIM step, {LARGE}, CPU, over a copy of its bytes", "<=", COPIED,
            None if copy is None else 1 / copy, not gpu, times, needs=WITHOUT_GPU)
    )  # fmt: skip
    share = ratio(on_gpu, f"{HUGE} epsilon eta=0", "floor", "captured")
    found.append(
        row(f"CFG + DDIM step, {HUGE}, of copy bandwidth", ">=", BANDWIDTH, share, gpu, percent)
    )
    return found


# --- averaging layers -----------------------------------------------------------------------------


def layers(items: Items, contender: str, rank: int, dtype: str) -> dict[tuple[int, ...], Any]:
    """`extra_info` of a contender's layers by (tokens, in, out)."""
    return {
        tuple(i["extra_info"]["layer"]): i["extra_info"]
        for i in items
        if "layer" in i["extra_info"]
        and i["params"]["contender"] == contender
        and i["extra_info"]["rank"] == rank
        and i["extra_info"]["dtype"] == dtype
    }


def mean(ratios: dict[tuple[int, ...], float], models: Iterable[str]) -> tuple[float | None, int]:
    """Geometric mean over the layers of models, weighted by count, and how many are missing."""
    shapes: dict[Any, dict[str, int]] = counts(models)
    pairs = [(sum(shapes[s].values()), ratio) for s, ratio in ratios.items() if s in shapes]
    return geometric_mean(pairs) if pairs else None, len(shapes) - len(pairs)


def mean_over_floor(
    items: Items,
    contender: str,
    rank: int,
    dtype: str,
    models: Iterable[str],
    key: str = "over_floor",
) -> tuple[float | None, int]:
    found = layers(items, contender, rank, dtype)
    return mean({s: e[key] for s, e in found.items() if key in e}, models)


def mean_between(
    items: Items, peer: str, key: str, rank: int, models: Iterable[str]
) -> tuple[float | None, int]:
    """How many times as long as fastlora a peer takes."""
    ours, theirs = (layers(items, c, rank, "bfloat16") for c in ("fastlora", peer))
    both = {s for s in ours.keys() & theirs.keys() if ours[s].get(key) and theirs[s].get(key)}
    return mean({s: theirs[s][key] / ours[s][key] for s in both}, models)
