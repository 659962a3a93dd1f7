"""One model, several by component, or a pipeline: what the functions about adapters take.

A dict means all of its modules, and a pipeline those of its `components` that are modules. Nothing
is asked of a pipeline but that attribute.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlora.adapters.arena import Arena
from fastlora.adapters.lookup import WALK, Walk, parts_of, unwrapped, walked
from fastlora.adapters.specs import AdapterError, AdapterInfo

Models = nn.Module | Mapping[str, nn.Module] | Any
Result = TypeVar("Result")


def components_of(model: Models, what: str) -> dict[str, nn.Module]:
    """The models by component; one model alone has the name "". `what` is for the message.

    A module that has two names counts once, under the first.
    """
    if isinstance(model, nn.Module):
        return {"": unwrapped(model)}
    found: dict[int, tuple[str, nn.Module]] = {}
    for component, part in parts_of(model).items():
        found.setdefault(id(unwrapped(part)), (component, unwrapped(part)))
    if found:
        return dict(found.values())
    raise AdapterError(
        f"{what}: model: expected a module, a dict of modules by component, or a pipeline, got "
        f"{type(model).__name__}"
    )


def chosen_components(model: Models, what: str) -> dict[str, nn.Module]:
    """`components_of` a module or a dict. Raises AdapterError for a pipeline: nobody has said which
    of its components are meant."""
    if isinstance(model, nn.Module | Mapping):
        return components_of(model, what)
    said = f"{what}: model: expected a module or a dict of modules, got {type(model).__name__}"
    if parts_of(model):
        some = ", ".join(f"{component!r}: pipe.{component}" for component in adaptable(model, what))
        said += f"; say which of its components are meant, of {{{some}}}"
    raise AdapterError(said)


def as_one(model: Models, what: str) -> nn.Module:
    """The models as one, in which their paths begin with the component; a module is itself.

    For what looks at all strengths, layers or parameters together: it checks all before it changes
    any. Not for what makes an arena, which would be one for all.
    """
    if isinstance(model, nn.Module):  # set_scale has tens of microseconds in all
        return model
    return joined(components_of(model, what))


def without_text_encoders(model: Models, what: str) -> nn.Module:
    """`as_one`, of a pipeline what computes images alone."""
    if isinstance(model, nn.Module | Mapping):
        return as_one(model, what)
    parts = components_of(model, what)
    return joined({c: part for c, part in parts.items() if not c.startswith("text_encoder")})


def joined(parts: Mapping[str, nn.Module]) -> nn.Module:
    whole = nn.Module()
    whole._modules.update(parts)
    walks = [walked(part) for part in parts.values()]  # those with adapters have theirs at hand
    layers = {id(layer): layer for walk in walks for layer in walk.layers}
    found = {id(arena): arena for walk in walks for arena in walk.arenas}
    vars(whole)[WALK] = Walk(
        list(layers.values()),
        list(found.values()),
        sorted({name for walk in walks for name in walk.names}),
        Arena.generation,
        (whole._modules, *(modules for walk in walks for modules in walk.dicts)),
        (*parts.values(), *(child for walk in walks for child in walk.children)),
    )
    return whole


def adaptable(model: Models, what: str) -> dict[str, nn.Module]:
    """`components_of`, of a pipeline only those that adapter files are for: its denoisers and text
    encoders, not a VAE, an image encoder or a safety checker."""
    parts = components_of(model, what)
    if isinstance(model, nn.Module | Mapping):
        return parts
    # The formats are imported where they are needed: `import fastlora` stays light.
    from fastlora.formats.diffusers import COMPONENTS

    chosen = {component: part for component, part in parts.items() if component in COMPONENTS}
    if not chosen:
        raise AdapterError(
            f"{what}: model: expected a pipeline with some of {', '.join(sorted(COMPONENTS))}, got "
            f"{type(model).__name__} with {', '.join(parts)}; give a dict of those that are meant"
        )
    return chosen


def all_or_none(
    components: Iterable[str], do: Callable[[str], Result], undo: Callable[[str], Any]
) -> dict[str, Result]:
    """Results by component; where one fails, those that were done are undone."""
    done: dict[str, Result] = {}
    try:
        for component in components:
            done[component] = do(component)
    except BaseException:
        for component in done:
            undo(component)
        raise
    return done


def path_in(component: str, path: str) -> str:
    """A module's path with its component in front; either may be empty."""
    return f"{component}.{path}".strip(".")


def info_of_parts(infos: Mapping[str, AdapterInfo]) -> AdapterInfo:
    """What several components have of one adapter."""
    ranks = [info.rank for info in infos.values() if info.rank is not None]
    kinds = (kind for info in infos.values() for kind in info.kind.split("+"))
    return AdapterInfo(
        kind="+".join(dict.fromkeys(kinds)),
        modules=tuple(path_in(c, path) for c, info in infos.items() for path in info.modules),
        rank=max(ranks) if ranks else None,
        parameters=sum(info.parameters for info in infos.values()),
        scale=common({c: info.scale for c, info in infos.items()}),
        enabled=common({c: info.enabled for c, info in infos.items()}),
    )


def common(values: dict[str, Any]) -> Any:
    """The value that all components have, or else all of them."""
    first, *others = values.values()
    return first if all(same(first, other) for other in others) else values


def same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
    return a is b or (a.device == b.device and torch.equal(a, b))
