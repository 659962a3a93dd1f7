"""Which base model a file is for, as far as its metadata, module names and shapes tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fastlora.formats.changes import AdapterFile, Change, Target
from fastlora.formats.files import FormatError
from fastlora.formats.measures import shape_of

_METADATA = ("modelspec.architecture", "ss_base_model_version")
_SPOKEN = {  # how the values of these begin
    "stable-diffusion-xl": "SDXL",
    "sdxl": "SDXL",
    "stable-diffusion-3": "SD3",
    "sd3": "SD3",
    "stable-diffusion-v2": "SD 2",
    "sd_v2": "SD 2",
    "stable-diffusion-v1": "SD 1",
    "sd_v1": "SD 1",
    "sd_1": "SD 1",
    "flux": "FLUX",
}
_CONTEXT = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}  # what a UNet's cross-attention reads
_ENCODERS = {768: "CLIP-L", 1024: "OpenCLIP-H", 1280: "OpenCLIP-bigG", 4096: "T5-XXL"}
_QUERIES = ("q_proj", "k_proj", "v_proj", "SelfAttention.q", "SelfAttention.k", "SelfAttention.v")


class Base(NamedTuple):
    name: str | None  # "SD 1", "SD 2", "SDXL", "SD3", "FLUX"; None: not told
    reason: str
    encoders: dict[str, str]  # by component: "CLIP-L", "T5-XXL", ...


def base_of(file: AdapterFile) -> Base:
    """Shapes come before metadata, which is copied along and may be old."""
    found = _by_layers(file.changes) or _by_metadata(file.metadata)
    name, reason = found or (None, "neither metadata nor layers tell")
    return Base(name, reason, _encoders(file.changes))


def _by_layers(changes: Mapping[Target, Change]) -> tuple[str, str] | None:
    for target, change in changes.items():
        parts = target.path.split(".")
        if parts[0] == "single_transformer_blocks" and len(parts) > 1:
            return "FLUX", "it has single_transformer_blocks"
        if parts[-2:] in (["attn2", "to_k"], ["attn2", "to_v"]):
            width = _inputs(change)
            if parts[0] in ("down_blocks", "mid_block", "up_blocks") and width in _CONTEXT:
                return _CONTEXT[width], f"cross-attention reads {width} channels"
        # FLUX has layers of that name too, of 3072 channels.
        if parts[-2:] == ["attn", "add_q_proj"] and _inputs(change) in (1536, 2432):
            return "SD3", f"joint attention of {_inputs(change)} channels"
    return None


def _by_metadata(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    for key in _METADATA:
        value = metadata.get(key, "").lower()
        for start, name in _SPOKEN.items():
            if value.startswith(start):
                return name, f"metadata says {key}: {metadata[key]}"
    return None


def _encoders(changes: Mapping[Target, Change]) -> dict[str, str]:
    found: dict[str, str] = {}
    for target, change in changes.items():
        if str(target).startswith("text_") and target.path.endswith(_QUERIES):
            name = _ENCODERS.get(_inputs(change) or 0)
            if name:
                found.setdefault(target.component, name)
    return found


def _inputs(change: Change) -> int | None:
    """In-features of a Linear, where the parts tell."""
    try:
        shape = shape_of(change)
    except FormatError:
        return None
    return shape[1] if len(shape) > 1 else None
