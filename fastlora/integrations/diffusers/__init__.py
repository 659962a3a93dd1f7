"""diffusers' schedulers with one kernel a step: subclasses, so that what takes the one takes the
other. `fastlora.accelerate(pipeline)` puts them in."""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError(
        'fastlora.integrations.diffusers needs diffusers: pip install "fastlora[diffusers]"'
    ) from error

from fastlora.integrations.diffusers.ddim import FastDDIMScheduler
from fastlora.integrations.diffusers.ddpm import FastDDPMScheduler
from fastlora.integrations.diffusers.dpm_solver import FastDPMSolverMultistepScheduler
from fastlora.integrations.diffusers.euler import (
    FastEulerAncestralDiscreteScheduler,
    FastEulerDiscreteScheduler,
)
from fastlora.integrations.diffusers.flow import FastFlowMatchEulerDiscreteScheduler
from fastlora.integrations.diffusers.lcm import FastLCMScheduler

__all__ = [
    "FastDDIMScheduler",
    "FastDDPMScheduler",
    "FastDPMSolverMultistepScheduler",
    "FastEulerAncestralDiscreteScheduler",
    "FastEulerDiscreteScheduler",
    "FastFlowMatchEulerDiscreteScheduler",
    "FastLCMScheduler",
]
