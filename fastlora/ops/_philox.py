"""Counter-based noise: Philox4x32-10 (Salmon et al., 2011) and Box-Muller, as plain PyTorch.

A standard normal is a function of (seed, step, element) and of nothing else, so a sample's noise
does not depend on the batch that it is in. csrc/philox.h computes the same in C++ and CUDA.

    key     = (low, high 32 bits of seed)
    counter = (low, high 32 bits of element // 4, low, high 32 bits of step)
    r0..r3  = Philox4x32-10(counter, key): (r0, r1) make elements 4i and 4i+1, (r2, r3) the others
    (r, r') -> sqrt(-2 log u) (cos a, sin a), u = float32((r >> 1) 2^-31 + 2^-32),
               a = pi 2^-31 int32(r')
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

START = -1  # the step whose noise is not a solver's: the initial x, and the noise of training
MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds over 32-bit words that are held in int64 tensors of broadcastable shapes."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of the unsigned product
        p0, p1 = c0 * MULTIPLIER[0], c2 * MULTIPLIER[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & LOW) ^ c1 ^ k0,
            p1 & LOW,
            (p0 >> 32 & LOW) ^ c3 ^ k1,
            p0 & LOW,
        )
        k0, k1 = k0 + WEYL[0] & LOW, k1 + WEYL[1] & LOW
    return c0, c1, c2, c3


def normal(seeds: Tensor, step: Tensor | int, numel: int, dtype: torch.dtype) -> Tensor:
    """Standard normals [B, numel] in `dtype` (float32 or float64) for seeds [B] int64 and one step.

    float64 evaluates the same bits more exactly: it is the oracle of the float32 arithmetic.
    """
    step = torch.as_tensor(step, dtype=torch.int64, device=seeds.device)
    block = torch.arange(-(-numel // 4), device=seeds.device)  # [numel / 4], rounded up
    counter = (block & LOW, block >> 32 & LOW, step & LOW, step >> 32 & LOW)
    key = (seeds[:, None] & LOW, seeds[:, None] >> 32 & LOW)
    r0, r1, r2, r3 = philox4x32(counter, key)  # each [B, numel / 4]
    pairs = (*_box_muller(r0, r1, dtype), *_box_muller(r2, r3, dtype))
    return torch.stack(pairs, dim=2).flatten(1)[:, :numel]


def _box_muller(r: Tensor, turn: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # u is in (0, 1], the same float32 in every execution; 2^-32 is the least: |z| <= 6.66
    u = ((r >> 1).float() * 2.0**-31 + 2.0**-32).to(dtype)
    signed = torch.where(turn >= 1 << 31, turn - (1 << 32), turn)
    angle = signed.to(dtype) * (math.pi * 2.0**-31)
    radius = (-2 * u.log()).sqrt()
    return radius * angle.cos(), radius * angle.sin()
