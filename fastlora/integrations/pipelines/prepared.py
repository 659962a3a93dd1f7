"""A LoRA as diffusers' own loading code takes it: exact names, ranks and alphas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Prepared(dict[str, Tensor]):
    """Tensors by PEFT's keys with the component in front, "unet.mid_block.….lora_A.weight", and
    PEFT's settings, with it in front too: "unet.alpha_pattern"."""

    def __init__(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.settings = dict(settings)

    def copy(self) -> Prepared:  # which diffusers calls
        return Prepared(self, self.settings)


def lora_state_dict(base: Any, given: Any, kwargs: Mapping[str, Any]) -> Any:
    """`base.lora_state_dict`; of a Prepared its tensors and settings.

    diffusers takes a dict to have no settings, and then guesses ranks and alphas: ones that differ
    between modules are lost on the way.
    """
    if not isinstance(given, Prepared):
        return base.lora_state_dict(given, **kwargs)
    result = base.lora_state_dict(dict(given), **kwargs)
    if not isinstance(result, tuple):
        return result
    tensors, *alphas, _ = result
    if tensors.keys() != given.keys():  # these are its own names, which it has to leave alone
        changed = sorted(tensors.keys() ^ given.keys())
        raise RuntimeError(f"{base.__name__}.lora_state_dict renames {', '.join(changed[:3])}")
    named = {_in_text_encoders(key): tensor for key, tensor in tensors.items()}
    return (named, *alphas, given.settings)


def _in_text_encoders(key: str) -> str:
    """The key in diffusers' older style, by which it tells a text encoder's file: it takes PEFT's
    for its own where there is attention in it alone."""
    if not key.startswith("text_encoder"):
        return key
    return key.replace(".lora_A.weight", ".lora_linear_layer.down.weight").replace(
        ".lora_B.weight", ".lora_linear_layer.up.weight"
    )
