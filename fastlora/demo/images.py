"""Pictures of pictures: enlarged, in rows, with labels, as PNG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import torch

GREY = (125, 133, 144, 255)  # legible on white and on black


def enlarged(images: torch.Tensor, scale: int = 2) -> Any:
    """A grey PIL image of pictures [R, C, 1, H, W] in [-1, 1] side by side, each enlarged alone
    (Lanczos), so that nothing of a neighbour shows at its edge. Ink below 0.03, the haze that
    samples have, is left out of it.
    """
    from PIL import Image

    rows, columns, _, height, width = images.shape
    size = (width * scale, height * scale)
    sheet = Image.new("L", (columns * size[0], rows * size[1]))
    ink = ((images[:, :, 0] + 1) / 2 - 0.03) / 0.95
    pixels = (ink.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    for r in range(rows):
        for c in range(columns):
            tile = Image.fromarray(pixels[r, c]).resize(size, Image.Resampling.LANCZOS)
            sheet.paste(tile, (c * size[0], r * size[1]))
    return sheet


def sheet(
    images: torch.Tensor,  # [R, C, 1, H, W]
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    scale: int = 3,
    gap: int = 6,
) -> Any:
    """A PIL image of rows of rounded tiles with labels, transparent around them."""
    from PIL import Image, ImageDraw, ImageFont

    count, across, _, height, width = images.shape
    font = ImageFont.load_default(17)
    rows, columns = ([drawable(text) for text in texts] for texts in (rows, columns))
    # glyphs reach a little beyond their advance, so the edge is not where a text's length ends
    left = 18 + max((math.ceil(font.getlength(text)) for text in rows), default=-18)
    top = 30 if columns else 0
    w, h = width * scale, height * scale
    canvas = Image.new("RGBA", (left + across * (w + gap) - gap, top + count * (h + gap) - gap))
    draw = ImageDraw.Draw(canvas)
    mask = Image.new("L", (2 * w, 2 * h))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 2 * w - 1, 2 * h - 1), 20, fill=255)
    mask = mask.resize((w, h))
    for r in range(count):
        y = top + r * (h + gap)
        if rows:
            draw.text((left - 14, y + h / 2), rows[r], GREY, font, anchor="rm")
        for c in range(across):
            tile = enlarged(images[r : r + 1, c : c + 1], scale).convert("RGBA")
            canvas.paste(tile, (left + c * (w + gap), y), mask)
    for c, text in enumerate(columns):
        draw.text((left + c * (w + gap) + w / 2, 20), text, GREY, font, anchor="mb")
    return canvas


def png(image: Any) -> bytes:
    buffer = io.BytesIO()
    if image.mode == "RGBA":  # greys and their transparency: a fraction of the bytes
        image = image.convert("LA")
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_uri(image: Any) -> str:
    """A picture inside a page."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def drawable(text: str) -> str:
    """A label for a PNG: Pillow's own font has no minus sign and would draw an empty box."""
    return text.replace("−", "-")


def signed(strength: float) -> str:
    """A strength as people write it: a real minus, and a plus."""
    return "0" if strength == 0 else f"{strength:+g}".replace("-", "−")
