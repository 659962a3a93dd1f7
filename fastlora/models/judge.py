"""A judge of pictures: the digit by a small network, thickness, slant and brightness measured from the pixels.

`Judge.score(images)` needs no labels and never sees captions. The measures are closed forms of the ink's moments:

    thickness = 2 A / P            A the ink's area, P its perimeter (total variation, by the co-area formula), pixels:
                                   exact for a long stroke, blur changes neither A nor P
    slant     = -atan(m_xy / m_yy) degrees, right positive (y is down): what a shear of an upright shape by that angle adds
    brightness = the ink of a covered pixel: the mean of the ink weighted by its square, 0 to 1
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("weights") / "judge.safetensors"


def _ink(images: torch.Tensor) -> torch.Tensor:
    """Ink in [0, 1], float32 [B, H, W], of pictures [B, 1, H, W] in [-1, 1]; a faint background counts as none."""
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"judge: images: expected [B, 1, H, W], got {list(images.shape)}")
    ink = ((images[:, 0].float() + 1) / 2).clamp(0, 1)
    return torch.where(ink < 0.08, 0.0, ink)


def brightness(images: torch.Tensor) -> torch.Tensor:
    """Ink of a covered pixel [B]: `sum(ink^3) / sum(ink^2)`, which soft edges hardly move; 0 for an empty picture."""
    ink = _ink(images).flatten(1)
    return ink.pow(3).sum(1) / ink.pow(2).sum(1).clamp_min(1e-6)


def thickness(images: torch.Tensor) -> torch.Tensor:
    """Mean stroke width in pixels [B], by Steiner's formula; 0 for an empty picture."""
    ink = _ink(images) / brightness(images).clamp_min(0.05)[:, None, None]
    # A steeper edge at the same place: area and perimeter stay, grey haze and the dip of a thin line's ink go.
    ink = F.pad(((ink - 0.15) / 0.7).clamp(0, 1), (2, 2, 2, 2))
    # Finer, so that the gradient's length hardly depends on the direction of an edge.
    fine = F.interpolate(ink[:, None], scale_factor=4, mode="bilinear", align_corners=False)[:, 0]
    dx = (fine[:, 1:-1, 2:] - fine[:, 1:-1, :-2]) / 2
    dy = (fine[:, 2:, 1:-1] - fine[:, :-2, 1:-1]) / 2
    perimeter = torch.hypot(dx, dy).sum((1, 2)) / 4  # a fine pixel is 1/16 large, its gradient 1/4 of the coarse one's
    area = fine.sum((1, 2)) / 16
    on = (fine > 0.5).float()  # Euler number = vertices - edges + faces of the grid on the ink
    across, down = on[:, :, 1:] * on[:, :, :-1], on[:, 1:] * on[:, :-1]
    euler = on.sum((1, 2)) - across.sum((1, 2)) - down.sum((1, 2)) + (across[:, 1:] * across[:, :-1]).sum((1, 2))
    root = (perimeter.square() - 4 * torch.pi * euler * area).clamp_min(0).sqrt()
    return 4 * area / (perimeter + root).clamp_min(1e-6)


def slant(images: torch.Tensor) -> torch.Tensor:
    """Slant in degrees [B] from second moments, positive to the right; 0 for an empty picture."""
    ink = _ink(images)
    total = ink.sum((1, 2)).clamp_min(1e-6)
    y = torch.arange(ink.shape[1], device=ink.device, dtype=ink.dtype)[:, None]
    x = torch.arange(ink.shape[2], device=ink.device, dtype=ink.dtype)[None, :]
    y = y - ((ink * y).sum((1, 2)) / total)[:, None, None]  # [B, H, 1]
    x = x - ((ink * x).sum((1, 2)) / total)[:, None, None]  # [B, 1, W]
    return -torch.rad2deg(torch.atan2((ink * x * y).sum((1, 2)), (ink * y * y).sum((1, 2)).clamp_min(1e-6)))


class Judge(nn.Module):
    """Logits [B, 10] of pictures [B, 1, 32, 32]; `score` gives digit, confidence and the measures."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [(1, width), (width, 2 * width), (2 * width, 4 * width)]
        self.convs = nn.ModuleList([nn.Conv2d(i, o, 3, padding=1) for i, o in sizes])
        self.norms = nn.ModuleList([nn.GroupNorm(4, o) for _, o in sizes])
        self.hidden = nn.Linear(4 * width * 16, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.max_pool2d(F.relu(norm(conv(h))), 2)
        return self.out(F.relu(self.hidden(h.flatten(1))))

    @torch.no_grad()
    def score(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """`digit` int64, `confidence`, `thickness` (pixels), `slant` (degrees), `brightness`, each [B], of [B, 1, 32, 32].

        The digit is read from the picture with its brightness normalised. Raises ValueError for another shape.
        """
        if images.shape[1:] != (1, 32, 32):
            raise ValueError(f"judge: images: expected [B, 1, 32, 32], got {list(images.shape)}")
        weight = self.out.weight
        bright = brightness(images)
        ink = _ink(images) / bright.clamp_min(0.2)[:, None, None]
        logits = self((2 * ink.clamp(0, 1) - 1)[:, None].to(weight.device, weight.dtype))
        confidence, digit = logits.float().softmax(1).max(1)
        return {
            "digit": digit,
            "confidence": confidence,
            "thickness": thickness(images),
            "slant": slant(images),
            "brightness": bright,
        }
