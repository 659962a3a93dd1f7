"""Noise schedules, solvers as tables of coefficients, and the sampling loop."""

from fastlora.samplers.config import grid_from_config, schedule_from_config, table_from_config
from fastlora.samplers.grid import Grid
from fastlora.samplers.loop import Step, sample, sample_steps
from fastlora.samplers.noise import noise
from fastlora.samplers.sampler import Sampler
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.solvers.ddim import ddim
from fastlora.samplers.solvers.ddim_inversion import ddim_inversion
from fastlora.samplers.solvers.ddpm import ddpm
from fastlora.samplers.solvers.dpm_solver import dpm_solver
from fastlora.samplers.solvers.euler import euler, euler_ancestral
from fastlora.samplers.solvers.flow import flow_euler, flow_heun
from fastlora.samplers.solvers.heun import heun
from fastlora.samplers.solvers.lcm import lcm
from fastlora.samplers.solvers.unipc import unipc
from fastlora.samplers.table import Table

__all__ = [
    "Grid",
    "Sampler",
    "Schedule",
    "Step",
    "Table",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "dpm_solver",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_heun",
    "grid_from_config",
    "heun",
    "lcm",
    "noise",
    "sample",
    "sample_steps",
    "schedule_from_config",
    "table_from_config",
    "unipc",
]
