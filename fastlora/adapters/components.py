"""One model, several by component, or a pipeline: what files are loaded into and made of."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastlora.adapters.lookup import unwrapped
from fastlora.adapters.specs import AdapterError

Models = nn.Module | Mapping[str, nn.Module] | Any


def components_of(model: Models, what: str) -> dict[str, nn.Module]:
    """The models by component; one model alone has the name "". `what` is for the message."""
    if isinstance(model, nn.Module):
        return {"": unwrapped(model)}
    parts = model if isinstance(model, Mapping) else getattr(model, "components", None)
    if isinstance(parts, Mapping):
        found = {k: unwrapped(m) for k, m in parts.items() if isinstance(m, nn.Module)}
        if found:
            return found
    raise AdapterError(
        f"{what}: model: expected a module, a dict of modules by component, or a pipeline, got "
        f"{type(model).__name__}"
    )
