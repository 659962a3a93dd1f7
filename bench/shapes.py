"""The layers of Stable Diffusion 1.5, SDXL and FLUX, and how often a pass calls each."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MODELS = ("sd15-512px-cfg", "sdxl-1024px-cfg", "flux-1024px")
NAMES = dict(zip(("SD 1.5", "SDXL", "FLUX"), MODELS, strict=True))
Shape = tuple[int, int, int]  # tokens, in, out


def read(model: str) -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("shapes.json").read_text())[model]


def linears(model: str = MODELS[0]) -> list[dict[str, int]]:
    """Every kind of Linear call: tokens, inp, out, and its count in one pass of the model."""
    return read(model)["linear"]


def counts(models: Iterable[str]) -> dict[Shape, dict[str, int]]:
    """Every Linear call of some models once, with its count in a pass of each."""
    found: dict[Shape, dict[str, int]] = {}
    for model in models:
        for s in linears(model):
            found.setdefault((s["tokens"], s["inp"], s["out"]), {})[model] = s["count"]
    return found


def weights(model: str, convolutions: bool) -> list[tuple[int, int]]:
    """`[out, in]` of every adapted weight; a convolution's as the matrix that folding sees."""
    found = [(s["out"], s["inp"]) for s in linears(model) for _ in range(s["count"])]
    if convolutions:
        for s in read(model)["conv"]:
            found += [(s["out"], s["inp"] * s["kernel"] ** 2)] * s["count"]
    return found


def geometric_mean(ratios: Iterable[tuple[float, float]]) -> float:
    """Of (weight, ratio) pairs."""
    pairs = list(ratios)
    total = sum(weight for weight, _ in pairs)
    return math.exp(sum(weight * math.log(ratio) for weight, ratio in pairs) / total)
