"""What the cost model of `lora_linear` decides for real models: `python -m bench.decisions`.

Predicted microseconds (csrc/heuristics.h) on an H100 in bf16 and on two threads of a CPU with
AVX-512 in fp32, from rates that were measured there. The table is kept in decisions.txt, so that
a change of the model shows what it changes.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from bench.shapes import MODELS, linears
from fastlora.ops._define import kernels
from fastlora.ops._routes import APPENDED_RANK, DTYPES, ISAS

TABLE = Path(__file__).with_name("decisions.txt")
RANKS = (16, 64, 128)
H100 = (90, 132)  # compute capability, multiprocessors
CPU = (DTYPES[torch.float32], ISAS["avx512"], 2)

Times = dict[str, float]


def on_h100(tokens: int, features: int, out: int, rank: int) -> Times:
    """Seconds of the plain layer, and of each form that takes the rank."""
    times = kernels.predict_lora_linear(tokens, features, out, rank, *H100)
    named = dict(zip(("plain", "products", "extended", "appended"), times, strict=True))
    if rank > APPENDED_RANK:
        del named["appended"]
    return named


def on_cpu(tokens: int, features: int, out: int, rank: int) -> Times:
    return kernels.predict_lora_linear_cpu(tokens, features, out, rank, *CPU)


def part(title: str, predicted: Callable[..., Times], forms: tuple[str, ...]) -> list[str]:
    """One device: every layer of every model, and the geometric mean over plain, by count."""
    head = f"{'tokens x in x out, rank':<30}{'plain':>9}" + "".join(f"{f:>11}" for f in forms)
    lines = [title, head + "   chosen, over plain"]
    for model in MODELS:
        for rank in RANKS:
            total = weight = 0.0
            rows = []
            for shape in linears(model):
                size = (shape["tokens"], shape["inp"], shape["out"])
                times = predicted(*size, rank)
                plain = times.pop("plain")
                best = min(times, key=lambda form: times[form])
                name = f"{size[0]}x{size[1]}x{size[2]}, {rank}"
                row = f"{name:<30}{plain * 1e6:>9.1f}"
                row += "".join(f"{times[f] * 1e6:>11.1f}" if f in times else " " * 11
                               for f in forms)  # fmt: skip
                rows.append(f"{row}   {best}, {times[best] / plain:.2f}")
                total += shape["count"] * math.log(times[best] / plain)
                weight += shape["count"]
            lines += [f"{model}, rank {rank}: {math.exp(total / weight):.3f} of the plain layers"]
            lines += rows
    return lines


def table() -> str:
    gpu = part("H100, bfloat16", on_h100, ("products", "extended", "appended"))
    cpu = part("two threads, AVX-512, float32", on_cpu, ("loop", "around", "products"))
    return "\n".join([*gpu, "", *cpu]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
