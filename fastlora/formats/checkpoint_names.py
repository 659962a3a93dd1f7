"""What the keys of a checkpoint mean: modules of diffusers' and transformers' models.

Such models' own keys are `<module>.<parameter>`. Files of the original implementations (one file
for a whole pipeline) have other names, and tensors that are several modules here, one after another
in rows: FLUX's and OpenCLIP's queries, keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from fastlora.formats import names
from fastlora.formats.changes import Target
from fastlora.formats.names_grammar import INDEX


class Slice(NamedTuple):
    """Where a parameter is: the rows [first, last) of `total` equal parts of a tensor."""

    key: str
    first: int = 0
    last: int = 1
    total: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """The view of the tensor that is the parameter."""
        if self.total == 1:
            return tensor
        size = tensor.shape[0] // self.total
        return tensor[self.first * size : self.last * size]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        if self.total == 1:
            return whole
        return (whole[0] // self.total * (self.last - self.first), *whole[1:])


Modules = dict[Target, dict[str, Slice]]  # the parameters of every module, by name

_ORIGINAL = ("input_blocks.", "double_blocks.")  # how models of these begin, and no others
_DENOISER = "model.diffusion_model."
_CLIP = {  # whose names are transformers' own
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
_OPEN_CLIP = {
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
_OPEN_CLIP_STEM = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(rf"transformer\.resblocks\.({INDEX})\.(.+?)[._](weight|bias)")


def modules_of(keys: Iterable[str], component: str = "") -> Modules:
    """The modules of a file's keys. `component`: what the file is, where its names do not say it.

    Keys without a meaning, as those of an original autoencoder, are left out.
    """
    keys = list(keys)
    original = any(key.startswith(_ORIGINAL) for key in keys)
    whole = any(key.startswith(_DENOISER) for key in keys)
    found: Modules = {}
    for key in keys:
        if whole:
            parameters = _of_pipeline(key)
        elif original:
            parameters = _of_denoiser(key, key)
        else:
            path, _, name = key.rpartition(".")
            parameters = [(Target(component, path), name, Slice(key))]
        for target, name, where in parameters:
            found.setdefault(target, {})[name] = where
    return found


Parameters = list[tuple[Target, str, Slice]]


def _of_pipeline(key: str) -> Parameters:
    if key.startswith(_DENOISER):
        return _of_denoiser(key, key.removeprefix(_DENOISER))
    for start, component in _CLIP.items():
        if key.startswith(start):
            path, _, name = key.removeprefix(start).rpartition(".")
            return [(Target(component, path), name, Slice(key))]
    for start, component in _OPEN_CLIP.items():
        if key.startswith(start):
            return _of_open_clip(key, key.removeprefix(start), component)
    return []


def _of_denoiser(key: str, name: str) -> Parameters:
    path, _, parameter = name.rpartition(".")
    return [
        (place.target, parameter, Slice(key, place.first, place.last, place.total))
        for place in names.places("lora_unet", path.replace(".", "_"))
    ]


def _of_open_clip(key: str, name: str, component: str) -> Parameters:
    """Not its last projection, a matrix that transformers has transposed."""
    if name in _OPEN_CLIP_STEM:
        path, _, parameter = _OPEN_CLIP_STEM[name].rpartition(".")
        return [(Target(component, f"text_model.{path}"), parameter, Slice(key))]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return []
    number, layer, parameter = match.groups()
    start = f"text_model.encoder.layers.{number}"
    if layer == "attn.in_proj":
        return [
            (Target(component, f"{start}.self_attn.{x}_proj"), parameter, Slice(key, i, i + 1, 3))
            for i, x in enumerate("qkv")
        ]
    if layer not in _OPEN_CLIP_BLOCK:
        return []
    return [(Target(component, f"{start}.{_OPEN_CLIP_BLOCK[layer]}"), parameter, Slice(key))]
