"""PEFT's layers, whose forward pass is fused where their state is one that fastlora computes, and
PEFT's own everywhere else."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from fastlora.adapters.lookup import HOST
from fastlora.adapters.slots import Slots
from fastlora.adapters.specs import AdapterError, fits_float32
from fastlora.integrations.peft.hosts import Host, host_class
from fastlora.integrations.peft.merging import Pristine
from fastlora.integrations.peft.plans import (
    Plan,
    masks,
    peft_reads,
    plan_of,
    ratio,
    strength,
    update_slots,
    with_biases,
)
from fastlora.integrations.peft.reading import Found, found_in
from fastlora.integrations.peft.strengths import Scaling, Told
from fastlora.ops import ContractError

PRISTINE = "_fastlora_pristine"
RESERVED = frozenset(dir(Slots()))  # names that a slot cannot have

_is_compiling = torch.compiler.is_compiling


if TYPE_CHECKING:

    class PeftLayer(nn.Module, LoraLayer):
        def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None: ...
        def unmerge(self) -> None: ...

else:  # PEFT's class comes behind; a layer can change its class only to one of the same layout
    PeftLayer = nn.Module


class FastLayer(PeftLayer):
    """Stands in front of the class that one of PEFT's layers had."""

    _active_adapter = Told("_active_adapter", "default")  # type: ignore[assignment]
    _disable_adapters = Told("_disable_adapters", False)  # type: ignore[assignment]
    _fastlora_plan: Plan

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or self.merged_adapters:
            return self.special(x, *args, **kwargs)
        plan = self._fastlora_plan
        if not self.goes(plan):
            return self.by_peft(x)
        try:
            y = plan.host.forward(x)
        except KeyError:  # a parametrisation has taken one of PEFT's parameters away since
            self.synchronise()
            return self.by_peft(x)
        except ContractError:  # dtypes that only PEFT casts; or it says what is wrong in its way
            if _is_compiling():
                raise
            if plan.host.outgrown():
                self.synchronise()
                return self.forward(x)
            return self.by_peft(x)
        return with_biases(plan, y) if plan.biases else y

    def goes(self, plan: Plan) -> bool:
        """Whether the fused way computes what PEFT's does."""
        for dropout in plan.dropouts:
            if dropout.training:
                return False  # from the same random numbers
        if _is_compiling():
            return plan.in_graph
        return plan.fused and plan.untouched(self.base_layer)

    def special(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """With merged adapters, or arguments: of these the names of an adapter for each sample."""
        names, plan = kwargs.get("adapter_names"), self._fastlora_plan
        if names is None or len(kwargs) > 1 or args or self.disable_adapters or _is_compiling():
            return self.by_peft(x, *args, **kwargs)
        self._check_forward_args(x, adapter_names=names)
        gates = self.gates_of(plan.host, tuple(names), x)
        if gates is None or not plan.untouched(self.base_layer):
            return self.by_peft(x, adapter_names=names)
        try:
            if plan.host.outgrown():
                return self.by_peft(x, adapter_names=names)
            return plan.host.mixed(x, gates) if gates else self.base_layer(x)
        except (ContractError, KeyError):
            return self.by_peft(x, adapter_names=names)

    def by_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own forward pass. Raises AdapterError where a strength is per sample."""
        changed, own = peft_reads(self, vars(self)[HOST]._state), vars(self)
        if not changed:
            return super().forward(x, *args, **kwargs)
        kept = {name: own[name] for name in changed}
        try:
            own.update(changed)
            return super().forward(x, *args, **kwargs)
        finally:
            own.update(kept)

    def gates_of(self, host: Host, names: tuple[str, ...], x: Tensor) -> dict[str, Tensor] | None:
        """Gates [batch, rank] of the adapters that are somebody's; None where not fused."""
        arena, gates = host._state.arena, {}
        for name in dict.fromkeys(names):
            if name not in self.scaling:  # "__base__", or an adapter of other layers
                continue
            scale = strength(arena, name)
            adapter = self._fastlora_plan.found.get(name)
            if adapter is None or adapter.dora or adapter.bias is not None:
                return None
            if adapter.dropout.training or isinstance(scale, Tensor) or adapter.watched:
                return None
            mask = masks(names, x.device, host.anchor().dtype == torch.float64)[name]
            gates[name] = (mask * (scale * self.scaling[name])).expand(
                -1, host.fastlora[name].width
            )
        return gates

    # --- what PEFT changes ------------------------------------------------------------------------

    @property
    def scaling(self) -> Any:
        return vars(self)["scaling"]

    @scaling.setter
    def scaling(self, value: Any) -> None:
        vars(self)["scaling"] = owned(value, self)
        self.synchronise()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        super().update_layer(*args, **kwargs)
        self.synchronise()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.synchronise()

    def rescale(self, name: str, value: Any) -> bool:
        """Takes up another scaling of an adapter, where nothing else has changed; whether that was
        so. A pipeline sets those of hundreds of layers."""
        host = vars(self).get(HOST)
        slot: Any = None if host is None else host.fastlora._modules.get(name)
        if (
            host is None
            or slot is None
            or name not in host._state.offsets
            or not fits_float32(value)
        ):
            return False
        new = ratio(self._fastlora_plan.found[name], value)
        if bool(slot.ratio) != bool(new):
            return False
        if slot.ratio != new:
            slot.ratio = new
            host._state.arena.set_ratio(host, name, new)
        return True

    def synchronise(self) -> None:
        """Takes up what PEFT's books say now: which adapters there are, and their strengths."""
        host = vars(self).get(HOST)
        if host is None:  # a layer in the making
            return
        self.switch({n: f for n, f in found_in(self).items() if n not in RESERVED})

    def switch(self, found: dict[str, Found] | None = None) -> None:
        """Takes up which adapters are active, of those that were `found` before."""
        host = vars(self).get(HOST)
        if host is None:
            return
        names = [] if self.disable_adapters else self.active_adapters
        active = [name for name in names if name in self.scaling]
        if found is None:
            found = self._fastlora_plan.found
            if tuple(active) == self._fastlora_plan.active:
                return
        update_slots(
            host, found, {n: ratio(found[n], self.scaling[n]) for n in active if n in found}
        )
        vars(self)["_fastlora_plan"] = plan_of(host, self, found, active)

    def follow_base(self) -> None:
        """Takes up another base layer, or another class of it: fastlora's own adapters make one."""
        host, base = vars(self)[HOST], self.base_layer
        if base is host.base_module and type(base) is self._fastlora_plan.base_class:
            return
        try:
            make = host_class(base, self)
        except AdapterError:  # PEFT's own forward calls any
            return
        vars(self)[HOST] = make(base, host._state.arena, host._state.path)
        self.synchronise()

    # --- merging ----------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, which keeps what the base layer was."""
        base = self.get_base_layer()
        if not self.merged_adapters:
            vars(self)[PRISTINE] = Pristine(base)
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            if self.merged_adapters and PRISTINE in vars(self):
                vars(self)[PRISTINE].seal(base)
            elif not self.merged_adapters:
                vars(self).pop(PRISTINE, None)

    def unmerge(self) -> None:
        """Puts the base layer back, bit for bit; PEFT's where somebody has written it since."""
        kept, base = vars(self).pop(PRISTINE, None), self.get_base_layer()
        if kept is None or not kept.holds(base):
            return super().unmerge()
        kept.put_back(base)
        for name in self.merged_adapters:  # what a variant has noted for its own way back
            self._caches.pop(f"{name}-weight_norm", None)
        self.merged_adapters.clear()

    # --- what torch does to modules ---------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        if PRISTINE in vars(self):
            vars(self)[PRISTINE].apply(fn)
            vars(self)[PRISTINE].seal(self.get_base_layer())
        vars(self)[HOST].moved(fn)
        self.synchronise()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        state = vars(self)[HOST]._state
        state.stale = state.merged  # the base layer and the adapters are read before the next call

    def _replicate_for_data_parallel(self) -> Any:
        """PEFT's own layer: the host computes on the parameters of this one."""
        replica = super()._replicate_for_data_parallel()
        replica.__class__ = type(self).__mro__[2]
        vars(replica).update(peft_reads(self, vars(self)[HOST]._state))
        return replica

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if vars(self)["scaling"].owner is None:  # else a shallow copy, which shares it
            owned(vars(self)["scaling"], self)
        self.synchronise()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; pickle finds it through PEFT's.
        _, _, *state = super().__reduce_ex__(max(2, protocol))
        return blank, (type(self).__mro__[2],), *state


def owned(scaling: dict[str, Any], layer: FastLayer) -> Scaling:
    told = scaling if type(scaling) is Scaling else Scaling(scaling)
    told.owner = weakref.ref(layer)
    return told


_FAST: dict[type[LoraLayer], type[FastLayer]] = {}


def fast_class(peft: type[LoraLayer]) -> type[FastLayer]:
    """The class of PEFT's layers of exactly this class once they are accelerated."""
    if peft not in _FAST:
        names = {"__module__": __name__, "__qualname__": peft.__qualname__}
        _FAST[peft] = type(peft.__name__, (FastLayer, peft), names)
    return _FAST[peft]


def blank(peft: type[LoraLayer]) -> FastLayer:
    """A layer without anything in it, for pickle to fill."""
    cls = fast_class(peft)
    return cls.__new__(cls)
