"""One model, several by component, or a pipeline: what files are loaded into and made of."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastlora.adapters.lookup import parts_of, unwrapped
from fastlora.adapters.specs import AdapterError

Models = nn.Module | Mapping[str, nn.Module] | Any


def components_of(model: Models, what: str) -> dict[str, nn.Module]:
    """The models by component; one model alone has the name "". `what` is for the message."""
    if isinstance(model, nn.Module):
        return {"": unwrapped(model)}
    parts = parts_of(model)
    if parts:
        return {component: unwrapped(part) for component, part in parts.items()}
    raise AdapterError(
        f"{what}: model: expected a module, a dict of modules by component, or a pipeline, got "
        f"{type(model).__name__}"
    )
