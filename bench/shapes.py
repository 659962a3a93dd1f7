"""The layers of Stable Diffusion 1.5 at 512 px with classifier-free guidance (batch 2)."""

import json
from pathlib import Path
from typing import Any


def linears() -> list[dict[str, int]]:
    """Every kind of Linear call: tokens, inp, out, and its count in one pass of the UNet."""
    return _sd15()["linear"]


def _sd15() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("shapes.json").read_text())["sd15-512px-cfg"]
