"""The demo's files: pictures, report.json and report.html."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from fastlora.demo import charts, images, slider, subject
from fastlora.demo.findings import Findings, numbers
from fastlora.demo.page import curve, page
from fastlora.demo.world import WORDS


def write(found: Findings, seconds: float) -> dict[str, Any]:
    """Writes the pictures, report.json and report.html; returns what report.json holds."""
    files = pictures(found)
    result = numbers(found, seconds)
    result["files"] = sorted(
        [*files, "report.html", "report.json"]
        + [f"{name}.safetensors" for name in (slider.NAME, subject.NAME)]
    )
    replace(found.out / "report.html", page(found, result).encode())
    replace(found.out / "report.json", json.dumps(result, indent=2).encode())
    return result


def pictures(found: Findings) -> list[str]:
    """Writes them; their names."""
    s, p = found.slider, found.subject
    strengths = [images.signed(x) for x in s.strengths]
    rows = (p.subject.images, p.before.subject_images, p.spectral.scores.subject_images)
    examples = torch.stack([row[: min(map(len, rows))] for row in rows])
    sheets = {
        "slider.png": images.sheet(s.images[:10], WORDS, strengths),
        "pairs.png": images.sheet(torch.stack([s.pairs.low, s.pairs.high]), ["thin", "thick"]),
        "subject.png": images.sheet(examples, ["the five pictures", "before", "after"]),
        "together.png": images.sheet(found.together.images[:3], (), strengths),
    }
    for name, picture in sheets.items():
        replace(found.out / name, images.png(picture))
    replace(found.out / "curve.svg", charts.standalone(curve(s)).encode())
    return [*sheets, "curve.svg"]


def replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
