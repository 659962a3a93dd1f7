"""Noise by seed: every sample has its own, whatever batch it is in."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from fastlora import ops
from fastlora.samplers.arguments import integer, moved


def noise(
    seeds: Sequence[int] | Tensor,
    shape: Sequence[int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise [B, *shape] float32, one seed per sample: a start for `sample`.

    The Philox stream of `fastlora.ops.sampler_step` at a step of its own, so it is independent of
    the noise that a solver adds under the same seeds. `shape` is that of one sample. Raises
    TypeError where seeds or shape are no sequence, ValueError for what is wrong inside of them.
    """
    if not isinstance(seeds, (Sequence, Tensor)) or (isinstance(seeds, Tensor) and seeds.dim() < 1):
        raise TypeError(f"noise: seeds: expected int64 numbers, one per sample, got {seeds!r}")
    try:
        sizes = [integer(size) for size in shape]
    except TypeError:
        message = f"noise: shape: expected the sizes of one sample, got {shape!r}"
        raise TypeError(message) from None
    if any(size is None or size < 0 for size in sizes):
        raise ValueError(f"noise: shape: expected ints >= 0, got {shape!r}")
    keys = as_seeds(seeds, len(seeds), torch.device(device or "cpu"), "noise")
    zeros = torch.zeros(len(seeds), *shape, dtype=torch.float32, device=keys.device)
    # (0, 1, 0, 1): x_t = target = eps. Made where it is used, so that nothing waits for a copy.
    table = (torch.arange(4, device=keys.device) % 2).float()[None]
    return ops.add_noise(zeros, None, keys, torch.zeros_like(keys), table)[0]


def as_seeds(
    seeds: Sequence[int] | Tensor | None, batch: int, device: torch.device, operator: str
) -> Tensor:
    """int64 [B] on `device`; None draws from torch's generator."""
    if seeds is None:
        return moved(torch.randint(2**63 - 1, (batch,), dtype=torch.int64, device="cpu"), device)
    expected = f"{operator}: seeds: expected {batch} int64 numbers, one per sample, got"
    if not isinstance(seeds, Tensor):
        if not isinstance(seeds, Sequence):
            raise TypeError(f"{expected} {seeds!r}")
        for seed in seeds:
            if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
                raise ValueError(f"{expected} {seed!r} among them")
        seeds = torch.tensor([int(seed) for seed in seeds], dtype=torch.int64, device="cpu")
    integer = not (seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool)
    if not integer or tuple(seeds.shape) != (batch,):
        raise ValueError(
            f"{expected} {str(seeds.dtype).removeprefix('torch.')} {list(seeds.shape)}"
        )
    return moved(seeds.to(torch.int64), device)
