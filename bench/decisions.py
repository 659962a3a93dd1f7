"""What the cost model of `lora_linear` decides for real models: `python -m bench.decisions`.

Predicted microseconds on an H200 in bf16 (csrc/heuristics.h), none of them measured. The table is
kept in decisions.txt, so that a change of the model shows what it changes.
"""

import math
from pathlib import Path

from bench.shapes import MODELS, linears
from fastlora.ops._define import kernels

TABLE = Path(__file__).with_name("decisions.txt")
FORMS = ("products", "extended", "appended")
H200 = (90, 132)  # compute capability, multiprocessors
RANKS = (16, 64, 128)


def predicted(tokens: int, features: int, out: int, rank: int) -> tuple[float, dict[str, float]]:
    """Seconds of the plain layer, and of each form that takes the rank."""
    plain, *forms = kernels.predict_lora_linear(tokens, features, out, rank, *H200)
    named = dict(zip(FORMS, forms, strict=True))
    if rank > 32:
        del named["appended"]
    return plain, named


def table() -> str:
    lines = [f"{'tokens x in x out, rank':<30}{'plain':>9}" + "".join(f"{f:>11}" for f in FORMS)]
    lines[0] += "   chosen, over plain"
    for model in MODELS:
        for rank in RANKS:
            total = weight = 0.0
            rows = []
            for shape in linears(model):
                size = (shape["tokens"], shape["inp"], shape["out"])
                plain, forms = predicted(*size, rank)
                best = min(forms, key=lambda form: forms[form])
                name = f"{size[0]}x{size[1]}x{size[2]}, {rank}"
                row = f"{name:<30}{plain * 1e6:>9.1f}"
                row += "".join(f"{forms[f] * 1e6:>11.1f}" if f in forms else " " * 11
                               for f in FORMS)  # fmt: skip
                rows.append(f"{row}   {best}, {forms[best] / plain:.2f}")
                total += shape["count"] * math.log(forms[best] / plain)
                weight += shape["count"]
            lines += [f"{model}, rank {rank}: {math.exp(total / weight):.3f} of the plain layers"]
            lines += rows
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
