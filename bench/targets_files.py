"""Targets of the work with adapter files, all of it on the CPU."""

from typing import Any

from bench.rows import WITHOUT_GPU, Items, Row, first, named, row, times

# Loading: against diffusers; at most so many sizes of the file beyond the model, which is to have
# the adapter's weights once.
LOADING, LOADED = 5.0, 1.0
EXTRACTING = 1.2  # over the singular value decompositions alone
INSPECTING = 1.0  # seconds


def rows(items: Items, gpu: bool) -> list[Row]:
    """`items`: those of a run without a GPU."""
    every: dict[str, Any] = {"possible": not gpu, "needs": WITHOUT_GPU}
    extracted = first(
        i["extra_info"].get("over_floor") for i in named(items, "extract rank 32", "fastlora")
    )
    inspected = median(items, "inspect 1 GB", "fastlora")
    return [
        row("load SDXL r=16, CPU, against diffusers", ">=", LOADING, loading(items), show=times,
            **every),
        row("load SDXL r=16, CPU, peak memory over the model, in file sizes", "<=", LOADED,
            peak(items), show=two_digits, **every),
        row("extract rank 32, CPU, over the SVDs alone", "<=", EXTRACTING, extracted, show=times,
            **every),
        row("inspect of a 1 GB file, CPU", "<=", INSPECTING, inspected, show=seconds, **every),
    ]  # fmt: skip


def loading(items: Items) -> float | None:
    """How many times as long as fastlora diffusers takes."""
    ours, theirs = (median(items, "load SDXL rank 16", c) for c in ("fastlora", "diffusers"))
    return theirs / ours if ours and theirs else None


def peak(items: Items) -> float | None:
    for item in named(items, "load SDXL rank 16", "fastlora"):
        info = item["extra_info"]
        if info.get("peak_bytes") is not None:
            return info["peak_bytes"] / info["file_bytes"]
    return None


def median(items: Items, group: str, contender: str) -> float | None:
    return first(i["stats"]["median"] for i in named(items, group, contender))


def two_digits(value: float) -> str:
    return f"{value:.2f}"


def seconds(value: float) -> str:
    return f"{value:.2f} s"
