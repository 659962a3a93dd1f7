"""Targets of whole pipelines of diffusers, and of swaps between two images."""

from __future__ import annotations

from bench.rows import WITHOUT_GPU, Items, Row, first, named, row, times

SLOWER = 1.0  # than PEFT on the CPU: never
UNMERGED, EAGER, COMPILED = 1.05, 2.0, 1.05
SWAP = 5.0  # milliseconds
SIZES = ("SD 1.5", "SDXL")


def rows(on_cpu: Items, on_gpu: Items, gpu: bool) -> list[Row]:
    small = over_peft(on_cpu, "small", "fastlora")
    found = [
        row("small pipeline with a LoRA, CPU, accelerated over PEFT", "<=", SLOWER, small,
            not gpu, times, needs=WITHOUT_GPU)
    ]  # fmt: skip
    for size in SIZES:
        name = f"{size} pipeline, r=16"
        unmerged = ratio(on_gpu, size, "fastlora + compile", "floor + compile")
        eager = ratio(on_gpu, size, "peft", "fastlora + compile")
        compiled = ratio(on_gpu, size, "peft + compile", "fastlora + compile")
        found += [
            row(f"{name}, over no adapter, both compiled", "<=", UNMERGED, unmerged, gpu, times),
            row(f"{name}, against PEFT eager", ">=", EAGER, eager, gpu, times),
            row(f"{name}, against PEFT, both compiled", ">=", COMPILED, compiled, gpu, times),
        ]
    swapped = first(i["stats"]["median"] for i in named(on_gpu, "swap SDXL", "fastlora"))
    swap = None if swapped is None else 1e3 * swapped
    return [*found, row("swap SDXL r=16, same ranks", "<=", SWAP, swap, gpu, milliseconds)]


def over_peft(items: Items, size: str, contender: str) -> float | None:
    """The median of the rounds' ratios."""
    return first(i["extra_info"].get("over_peft") for i in group(items, size, contender))


def ratio(items: Items, size: str, one: str, other: str) -> float | None:
    """Of the medians of two contenders."""
    pair = [first(i["stats"]["median"] for i in group(items, size, c)) for c in (one, other)]
    return pair[0] / pair[1] if pair[0] and pair[1] else None


def group(items: Items, size: str, contender: str) -> Items:
    return named(items, f"pipeline {size},", contender)


def milliseconds(value: float) -> str:
    return f"{value:.1f} ms"
