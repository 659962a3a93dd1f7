"""A small text-conditioned UNet, `model(x, t, cond) -> prediction`, in PyTorch alone.

Modules are named and nested as in diffusers' UNet2DConditionModel
(`down_blocks.1.attentions.0.transformer_blocks.0.attn2 .to_k`, `mid_block.resnets.0.conv1`, ...),
because recipes choose layers by these names. Deviations, for two slow cores: the stem folds 2x2
pixels into channels and the head unfolds them, so that a 32x32 picture costs what a 16x16 one does;
an up block has as many residual blocks as its down block, not one more, and meets only that block's
features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class UNetConfig:
    """Widths of a `UNet`. Level i works on 2^(i+1)-fold reduced pictures; `attention[i]` gives it
    transformers.
    """

    in_channels: int = 1
    block_out_channels: tuple[int, ...] = (32, 64, 128)
    attention: tuple[bool, ...] = (False, True, True)
    layers_per_block: int = 1
    cross_attention_dim: int = 64
    head_dim: int = 32
    groups: int = 8


class ResnetBlock2D(nn.Module):
    """`x + conv2(silu(norm2(conv1(silu(norm1(x))) + time_emb_proj(silu(temb)))))`."""

    def __init__(self, channels: int, out_channels: int, temb_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # starts as the identity, which trains faster
        self.conv_shortcut = (
            nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None
        )

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Multi-head attention of `x [B, N, dim]` on `context [B, L, context_dim]`, or on itself."""

    def __init__(self, dim: int, context_dim: int | None, head_dim: int) -> None:
        super().__init__()
        self.heads = dim // head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (
            proj(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N or L, head_dim]
            for proj, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](h.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """`a * gelu(b)` with `a, b = proj(x)` in halves."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.proj(x).chunk(2, dim=-1)
        return a * F.gelu(b)


class FeedForward(nn.Module):
    def __init__(self, dim: int, mult: int = 2) -> None:
        super().__init__()
        # The middle is diffusers' dropout, kept so that the last layer is `net.2` as there.
        self.net = nn.ModuleList(
            [GEGLU(dim, mult * dim), nn.Identity(), nn.Linear(mult * dim, dim)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention on the text, feed-forward; each normed, each added."""

    def __init__(self, dim: int, context_dim: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, None, head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, head_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), cond)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map, added to it."""

    def __init__(self, channels: int, context_dim: int, head_dim: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(channels, context_dim, head_dim)]
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B, H W, C]
        for block in self.transformer_blocks:
            h = block(h, cond)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample2D(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Upsample2D(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """Residual blocks, one per (in, out) of `widths`, each with a transformer behind it or none."""

    def __init__(
        self, widths: list[tuple[int, int]], temb: int, config: UNetConfig, *, attention: bool
    ) -> None:
        super().__init__()
        out, dim = widths[-1][1], config.cross_attention_dim
        self.resnets = nn.ModuleList([ResnetBlock2D(i, o, temb, config.groups) for i, o in widths])
        self.attentions = nn.ModuleList(
            [Transformer2DModel(out, dim, config.head_dim, config.groups) for _ in widths]
            if attention
            else []
        )

    def layer(
        self, i: int, x: torch.Tensor, temb: torch.Tensor, cond: torch.Tensor
    ) -> torch.Tensor:
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, cond) if i < len(self.attentions) else x


class DownBlock(Block):
    """`x -> (x at the next resolution, the features after each residual block)`."""

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        temb: int,
        config: UNetConfig,
        *,
        attention: bool,
        last: bool,
    ) -> None:
        super().__init__(sizes, temb, config, attention=attention)
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(sizes[-1][1])])

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor, cond: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, temb, cond)
            features.append(x)
        for down in self.downsamplers:
            x = down(x)
        return x, features


class MidBlock(Block):
    """resnets.0, attentions.0, resnets.1."""

    def __init__(self, channels: int, temb: int, config: UNetConfig) -> None:
        super().__init__([(channels, channels)] * 2, temb, config, attention=True)
        del self.attentions[1]

    def forward(self, x: torch.Tensor, temb: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.layer(1, self.layer(0, x, temb, cond), temb, cond)


class UpBlock(Block):
    """`(x, features of the down block of this resolution) -> x at the next resolution`."""

    def __init__(
        self,
        sizes: list[tuple[int, int]],
        temb: int,
        config: UNetConfig,
        *,
        attention: bool,
        last: bool,
    ) -> None:
        super().__init__(sizes, temb, config, attention=attention)
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(sizes[-1][1])])

    def forward(
        self,
        x: torch.Tensor,
        features: list[torch.Tensor],
        temb: torch.Tensor,
        cond: torch.Tensor,
    ) -> torch.Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, torch.cat([x, features[-1 - i]], dim=1), temb, cond)
        for up in self.upsamplers:
            x = up(x)
        return x


class UNet(nn.Module):
    """`unet(x [B, C, H, W], t int64 [B], cond [B, L, D]) -> [B, C, H, W]`; H and W divide by 2 to
    the number of levels.
    """

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        widths = config.block_out_channels
        temb = 4 * widths[0]
        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(widths[0], temb), "linear_2": nn.Linear(temb, temb)}
        )
        self.conv_in = nn.Conv2d(4 * config.in_channels, widths[0], 3, padding=1)

        levels = list(zip(widths, config.attention, strict=True))
        n, last, end = config.layers_per_block, widths[0], len(widths) - 1
        self.down_blocks = nn.ModuleList()
        for i, (width, attention) in enumerate(levels):
            sizes = [(last, width)] + [(width, width)] * (n - 1)
            block = DownBlock(sizes, temb, config, attention=attention, last=i == end)
            self.down_blocks.append(block)
            last = width
        self.mid_block = MidBlock(last, temb, config)
        self.up_blocks = nn.ModuleList()
        for i, (width, attention) in reversed(list(enumerate(levels))):
            sizes = [(last + width, width)] + [(2 * width, width)] * (n - 1)
            block = UpBlock(sizes, temb, config, attention=attention, last=i == 0)
            self.up_blocks.append(block)
            last = width

        self.conv_norm_out = nn.GroupNorm(config.groups, last)
        self.conv_out = nn.Conv2d(last, 4 * config.in_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)

    def time_proj(self, t: torch.Tensor) -> torch.Tensor:
        """`[cos(t f), sin(t f)]` [B, C] with frequencies f from 1 down to 1e-4, in float32."""
        half = self.config.block_out_channels[0] // 2
        f = torch.exp(
            torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(1e4) / half)
        )
        angles = t.to(torch.float32)[:, None] * f
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        temb = self.time_proj(t).to(x.dtype)
        temb = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](temb)))

        h = self.conv_in(F.pixel_unshuffle(x, 2))
        skips = []
        for block in self.down_blocks:
            h, features = block(h, temb, cond)
            skips.append(features)
        h = self.mid_block(h, temb, cond)
        for block in self.up_blocks:
            h = block(h, skips.pop(), temb, cond)
        h = self.conv_out(F.silu(self.conv_norm_out(h)))
        return F.pixel_shuffle(h, 2)
