"""Finding the adapted layers of a model, the arenas of their strengths, and adapters by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.arena import Arena
from fastlora.adapters.specs import AdapterError
from fastlora.ops._define import kernels

WALK = "_fastlora_walk"  # in a model's __dict__: its latest walk
HOST = "_fastlora_host"  # in a module's: the adapted layer that computes for it


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without what adapters have brought."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        own, hosted = isinstance(module, Adapted), HOST in module.__dict__
        prefix = path and f"{path}."
        for name, child in reversed(module._modules.items()):
            brought = (own and name == "fastlora") or (hosted and name != "base_layer")
            if child is not None and not brought:
                stack.append((prefix + name, child))


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers of a model by path."""
    found = ((p, layer_of(m)) for p, m in base_modules(unwrapped(model)))
    return {path: layer for path, layer in found if layer is not None}


def layer_of(module: nn.Module) -> Adapted | None:
    """The adapted layer that a module is, or that computes for it."""
    return module if isinstance(module, Adapted) else module.__dict__.get(HOST)


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """`model.named_modules()`, also the same module under several paths. Where another library's
    layers are hosted, their base layers stand at their paths: what is for a path is for these."""
    found = dict(model.named_modules(remove_duplicate=False))
    for path, module in found.items():
        base: nn.Module | None = module
        while base is not None and HOST in base.__dict__:
            base = base._modules["base_layer"]
        found[path] = base or module
    return found


@dataclass(frozen=True)
class Walk:
    """What a walk over a model found, and what it saw on its way, to know whether that still holds.

    A walk over a model of thousands of modules costs more than all else in changing a strength.
    """

    layers: list[Adapted]
    arenas: list[Arena]
    names: list[str]
    generation: int
    dicts: tuple[dict[str, Any], ...]  # the children of every module that was not adapted
    children: tuple[Any, ...]  # and what they were, one after another

    def holds(self) -> bool:
        same = self.generation == Arena.generation and not any(a.unsettled for a in self.arenas)
        return same and kernels.same_children(self.dicts, self.children)

    def require(self, *names: str) -> None:
        """Raises AdapterError for a name that no adapter of the model has."""
        for name in names:
            if name not in self.names:
                raise AdapterError(
                    f"no adapter named {name!r}; this model has {self.names or 'none'}"
                )

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the model is another model


def walked(model: nn.Module) -> Walk:
    """The latest walk over a model if nothing has changed since, else a new one.

    Raises AdapterError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise no_module(model)
    known = vars(model).get(WALK)
    # (A shallow copy of a model has its walk, and may have other children.)
    if known is not None and known.dicts[0] is model._modules and known.holds():
        return known
    found: dict[int, Adapted] = {}
    dicts: list[dict[str, Any]] = []
    seen: set[int] = set()
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, Adapted):
            found[id(module)] = module
            if len(module._modules) == 1:  # nothing but its adapters
                continue
        dicts.append(module._modules)
        if HOST in module.__dict__:
            found[id(module)] = module.__dict__[HOST]
            stack.append(module._modules["base_layer"])
        else:
            stack.extend(reversed(module._modules.values()))
    layers = list(found.values())
    arenas = {id(m._state.arena): m._state.arena for m in layers}
    for arena in arenas.values():
        if arena.unsettled:
            arena.layout()
    walk = Walk(
        layers,
        list(arenas.values()),
        sorted({name for layer in layers for name in layer.fastlora}),
        Arena.generation,
        tuple(dicts),
        tuple(child for modules in dicts for child in modules.values()),
    )
    if layers and not isinstance(model, Adapted):
        model.__dict__[WALK] = walk
    else:
        vars(model).pop(WALK, None)
    return walk


def layers_of(model: nn.Module) -> list[Adapted]:
    """The same layers without their paths."""
    return walked(model).layers


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's, DistributedDataParallel's and PEFT's modules: paths are
    its. Raises AdapterError for what is no module."""
    if not isinstance(model, nn.Module):
        raise no_module(model)
    while True:
        if type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__module__.startswith("peft.") and "base_model" in model._modules:
            model = model._modules["base_model"]  # type: ignore[assignment]
            if type(model).__module__.startswith("peft."):  # a LoraModel with the model
                model = model._modules["model"]  # type: ignore[assignment]
        else:
            return model


def parts_of(model: Any) -> dict[str, nn.Module]:
    """The modules of a pipeline or a dict by component; none for anything else."""
    parts = model if isinstance(model, Mapping) else getattr(model, "components", None)
    if not isinstance(parts, Mapping):
        return {}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def no_module(model: Any) -> AdapterError:
    said = f"expected a module, got {type(model).__name__}"
    whole = "{}[{!r}]" if isinstance(model, Mapping) else "{}.{}"
    name = "models" if isinstance(model, Mapping) else "pipe"
    parts = [whole.format(name, part) for part in parts_of(model)]
    if parts:
        said += f": call it for each of its parts, {', '.join(parts)}"
    return AdapterError(said)


def arenas(model: nn.Module) -> list[Arena]:
    """The arenas of a model's adapted layers: one, unless its parts were adapted separately."""
    return walked(model).arenas


def known_names(model: nn.Module) -> list[str]:
    return walked(model).names


def require_known(model: nn.Module, *names: str) -> None:
    walked(model).require(*names)
