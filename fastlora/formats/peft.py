"""PEFT's folder: adapter_model.safetensors and adapter_config.json, which has the scales.

Keys are `base_model.model.<module>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank];
`.lora_B.bias`; of an embedding `.lora_embedding_A` [rank, vocabulary] and `.lora_embedding_B`; with
DoRA `.lora_magnitude_vector`; of LoHa and LoKr `.hada_w1_a`, `.lokr_w1` and so on. In a model's own
state dict the adapter's name comes before `.weight`, and the prefix may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastlora.formats.changes import AdapterFile, Change, Packed, Target
from fastlora.formats.files import FormatError
from fastlora.formats.peft_config import read_settings, write_settings
from fastlora.formats.peft_layers import Entry, change_of, gather
from fastlora.formats.peft_writing import all_dora, layers_of, tensors_of

PREFIX = "base_model.model."
KEY = re.compile(
    r"(?:(?P<path>.+)\.)?"
    r"(?P<parameter>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector"
    r"|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"
    r"(?:\.(?P<adapter>[^.]+?))??(?P<ending>\.weight|\.bias)?"
)
ENDINGS = {  # of other parameters: none
    "lora_A": (".weight",),
    "lora_B": (".weight", ".bias"),
    "lora_magnitude_vector": (None, ".weight"),
}


def unpack(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
) -> AdapterFile:
    """The changes of a LoRA, LoHa or LoKr; `config`: adapter_config.json.

    A tensor of the base that was trained or saved along is unused: it is no update of a weight.
    Raises FormatError without config, as no tensor tells alpha, and for whatever does not fit it.
    """
    if config is None:
        raise FormatError(
            "PEFT's keys need the adapter_config.json that belongs beside the file: it has alpha; "
            "where it is lost, write one there with what the training had: "
            '{"peft_type": "LORA", "r": ..., "lora_alpha": ...}'
        )
    try:
        settings = read_settings(config)
    except FormatError as error:
        raise FormatError(f"adapter_config.json: {error}") from None
    modules, others = gather(tensors, entry_of)
    if not modules:
        raise FormatError(f"expected PEFT's keys, got {others[:3] or 'no keys'}")
    return AdapterFile(
        "peft",
        {target: change_of(target, parts, settings) for target, parts in modules.items()},
        {key: reason(key) for key in others},
        dict(metadata),
    )


def pack(changes: Mapping[Target, Change]) -> Packed:
    """A LoRA's tensors and its adapter_config.json, for one model: the component is left out.

    Where only some layers are rank stabilised, the alphas of those say so. Where only some have a
    bias, the others have zeros. PEFT looks for the end of a path: where the model has another
    module whose path ends with all of a target's, it adds an update of zero there. Raises
    FormatError for two components, for DoRA of some layers only, and for what is no LoRA.
    """
    components = sorted({target.component for target in changes})
    if len(components) > 1:
        raise FormatError(f"PEFT's folder is for one model; write each of {components} by itself")
    layers = layers_of(changes, "PEFT's format")
    dora = all_dora(layers, "PEFT's format")
    bias = any(layer.bias is not None for layer in layers.values())
    embedding = next((t for t, layer in layers.items() if layer.weight.embedding), None)
    if bias and embedding is not None:
        raise FormatError(f"{embedding}: PEFT's format has no embedding beside layers with a bias")
    tensors: dict[str, Tensor] = {}
    for target, layer in layers.items():
        tensors.update(tensors_of(PREFIX + target.path, layer, bias))
    weights = {target.path: layer.weight for target, layer in layers.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        **write_settings(weights, dora, bias),
    }
    return Packed(tensors, {"format": "pt"}, config)


def entry_of(key: str) -> Entry | None:
    """What a key means; None for one that is not of an adapter."""
    found = split(key.removeprefix(PREFIX))
    return None if found is None else Entry(Target("", found[0]), *found[1:])


def split(key: str) -> tuple[str, str, str | None] | None:
    """Path, parameter ("lora_A", "lora_B.bias", "hada_w1_a", ...) and the adapter's name if any."""
    match = KEY.fullmatch(key)
    if match is None:
        return None
    path, parameter, adapter, ending = match.groups()
    if ending not in ENDINGS.get(parameter, (None,)):
        return None
    return path or "", f"{parameter}.bias" if ending == ".bias" else parameter, adapter


def reason(key: str) -> str:
    """Why a key of a PEFT file is unused."""
    if "trainable_tokens" in key:
        return "rows of an embedding (trainable tokens), no update of a weight"
    if ".lora_" in key or ".hada_" in key or ".lokr_" in key:
        return "no parameter that is known of a LoRA, LoHa or LoKr"
    if ".base_layer." in key and not key.endswith(".bias"):
        return "a weight of the base, saved beside the adapter"
    if key.endswith(".bias"):
        return "a bias of the base, trained along or of a module in modules_to_save"
    if key.startswith(PREFIX):
        return "a weight of the base, of a module in modules_to_save"
    return "not a key of PEFT's format"
