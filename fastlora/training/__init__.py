"""Training: losses as small callables, one loop, averages and checkpoints."""

from .checkpoint import CheckpointError, ensure_writable, load_checkpoint, save_checkpoint
from .ema import EMA
from .loop import TrainResult, train
from .losses import denoising, epsilon_loss, prior_preservation, v_loss, visual_slider
from .optimizers import adamw

__all__ = [
    "EMA",
    "CheckpointError",
    "TrainResult",
    "adamw",
    "denoising",
    "ensure_writable",
    "epsilon_loss",
    "load_checkpoint",
    "prior_preservation",
    "save_checkpoint",
    "train",
    "v_loss",
    "visual_slider",
]
