"""`inject` and `remove`: adapters go in and out of a model whose layers stay the same objects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastlora.adapters.adapted import Adapted, adapted_class, base_class
from fastlora.adapters.arena import Arena, Scale, require_finite
from fastlora.adapters.components import (
    Models,
    all_or_none,
    as_one,
    chosen_components,
    components_of,
    info_of_parts,
)
from fastlora.adapters.control import adapters
from fastlora.adapters.deltas import Delta
from fastlora.adapters.dora import magnitude
from fastlora.adapters.factor_cache import FactorCache, folder_of
from fastlora.adapters.factorising import HELD, factorise, rank_of
from fastlora.adapters.folding import (
    check_plain,
    check_strengths,
    differs_per_sample,
    folded_by,
    is_folded,
    refolding,
)
from fastlora.adapters.hooked import is_bypassed
from fastlora.adapters.layers import LinearForward
from fastlora.adapters.lookup import (
    arenas,
    base_modules,
    known_names,
    layers_of,
    modules_by_path,
    require_known,
)
from fastlora.adapters.slots import (
    LoRASlot,
    Slot,
    Slots,
    SpectralSlot,
    kaiming_uniform,
    one_strength,
    shapes_lora,
)
from fastlora.adapters.specs import AdapterError, AdapterInfo, LoRA, Spectral
from fastlora.adapters.surgery import (
    adapt,
    check_mergeable,
    forget_walks,
    freeze_base,
    merge,
    restore,
    tell_neighbours,
    thaw,
)
from fastlora.adapters.tensors import COMPUTED, is_plain, too_large

Where = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
PLAIN = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


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


def check_paths(spec: LoRA | Spectral, chosen: Iterable[str], what: str) -> None:
    """Raises AdapterError where a LoRA has settings for layers that are not adapted."""
    if isinstance(spec, LoRA):
        strangers = sorted({*(spec.ranks or ()), *(spec.alphas or ())} - set(chosen))
        if strangers:
            raise AdapterError(
                f"{what}: ranks, alphas: expected paths of adapted layers, got {strangers[:5]}"
            )


def check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(Slots(), name):
        reserved = " (reserved)" if isinstance(name, str) and name and "." not in name else ""
        raise AdapterError(f"adapter name: expected a word without dots, got {name!r}{reserved}")
    if name in known_names(model):
        raise AdapterError(f"adapter name: {name!r} exists already; remove it first")


def attach(
    model: nn.Module,
    slots: dict[str, Slot],
    name: str,
    *,
    freeze: bool = True,
    scale: Scale | None = None,
) -> AdapterInfo:
    """Puts ready slots into the layers at their paths, with a strength (a checked one; None: what
    the name has, or 1); raises AdapterError before the first change or never."""
    modules = modules_by_path(model)
    found = arenas(model)
    new = {} if scale is None else {name: scale}
    check_mergeable(found, new)
    check_strengths(folded_by(found), new)
    if scale is not None:
        require_finite(name, scale, max(abs(slot.ratio) for slot in slots.values()))
    kept = (arena.scales.get(name) for arena in found)
    if any(isinstance(s, Tensor) for s in (scale, *kept)):
        check_per_sample(name, slots)
    for path, slot in slots.items():
        check_room(path, modules[path], slot)
    undecomposed = {
        path: modules[path]
        for path, slot in slots.items()
        if isinstance(slot, SpectralSlot) and needs_factors(modules[path])
    }
    cache = FactorCache(folder_of(True), writes=False)
    tasks = factorise(undecomposed, None, cache, "inject")
    if found and is_folded(model):
        if isinstance(scale, Tensor):
            raise differs_per_sample(name)
        for path in slots:
            check_plain(path, modules[path])
    with refolding(model) if found else nullcontext():
        arena = merge(found) if found else Arena()
        if freeze:
            freeze_base(model)
            arena.froze.add(name)
        for path, slot in slots.items():
            layer = adapt(modules[path], path, arena)
            holder = layer.fastlora
            factors = tasks[path].found if path in tasks else None
            if factors is not None:
                holder.svd_u, holder.svd_s, holder.svd_vh = factors[:3]
                vars(layer).pop(HELD, None)
            holder[name] = slot
            if holder.takes(slot):
                holder.enter(name)
            slot.train(layer.training)
        arena.scales |= new
        arena.layout()
    tell_neighbours(model)
    cache.warn()
    return adapters(model)[name]


def check_per_sample(name: str, slots: Mapping[str, Slot]) -> None:
    """Raises AdapterError for the first slot whose strength cannot differ per sample."""
    for path, slot in slots.items():
        if slot.whole:
            raise AdapterError(one_strength(path, name, slot))


def check_room(path: str, module: nn.Module, slot: Slot, without: str = "") -> None:
    """Raises AdapterError where the layer has a reserve and the slot does not fit into it, for its
    rank or the range of its values; `without` is an adapter that leaves."""
    if isinstance(module, Adapted) and module.fastlora.takes(slot):
        holder = module.fastlora
        room = holder.room(without)
        if slot.width > room:
            raise AdapterError(
                f"{path}: its reserve of rank {holder.capacity} has room for {room} more and the "
                f"adapter has rank {slot.width}; reserve more, or remove an adapter"
            )
        for key in slot.owned:
            largest = too_large(getattr(slot, key), holder.reserved_down.dtype)
            if largest is not None:
                raise AdapterError(
                    f"{path}: {key}: its reserve is {holder.reserved_down.dtype}, which cannot "
                    f"hold {largest:.6g}; reserve with dtype=torch.float32"
                )


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


def take_out(model: nn.Module, name: str) -> None:
    with refolding(model):
        found = arenas(model)
        for layer in layers_of(model):
            if name in layer.fastlora:
                take_slot(layer, name)
        for arena in found:
            arena.layout()
    tell_neighbours(model)
    thaw(model, found)
    if not layers_of(model):
        forget_walks(model)


def take_slot(layer: Adapted, name: str, keep: bool = False) -> None:
    """Takes an adapter out of one layer, which is the plain one again where nothing else is in it
    unless another is about to come (`keep`). The arena keeps its entries until it is laid out."""
    holder = layer.fastlora
    if name in holder.reserved_rows:
        holder.leave(name)
    del holder[name]
    if not holder.shifted():
        holder.svd_u = holder.svd_s = holder.svd_vh = None
    if not keep and not len(holder) and not holder.capacity:
        restore(layer)


# --- selection ------------------------------------------------------------------------------------


class NoLayer(AdapterError):
    """Nothing is selected, which is no error where another model of several has what is meant."""


def select(
    model: nn.Module,
    spec: LoRA | Spectral,
    where: Where,
    what: str = "inject",
    meta: bool = False,
) -> dict[str, nn.Module]:
    """The layers that `where` names, each of which `spec` can adapt; `what` is for messages. With
    `meta` they need no values."""
    matches = matcher(where, what)
    base = {id(module) for _, module in base_modules(model)}
    chosen: dict[str, nn.Module] = {}
    refused: list[str] = []
    for path, module in modules_by_path(model).items():
        if id(module) not in base or not matches(path, module):
            continue
        reason = unsuitable(module, spec)
        if reason is None:
            if not any(module is m for m in chosen.values()):
                chosen[path] = module
        elif reason and is_layer(module):
            refused.append(f"{path} ({type(module).__name__}): {reason}")
    if refused and where is not None:
        raise AdapterError(
            f"{what}: where selects layers that cannot be adapted: " + "; ".join(refused)
        )
    if not chosen:
        candidates = [p for p, m in base_modules(model) if unsuitable(m, spec) is None][:5]
        raise NoLayer(
            f"{what}: where: {where!r} matches no layer that {type(spec).__name__} can adapt; "
            f"this model has for example {candidates}" + "".join(f"; {r}" for r in refused[:1])
        )
    empty = [p for p, m in chosen.items() if any(q.is_meta for q in m.parameters(recurse=False))]
    if empty and not meta:
        raise AdapterError(
            f"{what}: {empty[0]}: the model is on the meta device and has no weights to adapt; "
            "load it first (model.to_empty and load_state_dict)"
        )
    return chosen


def select_each(
    parts: Mapping[str, nn.Module], spec: LoRA | Spectral, where: Where, what: str
) -> dict[str, dict[str, nn.Module]]:
    """`select` in each of several models, by component; those in which `where` matches nothing are
    left out. Raises AdapterError, as `select`, if it matches nothing in any."""
    chosen: dict[str, dict[str, nn.Module]] = {}
    nothing: list[NoLayer] = []
    for component, part in parts.items():
        named = f"{what}: {component}" if component else what
        try:
            chosen[component] = select(part, spec, where, named)
        except NoLayer as error:
            nothing.append(error)
    if not chosen:
        raise nothing[0]
    return chosen


def is_layer(module: nn.Module) -> bool:
    """Not a container, and not an activation or a dropout: somebody may have meant to adapt it."""
    leaf = isinstance(module, Adapted) or not any(module.children())
    return leaf and any(t is not None for t in (*module._parameters.values(), *module.buffers()))


def matcher(where: Where, what: str) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda path, module: True
    if isinstance(where, str):
        try:
            pattern = re.compile(where)
        except re.error as error:
            raise AdapterError(f"{what}: where: {where!r} is not a regex: {error}") from None
        return lambda path, module: pattern.fullmatch(path) is not None
    if callable(where):
        return where
    if not isinstance(where, Iterable):
        raise AdapterError(
            f"{what}: where: expected a regex, suffixes, a predicate or None, got {where!r}"
        )
    suffixes = list(where)
    return lambda path, module: any(path == s or path.endswith("." + s) for s in suffixes)


def unsuitable(module: nn.Module, spec: LoRA | Spectral | Delta) -> str | None:
    """None if `spec` can adapt the module, else why not; empty if nobody needs to be told."""
    base = base_class(type(module)) if isinstance(module, Adapted) else type(module)
    if issubclass(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention reads this layer's weight and never calls it"
    kind = adapted_class(base)
    if kind is None:
        if is_peft(module):
            return (
                f"it is PEFT's ({base.__module__}); first fastlora.accelerate(model), after which "
                "its base layer can be adapted, or model.unload()"
            )
        if issubclass(base, nn.Linear):
            return (
                f"this kind of layer is not supported: {base.__module__} made it of classes that "
                "cannot be exchanged; quantise with torchao or bitsandbytes instead"
            )
        return "this kind of layer is not supported"
    if is_bypassed(module):
        return (
            "its forward was put on the object itself and goes past its class, so past adapters; "
            "undo that first"
        )
    if any(is_lazy(p) for p in module._parameters.values() if p is not None):
        return "its weight has no shape yet; run the model once first"
    if base in NORMS:
        if isinstance(spec, LoRA):
            return "LoRA needs a matrix"
        if isinstance(spec, Delta):
            return None if module.weight is not None else "it has no weight"
        return None if spec.norms != "skip" and module.weight is not None else ""
    weight: Any = module.weight
    if not weight.numel():
        return "its weight is empty"
    if weight.is_complex():
        return "its weight is complex"
    if base in PLAIN and weight.is_floating_point() and weight.dtype not in COMPUTED:
        return (
            f"its weight is {weight.dtype}, in which no layer computes: what converts it at every "
            "call (layerwise casting) would round the adapter to it; quantise the model instead "
            "(torchao, bitsandbytes), or load it in 16 bits"
        )
    if isinstance(spec, LoRA) and issubclass(base, nn.ConvTranspose2d):
        return "LoRA of transposed convolutions is not supported; spectral shifts of them are"
    # Who needs the whole weight, not just its product.
    needs = "spectral shifts need" if isinstance(spec, Spectral) else "differences of a weight need"
    if isinstance(spec, LoRA):
        needs = "DoRA needs" if spec.dora else ""
    whole = base in PLAIN or issubclass(kind, LinearForward)
    if needs and (not whole or not is_plain(module._parameters.get("weight"))):
        return (
            f"{needs} the plain weight of a Linear, Conv2d, ConvTranspose2d or Embedding; beside a "
            "quantised one goes LoRA, or fold(model, permanent=True) before quantising"
        )
    if needs and getattr(module, "sparse", False):
        return f"{needs} dense gradients, and the embedding's are sparse"
    rows = needs and not isinstance(spec, Spectral)
    if rows and getattr(module, "max_norm", None) is not None:
        return f"{needs} rows that do not change, and max_norm changes them at every look-up"
    return None


def is_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"


# --- building -------------------------------------------------------------------------------------


def build(
    path: str, module: Any, spec: LoRA | Spectral, generator: torch.Generator, dtype: Any = None
) -> Slot:
    """The slot of one layer at its start: the layer computes what it computed before."""
    weight = module.weight
    at = {"dtype": parameter_dtype(path, weight, dtype), "device": weight.device}
    if isinstance(spec, Spectral):
        return SpectralSlot(spec, torch.zeros(shift_count(module, spec), **at))
    spec = spec.at(path)
    rank = spec.rank
    if isinstance(module, nn.Conv2d):
        check_groups(path, module, rank, "inject")
    shapes = shapes_lora(module, weight, spec)
    if isinstance(module, nn.Embedding):
        # The looked-up factor starts at zero, as in PEFT: its rows are not a fan-in.
        up = torch.randn(shapes["up"], generator=generator).to(**at)
        down = torch.zeros(shapes["down"], **at)
    else:
        down = kaiming_uniform(shapes["down"], generator, **at)
        up = torch.zeros(shapes["up"], **at)
    rows = weight if isinstance(module, nn.Linear | nn.Conv2d) else weight.t()
    return LoRASlot(spec, down, up, magnitude(rows).to(**at) if spec.dora else None)


def shift_count(module: Any, spec: Spectral) -> int:
    """How many shifts a layer has."""
    if not isinstance(module, NORMS):
        return rank_of(module)
    return module.weight.numel() if spec.norms == "elementwise" else 1


def check_groups(path: str, module: nn.Conv2d, rank: int, what: str) -> None:
    if rank % module.groups:
        raise AdapterError(
            f"{what}: {path}: rank {rank} is not divisible by the convolution's {module.groups} "
            "groups"
        )


def dtypes_beside(weight: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that parameters beside `weight` can have. One that no layer computes in (integers,
    float8) does not tell which the layer does."""
    if weight.dtype not in COMPUTED:
        return torch.float32, torch.float16, torch.bfloat16
    if weight.dtype == torch.float64:
        return (torch.float64,)
    return tuple(dict.fromkeys((weight.dtype, torch.float32)))


def parameter_dtype(
    path: str, weight: Tensor, dtype: torch.dtype | None, what: str = "inject"
) -> torch.dtype:
    """The dtype of new parameters beside `weight`: what is asked for if the operators take it."""
    fits = dtypes_beside(weight)
    if dtype is None:
        return torch.float32 if torch.float32 in fits else weight.dtype
    if not isinstance(dtype, torch.dtype):
        raise AdapterError(f"{what}: dtype: expected a torch.dtype, got {dtype!r}")
    if dtype not in fits:
        names = " or ".join(map(str, fits))
        raise AdapterError(f"{what}: {path}: dtype: expected {names}, got {dtype}")
    return dtype


def needs_factors(module: nn.Module) -> bool:
    """Whether a layer has to be decomposed before its singular values can be shifted."""
    if isinstance(module, NORMS):
        return False
    return not (isinstance(module, Adapted) and module.fastlora.svd_s is not None)
