"""The layers of Stable Diffusion 1.5, SDXL and FLUX, and how often a pass calls each."""

import json
from pathlib import Path
from typing import Any

MODELS = ("sd15-512px-cfg", "sdxl-1024px-cfg", "flux-1024px")


def linears(model: str = MODELS[0]) -> list[dict[str, int]]:
    """Every kind of Linear call: tokens, inp, out, and its count in one pass of the model."""
    shapes: dict[str, Any] = json.loads(Path(__file__).with_name("shapes.json").read_text())
    return shapes[model]["linear"]
