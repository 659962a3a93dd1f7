"""The adapted layer beside one of PEFT's, on the parameters of its base layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Conv2d, Embedding
from torch import Tensor, nn

from fastlora.adapters.adapted import Adapted
from fastlora.adapters.arena import Arena
from fastlora.adapters.beside import AdaptedLinearLike
from fastlora.adapters.layers import AdaptedConv2d, AdaptedEmbedding, AdaptedLinear
from fastlora.adapters.slots import Slots
from fastlora.adapters.specs import AdapterError
from fastlora.adapters.state import LayerState
from fastlora.ops import ContractError, lora_add_, lora_linear

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Host(Adapted):
    """Computes for one of PEFT's layers what that asks for.

    No module's child: PEFT's state dicts, parameters and names stay as they are. Its parameters are
    the base layer's own dict of them, and what else it is asked for (a convolution's stride) is the
    base layer's too.
    """

    base_module: nn.Module
    foreign = True

    def __init__(self, base: nn.Module, arena: Arena, path: str) -> None:
        vars(self).update(
            _parameters=base._parameters,
            _buffers=base._buffers,
            _non_persistent_buffers_set=base._non_persistent_buffers_set,
            _modules={"fastlora": Slots()},
            _state=LayerState(arena, path),
            base_module=base,
        )
        self.__setstate__({})  # what torch's modules have beside

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.base_module.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_module" not in vars(self):  # a copy in the making
                raise
            return getattr(self.base_module, name)

    def anchor(self) -> Tensor:
        return self.weight  # PEFT's parameters may be somewhere else, or not there yet

    def moved(self, function: Any) -> None:
        """What the base layer's parameters have gone through: `module.to`."""
        self.fastlora._apply(function)
        self._state.forget()
        self._state.arena.prepare(self.anchor().device)
        if self._state.merged and not self.weight.is_meta:
            self._state.stale = True
            self.folded()

    def low_rank_slots(self, active: Any) -> list[tuple[Any, Tensor]]:
        if self.outgrown():
            raise ContractError(f"{self._state.path}: adapters of other ranks than were laid out")
        return super().low_rank_slots(active)

    def outgrown(self) -> bool:
        """Whether parameters were exchanged for some of another rank, which PEFT's books do not
        say (`hotswap_adapter`)."""
        return any(slot.down.shape[0] != slot.width for slot in self.fastlora.values())

    def mixed(self, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
        """The layer with these adapters, whose gates are [batch, rank]."""
        slots = [(self.fastlora[name], gate) for name, gate in gates.items()]
        return self.on_weight(x, self.weight, self.bias_or_none(), slots)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Module.__reduce_ex__(self, max(2, protocol))


class LinearHost(Host, AdaptedLinear):  # type: ignore[reportIncompatibleVariableOverride]
    def mixed(self, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
        slots = [self.fastlora[name] for name in gates]
        down = torch.cat([slot.down.to(self.weight.dtype) for slot in slots])
        up = torch.cat([slot.up.to(self.weight.dtype) for slot in slots], 1)
        gate = torch.cat(list(gates.values()), -1)
        return lora_linear(x, self.weight, self.bias_or_none(), down, up, gate)


class ConvHost(Host, AdaptedConv2d):  # type: ignore[reportIncompatibleVariableOverride]
    pass


class EmbeddingHost(Host, AdaptedEmbedding):  # type: ignore[reportIncompatibleVariableOverride]
    pass


class BesideHost(Host):
    """Beside a base that computes in a way of its own: quantised, transposed, adapted itself."""

    beside = True

    def base(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_module(*args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        return self.added(input, self.low_rank_slots(self.active()))

    def mixed(self, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
        return self.added(x, [(self.fastlora[name], gate) for name, gate in gates.items()])

    def added(self, x: Tensor, slots: list[tuple[Any, Tensor]]) -> Tensor:
        y = self.base(x)
        if slots and torch.is_grad_enabled():
            # What its backward has saved may be the output itself; it may be a view of a custom
            # function's (LLM.int8), which nobody may write to.
            y = y.clone()
        for slot, gate in slots:
            y = self.add(y, x, slot, gate)
        return y

    def add(self, y: Tensor, x: Tensor, slot: Any, gate: Tensor) -> Tensor:
        """`y`, in place, plus one low-rank part."""
        raise NotImplementedError


class LinearBesideHost(BesideHost, AdaptedLinearLike):  # type: ignore[reportIncompatibleVariableOverride]
    def add(self, y: Tensor, x: Tensor, slot: Any, gate: Tensor) -> Tensor:
        lora_add_(y, x.to(y.dtype), slot.down, slot.up, gate)
        return y


class ConvBesideHost(BesideHost, AdaptedConv2d):  # type: ignore[reportIncompatibleVariableOverride]
    def add(self, y: Tensor, x: Tensor, slot: Any, gate: Tensor) -> Tensor:
        h = self._conv_forward(x.to(y.dtype), slot.down.to(y.dtype), None)
        return self.add_up(y, h, slot.up, gate)


class EmbeddingBesideHost(BesideHost, AdaptedEmbedding):  # type: ignore[reportIncompatibleVariableOverride]
    def add(self, y: Tensor, x: Tensor, slot: Any, gate: Tensor) -> Tensor:
        h = F.embedding(x, slot.down.t(), self.padding_idx)
        lora_add_(y, h.to(y.dtype), None, slot.up, gate)
        return y


EXACT: dict[type[nn.Module], type[Host]] = {
    nn.Linear: LinearHost,
    nn.Conv2d: ConvHost,
    nn.Embedding: EmbeddingHost,
}


def host_class(base: nn.Module, layer: Any) -> type[Host]:
    """The class of host for a base layer of one of PEFT's layers. Raises AdapterError where there
    is none."""
    exact = EXACT.get(type(base)) if "forward" not in vars(base) else None  # a hook's
    if exact is not None and type(base._parameters.get("weight")) in (nn.Parameter, Tensor):
        if getattr(base, "groups", 1) == 1:
            return exact
    what = f"its base layer, a {type(base).__name__}"
    if getattr(base, "groups", 1) != 1:
        raise AdapterError(f"{what}, is a grouped convolution")
    if not isinstance(getattr(base, "weight", None), Tensor) or hasattr(base, "embed_scale"):
        raise AdapterError(f"{what}, has no weight as such")
    if isinstance(layer, Conv2d):
        return ConvBesideHost
    return EmbeddingBesideHost if isinstance(layer, Embedding) else LinearBesideHost


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """The dicts of a module's hooks, which fused computation would not call."""
    return tuple(getattr(module, name) for name in HOOKS)


def takes(weight: Tensor, parameter: Any) -> bool:
    """Whether the operators take an adapter's parameter beside a weight."""
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        return False
    if weight.is_floating_point() and weight.dtype.itemsize > 1:
        return parameter.dtype in (weight.dtype, torch.float32) and (
            weight.dtype != torch.float64 or parameter.dtype == torch.float64
        )
    return parameter.dtype in (torch.float32, torch.float16, torch.bfloat16)
