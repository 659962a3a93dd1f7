"""Noise schedules, solvers as tables of coefficients, and the sampling loop."""

from fastlora.samplers.grid import Grid
from fastlora.samplers.loop import Step, sample, sample_steps
from fastlora.samplers.noise import noise
from fastlora.samplers.sampler import Sampler
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.solvers.ddim import ddim
from fastlora.samplers.table import Table

__all__ = [
    "Grid",
    "Sampler",
    "Schedule",
    "Step",
    "Table",
    "ddim",
    "noise",
    "sample",
    "sample_steps",
]
