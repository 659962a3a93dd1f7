"""Which weight spectral shifts belong to: a hash that survives a change of dtype.

A cryptographic hash changes with every bit, and a copy of the base in bfloat16 would be another
base. This one is locality-sensitive instead: close weights have close hashes.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora.adapters.specs import is_number

PERIOD = 4093  # a prime


@torch.no_grad()
def base_hash(weight: Tensor) -> list[float]:
    """Five numbers that tell weights apart but not their dtypes: the Frobenius norm, and the sums
    under four fixed patterns of signs over that norm; six digits of each.

    For unrelated weights each of the four differs by about 1.4; rounding to bfloat16 changes them
    by about 0.001.
    """
    flat = weight.detach().flatten().float()
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % PERIOD)).view(-1, PERIOD)
    index = torch.arange(PERIOD, device=weight.device)
    # The middle bits of a linear congruence are signs that look random.
    bits = index * 2654435761 + 40503
    signs = [(bits >> shift & 1) * 2 - 1 for shift in (17, 20, 23, 26)]
    norm = torch.linalg.vector_norm(flat)
    sums = rows.sum(0) @ torch.stack(signs).T.float() / norm.clamp_min(1e-30)
    return [float(f"{v:.6g}") for v in (norm, *sums)]


def same_base(known: Any, got: list[float]) -> bool:
    if not isinstance(known, list) or len(known) != len(got):
        return False
    if not all(is_number(v) for v in known):
        return False
    close = [abs(a - b) <= 0.02 for a, b in zip(known[1:], got[1:], strict=True)]
    return abs(known[0] - got[0]) <= 0.01 * max(known[0], got[0]) and all(close)
