"""What PEFT changes on a layer by plain assignment, and the layer has to hear of."""

from __future__ import annotations

import weakref
from typing import Any


class Scaling(dict[str, Any]):
    """PEFT's `layer.scaling` that tells its layer of every change."""

    owner: weakref.ref[Any] | None = None

    def changed(self) -> None:
        layer = None if self.owner is None else self.owner()
        if layer is not None:
            layer.synchronise()

    def __setitem__(self, name: str, value: Any) -> None:
        before = type(self.get(name))
        super().__setitem__(name, value)
        layer = None if self.owner is None else self.owner()
        if layer is None or (type(value) is before and layer.rescale(name, value)):
            return
        self.changed()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.changed()

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        self.changed()

    def pop(self, *args: Any) -> Any:
        value = super().pop(*args)
        self.changed()
        return value

    def clear(self) -> None:
        super().clear()
        self.changed()

    def __reduce__(self) -> Any:
        return Scaling, (dict(self),)  # whoever has the copy becomes its owner


class Told:
    """An attribute whose assignment a layer hears of."""

    def __init__(self, name: str, default: Any) -> None:
        self.name, self.default = name, default

    def __get__(self, layer: Any, cls: type | None = None) -> Any:
        return self.default if layer is None else vars(layer).get(self.name, self.default)

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)[self.name] = value
        layer.switch()
