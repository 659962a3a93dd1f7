"""Names of the original (LDM) UNet of Stable Diffusion 1, 2 and XL, and diffusers' for the same.

The original has one list of layers where diffusers has blocks of them. With two layers in a block,
as all of these models have, `input_blocks` is the first convolution and then, for each block, two
layers and a downsampler; `output_blocks` is three layers for each block, the last of which also has
the block's upsampler. A layer's parts are a resnet (0), an attention if the block has any (1), and
the upsampler: 2, or 1 without attention.
"""

from __future__ import annotations

import re

from fastlora.formats.names_grammar import INDEX, dotted

_STEM = {
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {"0": ("resnets", 0), "1": ("attentions", 0), "2": ("resnets", 1)}

_STEM_BACK = {path: flat for flat, path in _STEM.items()}
_RESNET_BACK = {path: flat for flat, path in _RESNET.items()}
_MIDDLE_BACK = {place: part for part, place in _MIDDLE.items()}

_ORIGINAL = re.compile(rf"(?:(input|output)_blocks_({INDEX})|middle_block)_([012])_(\w+)")
_DIFFUSERS = re.compile(
    rf"(?:(down|up)_blocks\.({INDEX})|mid_block)"
    rf"\.(resnets|attentions|downsamplers|upsamplers)\.({INDEX})\.(.+)"
)


def to_diffusers(flat: str) -> str | None:
    """The path in diffusers' UNet of an original name with underscores for dots; None: unknown."""
    if flat in _STEM:
        return _STEM[flat]
    match = _ORIGINAL.fullmatch(flat)
    if match is None:
        return None
    side, number, part, rest = match.groups()
    if side is None:
        return _inside("mid_block", *_MIDDLE[part], rest)
    block, layer = divmod(int(number) - (side == "input"), 3)
    if block < 0:
        return None
    if side == "input" and layer == 2:
        return f"down_blocks.{block}.downsamplers.0.conv" if (part, rest) == ("0", "op") else None
    if side == "output" and rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv" if layer == 2 and part != "0" else None
    if part == "2":
        return None
    kind = "resnets" if part == "0" else "attentions"
    return _inside(f"{'down' if side == 'input' else 'up'}_blocks.{block}", kind, layer, rest)


def from_diffusers(path: str) -> str | None:
    """The original name, with underscores for dots, of a module of diffusers' UNet of SDXL.

    None for what such a UNet does not have; only the form of a path is looked at, not its depth.
    """
    if path in _STEM_BACK:
        return _STEM_BACK[path]
    match = _DIFFUSERS.fullmatch(path)
    if match is None:
        return None
    side, block, kind, layer, rest = match.groups()
    if kind == "downsamplers" and side == "down":
        return f"input_blocks_{3 * int(block) + 3}_0_op"
    if kind == "upsamplers" and side == "up":
        return f"output_blocks_{3 * int(block) + 2}_2_conv"  # all of them come after attentions
    part = {"resnets": "0", "attentions": "1"}.get(kind)
    if side is None:
        part = _MIDDLE_BACK.get((kind, int(layer)))
    name = _RESNET_BACK.get(rest) if kind == "resnets" else rest.replace(".", "_")
    if part is None or name is None:
        return None
    if side is None:
        return f"middle_block_{part}_{name}"
    number = 3 * int(block) + int(layer)
    start = f"input_blocks_{number + 1}" if side == "down" else f"output_blocks_{number}"
    return f"{start}_{part}_{name}"


def _inside(block: str, kind: str, layer: int, rest: str) -> str | None:
    name = _RESNET.get(rest) if kind == "resnets" else dotted(rest)
    return None if name is None else f"{block}.{kind}.{layer}.{name}"
