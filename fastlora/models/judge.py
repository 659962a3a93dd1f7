"""A judge of pictures: the digit by a small network, all else measured from the pixels.

`Judge.score(images)` needs no labels and never sees captions. The measures are closed forms:

    thickness   the w of Steiner's formula A = w P / 2 - pi chi w^2 / 4 for a round pen drawn along
                a line: A is the ink's area, P its perimeter (total variation, by the co-area
                formula; blur moves neither), chi its Euler number (pieces minus loops). Pixels;
                exact for lines without sharp bends, up to 0.4 too much below 2 pixels.
    slant       -atan(m_xy / m_yy) of the ink's second moments, degrees, right positive (y is down):
                what shearing an upright shape by an angle adds
    brightness  the ink of a covered pixel, 0 to 1: the mean of the ink weighted by its sixth power
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ._files import load_weights

WEIGHTS = Path(__file__).with_name("weights") / "judge.safetensors"


def _ink(images: torch.Tensor) -> torch.Tensor:
    """Ink float32 [B, H, W] in [0, 1] of pictures [B, 1, H, W]; a faint background is none."""
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"judge: images: expected [B, 1, H, W], got {list(images.shape)}")
    ink = ((images[:, 0].float() + 1) / 2).clamp(0, 1)
    return torch.where(ink < 0.08, 0.0, ink)


def brightness(images: torch.Tensor) -> torch.Tensor:
    """Ink of a covered pixel [B]: `sum(ink^7) / sum(ink^6)`; 0 for an empty picture."""
    ink = _ink(images).flatten(1)
    return ink.pow(7).sum(1) / ink.pow(6).sum(1).clamp_min(1e-12)


def thickness(images: torch.Tensor) -> torch.Tensor:
    """Mean stroke width in pixels [B], by Steiner's formula; 0 for an empty picture."""
    ink = _ink(images) / brightness(images).clamp_min(0.05)[:, None, None]
    # A steeper edge at the same place: area and perimeter stay; haze and a thin line's dip go.
    ink = F.pad(((ink - 0.15) / 0.7).clamp(0, 1), (2, 2, 2, 2))
    # Finer, so that the gradient's length hardly depends on the direction of an edge.
    fine = F.interpolate(ink[:, None], scale_factor=4, mode="bilinear", align_corners=False)[:, 0]
    dx = (fine[:, 1:-1, 2:] - fine[:, 1:-1, :-2]) / 2
    dy = (fine[:, 2:, 1:-1] - fine[:, :-2, 1:-1]) / 2
    # A fine pixel is 1/16 large, its gradient 1/4 of the coarse one's.
    perimeter = torch.hypot(dx, dy).sum((1, 2)) / 4
    area = fine.sum((1, 2)) / 16
    on = (fine > 0.5).float()  # Euler number = vertices - edges + faces of the grid on the ink
    across, down = on[:, :, 1:] * on[:, :, :-1], on[:, 1:] * on[:, :-1]
    euler = (
        on.sum((1, 2))
        - across.sum((1, 2))
        - down.sum((1, 2))
        + (across[:, 1:] * across[:, :-1]).sum((1, 2))
    )
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
    return -torch.rad2deg(
        torch.atan2((ink * x * y).sum((1, 2)), (ink * y * y).sum((1, 2)).clamp_min(1e-6))
    )


def normalised(images: torch.Tensor) -> torch.Tensor:
    """The pictures [B, 1, H, W] in [-1, 1] with full brightness."""
    ink = _ink(images) / brightness(images).clamp_min(0.05)[:, None, None]
    return (2 * ink.clamp(0, 1) - 1)[:, None]


class Judge(nn.Module):
    """Logits [B, 10] of pictures [B, 1, 32, 32]; `score` adds confidence and the measures."""

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
        """`digit`, `confidence`, `thickness` (pixels), `slant` (degrees), `brightness`: [B] each.

        The digit is read from the picture with its brightness normalised. Raises ValueError for
        another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (1, 32, 32):
            raise ValueError(f"judge: images: expected [B, 1, 32, 32], got {list(images.shape)}")
        weight = self.out.weight
        logits = self(normalised(images).to(weight.device, weight.dtype))
        confidence, digit = logits.float().softmax(1).max(1)
        return {
            "digit": digit,
            "confidence": confidence,
            "thickness": thickness(images),
            "slant": slant(images),
            "brightness": brightness(images),
        }


def load(device: torch.device | str | None = None, weights: str | Path = WEIGHTS) -> Judge:
    """The trained judge in eval mode, all parameters frozen, in float32."""
    judge = Judge()
    load_weights(judge, weights)
    return judge.requires_grad_(False).eval().to(device=device)
