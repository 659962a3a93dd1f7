"""Names of the original FLUX transformer, and diffusers' modules for the same rows.

The original computes queries, keys and values (and in single blocks the MLP's first layer) by one
matrix, whose rows diffusers has in several modules.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastlora.formats.names_grammar import INDEX


class Share(NamedTuple):
    """A module's path, and which rows of a name's it has: [first, last) of `total` equal parts."""

    path: str
    first: int = 0
    last: int = 1
    total: int = 1


def _shares(paths: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[Share, ...]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(
        Share(path, end - size, end, ends[-1])
        for path, size, end in zip(paths, sizes, ends, strict=True)
    )


def _stream(name: str, context: str, projection: str, out: str) -> dict[str, tuple[Share, ...]]:
    """The names in a double block of the image's or the text's stream."""
    qkv = tuple(f"attn.{projection.format(x)}" for x in "qkv")
    return {
        f"{name}_mod_lin": (Share(f"norm1{context}.linear"),),
        f"{name}_attn_qkv": _shares(qkv, (1, 1, 1)),
        f"{name}_attn_proj": (Share(f"attn.{out}"),),
        f"{name}_mlp_0": (Share(f"ff{context}.net.0.proj"),),
        f"{name}_mlp_2": (Share(f"ff{context}.net.2"),),
    }


_BLOCKS = {
    "double_blocks": (
        "transformer_blocks",
        _stream("img", "", "to_{}", "to_out.0")
        | _stream("txt", "_context", "add_{}_proj", "to_add_out"),
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {
            "modulation_lin": (Share("norm.linear"),),
            # The MLP is four times as wide as the stream.
            "linear1": _shares(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, 4)),
            "linear2": (Share("proj_out"),),
        },
    ),
}
# Not final_layer_adaLN_modulation_1: norm_out.linear has its halves, shift and scale, exchanged.
_STEM = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer_linear": "proj_out",
} | {
    f"{name}_in_{layer}_layer": f"time_text_embed.{embedder}_embedder.linear_{number}"
    for name, embedder in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
    for number, layer in enumerate(("in", "out"), 1)
}
_STEM_BACK = {path: flat for flat, path in _STEM.items()}
_BLOCKS_BACK = {
    blocks: {
        share.path: (original, flat, share) for flat, shares in names.items() for share in shares
    }
    for original, (blocks, names) in _BLOCKS.items()
}

_ORIGINAL = re.compile(rf"(double_blocks|single_blocks)_({INDEX})_(\w+)")
_DIFFUSERS = re.compile(rf"(transformer_blocks|single_transformer_blocks)\.({INDEX})\.(.+)")


def shares(flat: str) -> tuple[Share, ...]:
    """The modules of diffusers' FluxTransformer2DModel for an original name; none: unknown."""
    if flat in _STEM:
        return (Share(_STEM[flat]),)
    match = _ORIGINAL.fullmatch(flat)
    if match is None:
        return ()
    original, number, rest = match.groups()
    blocks, names = _BLOCKS[original]
    return tuple(
        share._replace(path=f"{blocks}.{number}.{share.path}") for share in names.get(rest, ())
    )


def from_diffusers(path: str) -> tuple[str, int, int, int] | None:
    """The original name of a module, and its rows there, [first, last) of `total` equal parts."""
    if path in _STEM_BACK:
        return _STEM_BACK[path], 0, 1, 1
    match = _DIFFUSERS.fullmatch(path)
    if match is None:
        return None
    blocks, number, rest = match.groups()
    if rest not in _BLOCKS_BACK[blocks]:
        return None
    original, flat, share = _BLOCKS_BACK[blocks][rest]
    return f"{original}_{number}_{flat}", share.first, share.last, share.total


def fused(path: str) -> tuple[str, int, int, int] | None:
    """The fused module of the original FLUX that a module of diffusers' is a part of.

    Its flat name, and the rows [first, last) of `total` equal parts; None for a module that is not
    fused with others there, or not known.
    """
    name = from_diffusers(path)
    return name if name is not None and name[3] > 1 else None
