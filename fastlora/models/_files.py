"""Weights of the small models as safetensors files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn


def save_weights(model: nn.Module, path: str | Path, dtype: torch.dtype) -> None:
    """Parameters and buffers as safetensors in the dtype given, the file replaced at once."""
    from safetensors.torch import save

    state = {
        name: value.detach().to("cpu", dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(save(state, metadata={"format": "pt"}))
    os.replace(partial, path)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill the model from safetensors, all keys and shapes as they are.

    Raises ValueError for a file that is not its own, OSError for none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"weights {path}: expected a safetensors file, got one that does not read: {error}"
        ) from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"weights {path}: expected those of {type(model).__name__}, got others: {error}"
        ) from error
