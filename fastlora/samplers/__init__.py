"""Noise schedules, solvers as tables of coefficients, and the sampling loop."""

from typing import TYPE_CHECKING, Any

from fastlora.samplers.continuous import cosine_log_snr, geometric, karras, linear_log_snr
from fastlora.samplers.grid import Grid, grid_of, listed, strided
from fastlora.samplers.levels import euler_grid, flow, flow_grid, multistep_grid
from fastlora.samplers.loop import Step, sample, sample_steps
from fastlora.samplers.noise import noise
from fastlora.samplers.sampler import Sampler
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.sde import SDE, VE, VP, SubVP
from fastlora.samplers.solvers.consistency import consistency
from fastlora.samplers.solvers.ddim import ddim
from fastlora.samplers.solvers.ddim_inversion import ddim_inversion
from fastlora.samplers.solvers.ddpm import ddpm
from fastlora.samplers.solvers.dpm_solver import dpm_solver
from fastlora.samplers.solvers.euler import euler, euler_ancestral
from fastlora.samplers.solvers.flow import flow_euler, flow_heun
from fastlora.samplers.solvers.heun import heun
from fastlora.samplers.solvers.langevin import annealed_langevin, langevin
from fastlora.samplers.solvers.lcm import lcm
from fastlora.samplers.solvers.log_snr_ancestral import log_snr_ancestral
from fastlora.samplers.solvers.score import predictor_corrector, probability_flow, reverse_sde
from fastlora.samplers.solvers.unipc import unipc
from fastlora.samplers.table import Table

if TYPE_CHECKING:
    from fastlora.samplers.config import (
        grid_from_config,
        schedule_from_config,
        table_from_config,
    )

__all__ = [
    "Grid",
    "SDE",
    "Sampler",
    "Schedule",
    "Step",
    "SubVP",
    "Table",
    "VE",
    "VP",
    "annealed_langevin",
    "consistency",
    "cosine_log_snr",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "dpm_solver",
    "euler",
    "euler_ancestral",
    "euler_grid",
    "flow",
    "flow_euler",
    "flow_grid",
    "flow_heun",
    "geometric",
    "grid_from_config",
    "grid_of",
    "heun",
    "karras",
    "langevin",
    "lcm",
    "linear_log_snr",
    "listed",
    "log_snr_ancestral",
    "multistep_grid",
    "noise",
    "predictor_corrector",
    "probability_flow",
    "reverse_sde",
    "sample",
    "sample_steps",
    "schedule_from_config",
    "strided",
    "table_from_config",
    "unipc",
]

_CONFIG = ("grid_from_config", "schedule_from_config", "table_from_config")


def __getattr__(name: str) -> Any:
    """The readers of configurations when they are asked for: `import fastlora` stays light."""
    if name in _CONFIG:
        from fastlora.samplers import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
