"""A Change as a layer of PEFT's format, which diffusers' files have too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from fastlora.formats.changes import Change, LowRank, Target
from fastlora.formats.files import FormatError


class Layer(NamedTuple):
    """A change that the format can hold."""

    weight: LowRank
    bias: Tensor | None
    magnitude: Tensor | None


def layers_of(changes: Mapping[Target, Change], format: str) -> dict[Target, Layer]:
    """Each change as a LoRA of the module itself.

    Raises FormatError naming the first target that the format cannot hold.
    """
    layers: dict[Target, Layer] = {}
    for target, change in changes.items():
        refusal = _refusal(target, change)
        if refusal is not None:
            raise FormatError(f"{target}: {format} cannot hold it: {refusal}")
        layers[target] = Layer(_own_rows(change), change.bias, change.magnitude)
    if not layers:
        raise FormatError(f"{format}: expected at least one change, got none")
    return layers


def all_dora(layers: Mapping[Target, Layer], format: str) -> bool:
    """Whether the layers have magnitudes. Raises FormatError where only some have."""
    plain = [target for target, layer in layers.items() if layer.magnitude is None]
    if plain and len(plain) < len(layers):
        raise FormatError(
            f"{plain[0]}: {format} cannot hold it beside DoRA: a file has magnitudes for all "
            "modules or for none; write two files"
        )
    return not plain


def tensors_of(
    name: str, layer: Layer, bias: bool, magnitude: str = "lora_magnitude_vector"
) -> dict[str, Tensor]:
    """PEFT's tensors of a module; `bias`: with a bias, zero where the layer has none."""
    low = layer.weight
    if low.embedding:
        tensors = {f"{name}.lora_embedding_A": low.down, f"{name}.lora_embedding_B": low.up}
    else:
        tensors = {f"{name}.lora_A.weight": low.down, f"{name}.lora_B.weight": low.up}
    if bias:
        own = low.up.new_zeros(len(low.up)) if layer.bias is None else layer.bias / low.ratio
        tensors[f"{name}.lora_B.bias"] = own
    if layer.magnitude is not None:
        tensors[f"{name}.{magnitude}"] = magnitude_of(layer)
    return tensors


def magnitude_of(layer: Layer) -> Tensor:
    """[out], of a convolution [1, out, 1, ...]."""
    assert layer.magnitude is not None
    extra = layer.weight.down.dim() - 2
    return layer.magnitude.view(1, -1, *[1] * extra) if extra else layer.magnitude


def _refusal(target: Target, change: Change) -> str | None:
    """Why a LoRA of PEFT cannot be this change, and what can; None where it can."""
    if not target.path:
        return "the model is itself the layer, which has no name there"
    if target.flat:
        return (
            "expected the path of a module, whose dots this name does not tell; load it into the "
            "model, and save that"
        )
    low = change.weight
    if not isinstance(low, LowRank):
        return (
            f"expected a low rank update, got {change.kind}; write a lycoris file, of which "
            "fastlora convert --rank makes LoRAs"
        )
    if change.magnitude is not None and change.axis != ("in" if low.embedding else "out"):
        return "its magnitudes are of inputs; keep LyCORIS' format"
    if change.bias is not None and (change.magnitude is not None or low.embedding):
        return "a bias beside DoRA, or of an embedding; keep LyCORIS' format"
    if change.bias is not None and low.ratio == 0:
        return "a bias beside alpha 0"
    if low.up.shape[1] != low.rank:
        return "a grouped convolution, of which PEFT has no update"
    return None


def _own_rows(change: Change) -> LowRank:
    assert isinstance(change.weight, LowRank)
    low = change.weight.without_mid()
    if change.rows is None:
        return low
    first, last, _ = change.rows
    return replace(low, up=low.up[first:last])
