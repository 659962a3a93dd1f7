"""`inject` and `remove`: adapters go in and out of a model whose layers stay the same objects."""

from __future__ import annotations

import torch

from fastlora.adapters.adapted import base_class
from fastlora.adapters.attaching import attach, check_name, take_out
from fastlora.adapters.building import build
from fastlora.adapters.components import (
    Models,
    all_or_none,
    as_one,
    chosen_components,
    components_of,
    info_of_parts,
)
from fastlora.adapters.lookup import known_names, layers_of, require_known
from fastlora.adapters.selecting import Where, check_paths, select_each
from fastlora.adapters.slots import Slot
from fastlora.adapters.specs import AdapterError, AdapterInfo, LoRA, Spectral


# What is made under inference mode has to serve training later.
@torch.inference_mode(False)
def inject(
    model: Models,
    spec: LoRA | Spectral,
    where: Where = None,
    name: str = "default",
    seed: int | None = None,
    freeze: bool = True,
    dtype: torch.dtype | None = None,
) -> AdapterInfo:
    """Adds the adapter `name` to the layers that `where` selects and returns what was added.

    `where`: a regex that must match the whole module path, a list of path suffixes, a predicate
    `(path, module) -> bool`, or None for every layer that `spec` can adapt. LoRA adapts Linear,
    Conv2d and Embedding (subclasses of Linear through their own forward); Spectral the plain ones
    of these, ConvTranspose2d and norms. It decomposes every weight; `decompose` does that ahead.
    Each layer object stays what it was: it changes class, keeps its parameters and state-dict keys,
    and gets a child module `fastlora`.

    `model`: a module, or a dict of them by component ("unet", "text_encoder", ...), each of which
    gets the adapter as if it was the only one: paths are those within it. Those in which `where`
    selects nothing are left as they are. A pipeline does not say which of its parts are meant.

    `seed` fixes the initial values; without it they come from torch's default generator. `freeze`
    (the default) stops gradients of the model's own parameters; `remove` gives them back. `dtype`
    of the new parameters: the layer's or float32; by default the layer's, and float32 on a 16-bit
    or quantised base.

    Raises AdapterError when the name is taken or has a dot, nothing matches, a selected layer
    cannot be adapted, or the model is on the meta device. The model is unchanged then.
    """
    parts = chosen_components(model, "inject")
    check_name(as_one(model, "inject"), name)
    if not isinstance(spec, LoRA | Spectral):
        raise TypeError(f"inject: spec: expected LoRA or Spectral, got {type(spec).__name__}")
    chosen = select_each(parts, spec, where, "inject")
    check_paths(spec, {path for layers in chosen.values() for path in layers}, "inject")
    slots: dict[str, dict[str, Slot]] = {}
    for component, layers in chosen.items():
        generator = torch.default_generator
        if seed is not None:
            generator = torch.Generator()
            generator.manual_seed(seed)
        slots[component] = {p: build(p, m, spec, generator, dtype) for p, m in layers.items()}
    infos = all_or_none(
        slots,
        lambda component: attach(parts[component], slots[component], name, freeze=freeze),
        undo=lambda component: remove(parts[component], name),
    )
    return info_of_parts(infos)


def remove(model: Models, name: str) -> None:
    """Takes the adapter out, of all components that have it. Layers without any adapter and reserve
    get their class back: the plain model, with the same keys and the same bits. What injecting
    froze is given back once no adapter is left that was injected with `freeze`. Raises AdapterError
    for an unknown name."""
    one = as_one(model, "remove")
    require_known(one, name)
    for layer in layers_of(one):
        if not layer.foreign:
            base_class(type(layer))  # there is one to go back to
        elif name in layer.fastlora:
            raise AdapterError(
                f"remove: {name!r} is PEFT's: model.delete_adapter({name!r}), or of a pipeline "
                f"delete_adapters({name!r})"
            )
    for part in components_of(model, "remove").values():
        if name in known_names(part):
            take_out(part, name)
