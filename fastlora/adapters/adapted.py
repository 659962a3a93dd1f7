"""An adapted layer is its base layer under another class: same object, same parameters, same keys.

`adapted_class(type(module))` gives a subclass of the base's class; `module.__class__ = ...` adapts
it and taking the class back restores it. The adapters' parameters live in the child module
`fastlora`. `layers.py` has the subclasses.
"""

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastlora.adapters.changed_weight import (
    Recipe,
    changed_bias,
    changed_weight,
    recipe_of,
    weight_under,
)
from fastlora.adapters.folded_weight import fold_layers
from fastlora.adapters.slots import LoRASlot, in_place, one_strength
from fastlora.adapters.specs import AdapterError
from fastlora.adapters.state import LayerState, in_graph, is_capturing
from fastlora.adapters.tensors import memory, same_start, same_values
from fastlora.ops import ContractError


class Adapted(nn.Module):
    """What all adapted layers share. Subclasses say how their base uses a weight."""

    fastlora: Any  # Slots; torch declares what is in one as plain modules
    weight: Tensor
    transposed = False  # low-rank parts add to Wᵀ
    beside = False  # the base computes in a way of its own, and low-rank parts are added to that
    foreign = False  # its adapters are another library's, which alone adds and removes them
    _state: LayerState

    # --- what a base class provides ---------------------------------------------------------------

    def base(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer alone."""
        return super().forward(*args, **kwargs)

    def with_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The base layer's forward with another weight and bias."""
        raise NotImplementedError

    def low_rank(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: list[tuple[LoRASlot, Tensor]]
    ) -> Tensor:
        """The base on `weight` and `bias` plus the slots' low-rank parts with their gates."""
        raise NotImplementedError

    @staticmethod
    def upright(weight: Tensor) -> Tensor:
        """A weight as updates mean it, or the reverse: transposed where the layer has `[in, out]`
        and updates are `[out, in]`."""
        return weight

    def matrix(self) -> Tensor:
        """The weight as `[out, everything else]`, a view where it can be one."""
        return self.weight.reshape(self.weight.shape[0], -1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: in the weight's shape."""
        return matrix.view(self.weight.shape)

    def limited(self, weight: Tensor) -> Tensor:
        """`weight` as the base's forward would change it before use."""
        return weight

    def is_norm(self) -> bool:
        return False

    def shortcut(self) -> Any:
        return None

    # --- the forward pass -------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        if self._state.merged:
            return self.with_weight(input, self.folded(), self.folded_bias())
        active = self.active()
        slots = self.low_rank_slots(active)
        if not active and not slots:
            return self.base(input)
        recipe = recipe_of(self, active)
        if recipe is None:
            return self.on_weight(input, self.weight, self.bias_or_none(), slots)
        return self.changed(input, recipe, slots)

    def changed(self, x: Tensor, recipe: Recipe, slots: list[tuple[Any, Tensor]]) -> Tensor:
        """The forward pass on W' and b', then low-rank parts."""
        bias = changed_bias(self, recipe)
        if is_compiling():
            return self.on_weight(x, changed_weight(self, recipe), bias, slots)
        with weight_under(self, recipe) as weight:
            return self.on_weight(x, weight, bias, slots)

    def on_weight(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: list[tuple[Any, Tensor]]
    ) -> Tensor:
        if slots:
            return self.explaining(x, self.low_rank, x, weight, bias, slots)
        return self.with_weight(x, weight, bias)

    def active(self) -> tuple[tuple[str, Any], ...]:
        """The slots to compute; in a graph all of them, some with gates of zero, but for those in
        the reserve where it is computed as one: they may come and go."""
        if in_graph():
            return self._state.outside if self.packs() else tuple(self.fastlora.items())
        self.refresh()
        return self._state.active

    def refresh(self) -> None:
        """Takes up what changed in the arena since the last call."""
        state = self._state
        if state.arena.unsettled:
            state.arena.layout()
        epoch = state.arena.epoch
        if state.epoch == epoch:
            return
        if self.anchor().is_meta and not self.weight.is_meta:
            raise AdapterError(
                f"{state.path}: its adapters are on the meta device and it is not; accelerate's "
                f"cpu_offload needs preload_module_classes=['{type(self).__name__}', ...]"
            )
        state.active = tuple(
            (name, slot)
            for name, slot in self.fastlora.items()
            if slot.ratio and not state.arena.off(name)
        )
        state.forget_weights()
        slots = self.fastlora
        ends = [
            slots.reserved_rows[name] + slot.width
            for name, slot in state.active
            if name in slots.reserved_rows
        ]
        state.packed = slots.packed(max(ends)) if ends else None
        state.fast = self.shortcut()
        state.epoch = epoch  # last: another thread may be looking

    def folded(self) -> Tensor:
        if self._state.stale:
            fold_layers([self])
        folded = self.fastlora.folded_weight
        assert folded is not None
        return folded

    def folded_bias(self) -> Tensor | None:
        """b' beside `folded`; the layer's own where no adapter changes it."""
        folded = self.fastlora.folded_bias
        return self.bias_or_none() if folded is None else folded

    def explaining(self, x: Tensor, compute: Callable[..., Tensor], *args: Any) -> Tensor:
        """`compute(*args)`, whose errors speak of this layer; a graph has no place for that."""
        if is_compiling():
            return compute(*args)
        try:
            return compute(*args)
        except ContractError as error:
            raise self.explained(error, x) from None

    def explained(self, error: ContractError, x: Tensor) -> ContractError:
        """The error of a low-rank part; where strengths per sample met another batch size, with the
        layer and the size that they ask for."""
        arena = self._state.arena
        names = [name for name in self.fastlora if name in arena.per_sample]
        rows = (arena.batch or 0) * arena.copies
        if not names or ("gate: expected" not in str(error) and x.shape[:1] == (rows,)):
            return error
        return ContractError(
            f"{self._state.path or 'the layer'}: {error}; the strengths of {names} are per sample: "
            f"expected an input with leading size {rows}, got {list(x.shape)}"
        )

    def bias_or_none(self) -> Tensor | None:
        return self._parameters.get("bias")

    def anchor(self) -> Tensor:
        """A tensor of the adapters: all have its device, and are float64 if it is."""
        holder: Any = self._modules["fastlora"]
        reserved = holder._buffers["reserved_down"]
        if reserved is not None:
            return reserved
        slot = next(iter(holder._modules.values()))
        return next(iter(slot._parameters.values()))

    # --- gates ------------------------------------------------------------------------------------

    def packs(self) -> bool:
        """Whether the adapters in the reserve are computed as one. With gradients they are not:
        the buffers are nobody's parameters; dropout is for each adapter's own input; and who
        exchanges parameters or their memory for a while is served from there."""
        slots = self.fastlora
        if slots.reserved_down is None or torch.is_grad_enabled():
            return False
        if self.training and slots.drops:
            return False
        return is_compiling() or in_place(slots.pins)

    def low_rank_slots(self, active: Any) -> list[tuple[Any, Tensor]]:
        """The low-rank parts to compute, LoRASlots or Packed ones, with their gates."""
        if not self.packs():
            return [(s, self.gate(name)) for name, s in active if isinstance(s, LoRASlot)]
        state = self._state
        packed = state.packed
        if in_graph():
            packed = self.fastlora.packed(self.fastlora.capacity)
        elif packed is not None and not same_start(packed.down, self.fastlora.reserved_down):
            state.forget()  # the buffers are others since
            self.refresh()
            packed = state.packed
        slots: list[tuple[Any, Tensor]] = [
            (s, self.gate(name))
            for name, s in state.outside
            if isinstance(s, LoRASlot) and (in_graph() or not state.arena.off(name))
        ]
        if packed is not None:
            slots.insert(0, (packed, self.gates(0, packed.width, state.rows)))
        return slots

    def gate(self, name: str) -> Tensor:
        """The gates of one slot: `[width]`, or `[batch, width]` where its scale is per sample."""
        state = self._state
        if name not in state.offsets:
            known = list(self.fastlora)
            raise AdapterError(f"{state.path}: no adapter named {name!r}; it has {known}")
        per_sample = name in state.arena.per_sample
        return self.gates(state.offsets[name], self.fastlora[name].width, per_sample)

    def strength(self, name: str) -> Tensor:
        """The gate [] of a slot that changes the weight itself. Raises AdapterError where it is
        per sample."""
        gate = self.gate(name)
        if gate.dim() == 2:
            raise AdapterError(one_strength(self._state.path, name, self.fastlora[name]))
        return gate.reshape(())

    def gates(self, offset: int, width: int, per_sample: bool) -> Tensor:
        """Gates of this layer, from its `offset`-th on, float32, float64 beside float64.

        A copy where gradients are recorded: `set_scale` writes the arena in place, and that may
        come between a forward pass and its backward pass.
        """
        anchor = self.anchor()
        state = self._state
        if is_compiling() and not state.arena.learned:
            gate = state.parts[anchor.device].narrow(-1, offset, width)
        else:
            gate = state.arena.gate(anchor.device, state.offset + offset, width)
        if gate.dim() == 2 and not per_sample:  # another adapter's scale is per sample
            gate = gate[0]
        if anchor.dtype == torch.float64:
            return gate.double()
        return gate.clone() if torch.is_grad_enabled() else gate

    # --- what is kept -----------------------------------------------------------------------------

    def cached(self, name: str, small: list[Tensor], make: Callable[[], Any]) -> Any:
        """`make()`, kept while the weight and the tensors in `small` have the values that they had.

        Values, not versions: a write through `.data`, as many averages of weights are copied,
        leaves no trace in a version. It costs a copy of the weight, and a read of both at every
        call; only on the CPU, for layers with DoRA or a changed weight that are not folded. On an
        accelerator a comparison would wait for the device (and a captured graph would never look
        again), so there nothing is kept; nor under functorch, and for weights made in inference
        mode. `kept` is for `steady` blocks.
        """
        weight = self.weight
        if is_capturing() or weight.device.type != "cpu" or memory(weight) is None:
            return make()
        sources, found = [weight, *small], self._state.cache.get(name)
        if found is not None and len(found[0]) == len(sources):
            if all(map(same_values, found[0], sources)):
                return found[1]
        before = [t.detach().clone() for t in sources]  # first: what is written meanwhile is seen
        made = make()
        self._state.cache[name] = (before, made)
        return made

    def kept(self, name: str, make: Callable[[], Any], stamp: Any = None) -> Any:
        """`make()`, kept to the end of the `steady` block or to another stamp; only within one."""
        kept = self._state.kept[is_capturing()]
        at = self.weight.device, self.weight.dtype, stamp
        if name not in kept or kept[name][0] != at:
            kept[name] = at, make()
        return kept[name][1]

    # --- what torch does to modules ---------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self._state.forget()  # the shortcut holds what may just have been replaced
        self._state.arena.prepare(self.anchor().device)
        if self._state.merged and not self.weight.is_meta:
            self._state.stale = True  # the fold of the converted weight, not the converted fold
            self.folded()
        return result

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        before = None if self.fastlora.svd_s is None else self.weight.detach().clone()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._state.forget()
        self._state.stale = self._state.merged
        if before is not None and not torch.equal(before, self.weight):  # another base
            self.fastlora.decompose(self.matrix(), self._state.path)

    def _replicate_for_data_parallel(self) -> Any:
        raise AdapterError(
            f"{self._state.path}: DataParallel copies layers in a way that adapters do not follow; "
            "use torch.nn.parallel.DistributedDataParallel"
        )

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        arena = self._state.arena
        arena.join(self)
        # Now: a compiled graph finds gates and does not make them.
        arena.prepare(self.anchor().device)
        arena.share([self])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Adapted classes may be made at run time; pickle finds them through the base.
        _, _, *state = super().__reduce_ex__(max(2, protocol))  # type: ignore[misc]
        return blank, (base_class(type(self)),), *state


# --- which class adapts which ---------------------------------------------------------------------

_ADAPTED: dict[type[nn.Module], type[Adapted] | None] = {}
_BASE: dict[type[nn.Module], type[nn.Module]] = {}
_LIKE: dict[type[nn.Module], type[Adapted]] = {}
_LATER: dict[str, str] = {}
Class = TypeVar("Class", bound=type[Adapted])


def adapts(base: type[nn.Module]) -> Callable[[Class], Class]:
    """Registers the decorated class as the one that adapts modules of exactly type `base`."""

    def register(adapted: Class) -> Class:
        _ADAPTED[base], _BASE[adapted] = adapted, base
        return adapted

    return register


def adapts_subclasses(base: type[nn.Module]) -> Callable[[Class], Class]:
    """Registers the decorated class for modules of subclasses of `base` without one of their own,
    which may compute in any way: it is put before theirs and leaves their forward in charge."""

    def register(adapted: Class) -> Class:
        _LIKE[base] = adapted
        return adapted

    return register


def adapts_later(base: str, module: str) -> None:
    """Says which of our modules registers the class for another library's layers of type `base`,
    "package.module.Class": it imports that library, and is imported when there is such a layer."""
    _LATER[base] = module


def adapted_class(base: type[nn.Module]) -> type[Adapted] | None:
    """The class that adapts modules of exactly type `base`; None if there is none."""
    if base not in _ADAPTED:
        later = _LATER.get(f"{base.__module__}.{base.__qualname__}")
        if later is not None:
            import_module(later)
            return _ADAPTED.get(base)
        for ancestor, like in _LIKE.items():
            if issubclass(base, ancestor):
                adapted = type(f"Adapted{base.__name__}", (like, base), {})
                if exchangeable(base, adapted):
                    adapts(base)(adapted)
                else:
                    _ADAPTED[base] = None
    return _ADAPTED.get(base)


def exchangeable(base: type[nn.Module], adapted: type[Adapted]) -> bool:
    """Whether an object of one class can become one of the other: not where abstract classes
    before nn.Linear have given it another layout, as that of quanto's QLinear."""
    try:
        object.__setattr__(object.__new__(base), "__class__", adapted)
    except TypeError:
        return False
    return True


def base_class(adapted: type[nn.Module]) -> type[nn.Module]:
    """The class that a layer had. Raises AdapterError where somebody has changed it since."""
    if adapted not in _BASE:
        raise AdapterError(
            f"{adapted.__name__}: the layer's class was changed after it was adapted (by a "
            "parametrisation, by fully_shard); undo that first"
        )
    return _BASE[adapted]


def blank(base: type[nn.Module]) -> Adapted:
    """An adapted layer without anything in it, for pickle to fill."""
    adapted = adapted_class(base)
    assert adapted is not None
    return adapted.__new__(adapted)
