"""What the demo found, as data and in numbers."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora import __version__
from fastlora.demo import slider, subject
from fastlora.demo.checks import Check, Together
from fastlora.demo.slider import Slider
from fastlora.demo.speed import Comparison
from fastlora.demo.subject import Personalised, Scores, Trained
from fastlora.demo.world import WORDS, World
from fastlora.doctor import version_of


@dataclass(frozen=True)
class Findings:
    """Everything that the report is made of."""

    world: World
    out: Path
    slider: Slider
    subject: Personalised
    together: Together
    checks: list[Check]
    comparisons: list[Comparison]


def numbers(found: Findings, seconds: float) -> dict[str, Any]:
    s, p, world = found.slider, found.subject, found.world
    return {
        "fastlora": __version__,
        "machine": machine(world),
        "seed": world.seed,
        "settings": asdict(world.settings),
        "seconds": {"total": seconds, **world.seconds},
        "slider": {
            "modules": s.modules,
            "parameters": s.parameters,
            "train_seconds": s.train_seconds,
            "sample_seconds": s.sample_seconds,
            "loss": s.loss,
            "strengths": list(s.strengths),
            "rows": [WORDS[d] for d in s.rows],
            "thickness": s.thickness.tolist(),
            "thickness_mean": s.mean,
            "class_accuracy": s.accuracy,
            "mean_rises": s.mean_rises,
            "rows_rising": s.rows_rising,
            "steps_rising": s.steps_rising,
            "worst_fall": s.worst_fall,
            "slant_mean": s.slant.mean(0).tolist(),
            "brightness_mean": s.brightness.mean(0).tolist(),
        },
        "subject": {
            "caption": p.subject.caption,
            "class_caption": p.subject.class_caption,
            "floor": p.floor,
            "before": scores(p.before),
            "svdiff": trained(p.spectral),
            "lora": trained(p.lora),
        },
        "together": {"thickness_mean": found.together.thickness, "shown": found.together.shown},
        "verify": {
            "passed": all(c.report.passed for c in found.checks),
            "models": [
                {
                    "title": c.title,
                    "passed": c.report.passed,
                    "rows": list(map(asdict, c.report.rows)),
                }
                for c in found.checks
            ],
        },
        "speed": [asdict(c) for c in found.comparisons],
        "commands": commands(found),
    }


def scores(of: Scores) -> dict[str, float]:
    return {k: v for k, v in vars(of).items() if isinstance(v, float)}


def trained(of: Trained) -> dict[str, Any]:
    return {"parameters": of.parameters, "seconds": of.seconds, **scores(of.scores)}


def machine(world: World) -> dict[str, str]:
    """Where and with what this ran."""
    from fastlora.ops._define import kernels

    packages = ("numpy", "transformers", "peft", "diffusers")
    build = kernels.build_info()
    gpu = torch.cuda.get_device_name() if world.device.type == "cuda" else "none used"
    return {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "GPU": gpu,
        "system": platform.platform(terse=True),
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "fastlora": f"{__version__}, {build['cpu_isa']}, {build['compiler']}",
        **{name: version_of(name) or "not installed" for name in packages},
    }


def threads_of_processor() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)} of {processor()}"


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commands(found: Findings) -> str:
    """A program that uses the saved adapters."""
    first, second = (
        json.dumps((found.out / f"{name}.safetensors").as_posix())
        for name in (slider.NAME, subject.NAME)
    )
    settings = found.world.settings
    device = "" if found.world.device.type == "cpu" else f'device="{found.world.device.type}"'
    on = f", {device}" if device else ""
    return f'''\
import torch, fastlora
from fastlora.models import digits
from fastlora.samplers import noise

model = digits.load({device})
fastlora.load(model, {first}, name="{slider.NAME}")
fastlora.load(model, {second}, name="{subject.NAME}")

# five mirrored threes from one noise, thin to thick, in one batch
strengths = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]{on})
fastlora.set_scale(model, {{"{slider.NAME}": strengths, "{subject.NAME}": 1.0}})
table = fastlora.ddim(
    fastlora.Schedule.cosine(1000), steps={settings.steps}, prediction="v", spacing="trailing"
)
pictures = fastlora.sample(
    model,
    table,
    noise([7] * 5, model.shape{on}),
    cond=model.encode(["{found.subject.subject.caption}"] * 5),
    uncond=model.encode([""] * 5),
    guidance_scale={settings.guidance},
)  # [5, 1, 32, 32] in [-1, 1]
'''
