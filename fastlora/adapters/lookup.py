"""Finding the adapted layers of a model, the arenas of their strengths, and adapters by name."""

from torch import nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.arena import Arena
from fastlora.adapters.specs import AdapterError


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers of a model by path."""
    return {p: m for p, m in unwrapped(model).named_modules() if isinstance(m, Adapted)}


def layers_of(model: nn.Module) -> list[Adapted]:
    """The same layers without their paths, which cost more than all else in changing a strength."""
    found: list[Adapted] = []
    seen: set[int] = set()
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, Adapted):
            found.append(module)
        else:
            stack.extend(reversed(module._modules.values()))
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile's and DistributedDataParallel's modules: paths are its."""
    while True:
        if type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def arenas(model: nn.Module) -> list[Arena]:
    """The arenas of a model's adapted layers: one, unless its parts were adapted separately."""
    return list({id(m._state.arena): m._state.arena for m in layers_of(model)}.values())


def known_names(model: nn.Module) -> list[str]:
    return sorted({name for layer in layers_of(model) for name in layer.fastlora})


def require_known(model: nn.Module, *names: str) -> None:
    known = known_names(model)
    for name in names:
        if name not in known:
            raise AdapterError(f"no adapter named {name!r}; this model has {known or 'none'}")
