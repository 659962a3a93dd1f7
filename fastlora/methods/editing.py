"""Editing one picture by its caption: SVDiff, Han et al., 2023, arXiv 2303.11305, section 3.5.

1. Fine-tune on (picture, full caption), without a prior:
   `personalise(model, picture, encode(caption), schedule, name="edit")`.
2. Change the caption and call `edit`: the noise that the picture comes from under the new caption
   (DDIM inversion), then sampling from it with guidance.

Without the fine-tuning it is the ordinary edit by inversion, which loses more of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from fastlora.adapters import scaled
from fastlora.samplers.loop import sample
from fastlora.samplers.noise import noise
from fastlora.samplers.schedule import Schedule
from fastlora.samplers.solvers.ddim import ddim
from fastlora.samplers.solvers.ddim_inversion import ddim_inversion


def invert(
    model: nn.Module,
    images: torch.Tensor,  # [B, ...] pictures, or latents
    cond: torch.Tensor,  # [B, ...]
    schedule: Schedule,
    *,
    prediction: str = "epsilon",
    steps: int = 50,
    spacing: str = "leading",
    progress: bool = False,
) -> torch.Tensor:
    """The noise [B, ...] from which `ddim` of as many steps, eta 0 and guidance 1 makes the images
    again, to first order in the step (Song et al., 2021, section 4.3)."""
    table = ddim_inversion(schedule, steps, prediction, spacing)
    return sample(model, table, images, cond, progress=progress)


def slerp(z: torch.Tensor, noise: torch.Tensor, amount: float) -> torch.Tensor:
    """`[sin((1 - a) phi) z + sin(a phi) noise] / sin phi`, phi the angle between the two: from z
    (a = 0) to noise (a = 1) along the sphere, so that what is as long as noise stays so.

    z, noise [B, ...], each sample with its angle. Where sin phi is below 1e-6, or one of the two is
    0, it is the straight line (1 - a) z + a noise. In float64, given back in z's dtype. Raises
    ValueError for two shapes.
    """
    if z.shape != noise.shape:
        raise ValueError(
            f"slerp: noise: expected z's shape {list(z.shape)}, got {list(noise.shape)}"
        )
    a, b = z.double().flatten(1), noise.double().flatten(1)
    lengths = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    cosine = (a * b).sum(1) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    phi = cosine.clamp(-1, 1).acos()[:, None]
    sine = phi.sin()
    straight = (sine.abs() < 1e-6) | (lengths == 0)[:, None]
    over = 1 / torch.where(straight, 1.0, sine)
    first = torch.where(straight, 1 - amount, ((1 - amount) * phi).sin() * over)
    second = torch.where(straight, amount, (amount * phi).sin() * over)
    return (first * a + second * b).view_as(z).to(z.dtype)


def edit(
    model: nn.Module,
    images: torch.Tensor,  # [B, ...] the picture that the model was fine-tuned on, or its latents
    cond: torch.Tensor,  # [B, ...] the changed caption
    uncond: torch.Tensor | None,  # [B, ...] the empty one
    schedule: Schedule,
    *,
    prediction: str = "epsilon",
    steps: int = 50,
    spacing: str = "leading",
    guidance_scale: float = 3.0,
    eta: float = 0.5,
    perturb: float = 0.0,
    strengths: dict[str, float] | None = None,
    seeds: Sequence[int] = (0,),
    progress: bool = False,
) -> torch.Tensor:
    """Pictures [B, ...] of the changed caption that keep what it does not change.

    The images are inverted under `cond` with guidance 1, and sampled from there with
    `guidance_scale`. There are two ways to loosen what holds them, for changes of structure: noise
    on the way, `eta` of DDIM, or `perturb` in [0, 1], `slerp` of the inverted noise by so much
    towards fresh noise (then with eta 0, as a rule). `strengths` by adapter name hold for both
    ways; 0.8 to 1.2 are of use. `seeds`, one per image, decide all noise.

    Raises ValueError for a `perturb` outside [0, 1] and what `sample` and `ddim` refuse.
    """
    if not 0 <= perturb <= 1:
        raise ValueError(f"edit: perturb: expected a number from 0 to 1, got {perturb!r}")
    table = ddim(schedule, steps, eta, prediction, spacing)
    with scaled(model, strengths) if strengths else nullcontext():
        z = invert(
            model, images, cond, schedule, prediction=prediction, steps=steps, spacing=spacing
        )
        if perturb:
            fresh = noise(seeds, tuple(images.shape[1:]), images.device)
            z = slerp(z, fresh.to(z.dtype), perturb)
        return sample(model, table, z, cond, uncond, guidance_scale, seeds, progress=progress)
