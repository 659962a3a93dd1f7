"""The subclass of a pipeline's class that `accelerate` gives it: the same names, other methods."""

from __future__ import annotations

import functools
from typing import Any

from fastlora.integrations.pipelines.calling import call
from fastlora.integrations.pipelines.loading import load_lora_weights
from fastlora.integrations.pipelines.prepared import lora_state_dict

BASE = "_fastlora_base"  # of a class that was made here: what it was made of


def base_of(cls: type) -> type | None:
    """The class that a class of `fast_class` was made of; None for any other."""
    return vars(cls).get(BASE)


@functools.cache
def fast_class(base: type) -> Any:
    """The subclass for a class of diffusers, or somebody's own. It has the same names, by which
    diffusers finds classes (in saved pipelines, `from_pipe`, tasks of AutoPipeline)."""
    methods = {"__call__": "calls"} if "__call__" in dir(base) else {}
    own: dict[str, Any] = {name: getattr(base, name) for name in ("__module__", "__qualname__")}
    own |= {"__doc__": base.__doc__, BASE: base, "__reduce_ex__": _reduce_ex}
    if methods:
        own["__call__"] = _calling(base)
    if hasattr(base, "load_lora_weights") and hasattr(base, "lora_state_dict"):
        methods["load_lora_weights"] = "load_lora_weights"
        own["load_lora_weights"] = _loading(base)
        own["lora_state_dict"] = _reading(base)
    own["fastlora_changes"] = tuple(methods.values())
    return type(base)(base.__name__, (base,), own)


def _calling(base: Any) -> Any:
    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(base, self, args, kwargs)

    return __call__


def _loading(base: Any) -> Any:
    @functools.wraps(base.load_lora_weights)
    def load(
        self: Any,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        given = pretrained_model_name_or_path_or_dict
        load_lora_weights(base, self, given, adapter_name, hotswap, kwargs)

    return load


def _reading(base: Any) -> Any:
    @functools.wraps(base.lora_state_dict)
    def read(cls: Any, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        return lora_state_dict(base, pretrained_model_name_or_path_or_dict, kwargs)

    return classmethod(read)


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Copies and pickles name the class that it was made of, which is found by its name."""
    base: Any = base_of(type(self))
    function, args, *state = base.__reduce_ex__(self, protocol)
    return (_empty, (base,), *state)


def _empty(base: type) -> Any:
    cls = fast_class(base)
    return cls.__new__(cls)
