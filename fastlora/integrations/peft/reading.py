"""What one of PEFT's layers has, adapter by adapter, in the terms of a slot."""

from __future__ import annotations

from typing import Any, NamedTuple

from peft.tuners.lora.dora import DoraConv2dLayer, DoraEmbeddingLayer, DoraLinearLayer
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.tuners.lora.variants import DoraConv2dVariant, DoraEmbeddingVariant, DoraLinearVariant
from torch import Tensor, nn

from fastlora.adapters.fitting import lora_of
from fastlora.adapters.lookup import HOST
from fastlora.adapters.specs import AdapterError, LoRA, fits_float32
from fastlora.integrations.peft.hosts import BesideHost, hooks_of, takes
from fastlora.integrations.peft.slots import PeftSlot, Place

DORA = {
    DoraLinearVariant: DoraLinearLayer,
    DoraConv2dVariant: DoraConv2dLayer,
    DoraEmbeddingVariant: DoraEmbeddingLayer,
}


class Found(NamedTuple):
    """An adapter of a layer that fastlora computes."""

    places: dict[str, Place]
    spec: LoRA
    dropout: nn.Module  # which its input goes through
    bias: dict[str, Any] | None  # the parameters with its own "bias" (lora_bias)
    modules: tuple[nn.Module, ...]  # which the fused way does not call, the dropout among them

    @property
    def dora(self) -> bool:
        return self.spec.dora

    @property
    def watched(self) -> bool:
        """Whether somebody asks to hear of calls that the fused way does not make."""
        return any("forward" in vars(m) or any(hooks_of(m)) for m in self.modules)

    def is_of(self, slot: PeftSlot) -> bool:
        """Whether a slot was made of this."""
        own = slot._parameters.places  # type: ignore[attr-defined]
        same = own.keys() == self.places.keys() and all(
            own[k][0] is self.places[k][0] and own[k][1] == self.places[k][1] for k in own
        )
        return same and slot.spec == self.spec


def found_in(layer: LoraLayer) -> dict[str, Found]:
    """The adapters of a layer that fastlora computes; PEFT has to compute the others: variants but
    DoRA, dtypes that need a cast of the input, scalings that are tensors or not finite."""
    if layer.ephemeral_gpu_offload or not getattr(layer, "cast_input_dtype_enabled", True):
        return {}
    found = {name: one(layer, name) for name in layer.scaling}
    return {name: adapter for name, adapter in found.items() if adapter is not None}


def one(layer: LoraLayer, name: str) -> Found | None:
    variant, host = layer.lora_variant.get(name), vars(layer).get(HOST)
    if variant is not None and (type(variant) not in DORA or isinstance(host, BesideHost)):
        return None
    scaling = layer.scaling[name]
    if not isinstance(scaling, int | float) or not fits_float32(scaling):
        return None
    places, modules = parts(layer, name)
    if not places:
        return None
    if variant is not None:
        vectors = layer.lora_magnitude_vector
        if name not in vectors or type(vectors[name]) is not DORA[type(variant)]:
            return None  # of another kind, or in the making
        vector = vectors[name]
        places["magnitude"] = vector._parameters, "weight"
        modules.append(vector)
    weight = layer.get_base_layer().weight
    tensors: list[Any] = [own.get(key) for own, key in places.values()]
    if not isinstance(weight, Tensor) or not all(takes(weight, tensor) for tensor in tensors):
        return None
    rank = tensors[0].shape[0]
    try:
        spec = lora_of(rank, layer.lora_alpha[name], bool(layer.use_rslora.get(name)), 0.0,
                       variant is not None)  # fmt: skip
    except AdapterError:  # an alpha of zero, or none that is a number
        return None
    dropout = layer.lora_dropout[name]
    up = modules[1] if len(modules) > 1 and layer.lora_bias.get(name) else None
    bias = None if up is None else up._parameters
    return Found(places, spec, dropout, bias, (*modules, dropout))


def parts(layer: LoraLayer, name: str) -> tuple[dict[str, Place], list[nn.Module]]:
    """Where D and U of an adapter are, and the modules that have them; nothing where they are not
    plain ones."""
    if isinstance(layer, Embedding):
        base = layer.get_base_layer()
        hooked = layer.input_fns.get(name) or layer.output_fns.get(name)  # tensor parallelism
        if name not in layer.lora_embedding_A or base.max_norm is not None or hooked:
            return {}, []
        down, up = layer.lora_embedding_A._parameters, layer.lora_embedding_B._parameters
        return {"down": (down, name), "up": (up, name)}, []
    if name not in layer.lora_A or name not in layer.lora_B:
        return {}, []
    modules: list[nn.Module] = [layer.lora_A[name], layer.lora_B[name]]
    if any(type(module) not in (nn.Linear, nn.Conv2d) for module in modules):
        return {}, []
    down, up = (module._parameters for module in modules)
    if "weight" not in down or "weight" not in up:  # parametrised
        return {}, []
    return {"down": (down, "weight"), "up": (up, "weight")}, modules
