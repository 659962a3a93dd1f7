"""The parameters that adapters add to a layer, kept in the layer's child module `fastlora`.

A slot's protocol: `owned` (names of its parameters), `kind`, `width` (its entries in the arena),
`ratio` (its gate at scale 1), `rank`, and `whole`: why it has one strength for all samples, or "".
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.adapters.decomposition import LinAlgError, Settings
from fastlora.adapters.factor_cache import FactorCache, folder_of, obtain, place
from fastlora.adapters.specs import AdapterError, LoRA, Spectral


class Slot(nn.Module):
    """One named adapter of one layer."""

    owned: tuple[str, ...]
    kind: str
    width: int
    ratio: float
    rank: int | None
    whole: str = ""

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
        # A plain base checkpoint knows nothing of adapters: it loads under strict=True and leaves
        # them as they are. One that has some of this slot's keys must have all of them.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )


class LoRASlot(Slot):
    """down [rank, in], up [out, rank]; convolutions [rank, in/groups, kh, kw] and
    [out, rank/groups, 1, 1]; embeddings [rank, vocabulary], [dim, rank]. DoRA adds magnitude [out].
    """

    down: nn.Parameter
    up: nn.Parameter
    magnitude: nn.Parameter | None

    def __init__(
        self, spec: LoRA, down: Tensor, up: Tensor, magnitude: Tensor | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        # What assigning them does, without its questions: a model has hundreds of these.
        tensors = {"down": down, "up": up, "magnitude": magnitude}
        self._parameters.update(
            {k: t if t is None else nn.Parameter(t) for k, t in tensors.items()}
        )

    @property
    def owned(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self._parameters) if self.spec.dora else ("down", "up")

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "dora" if self.spec.dora else "lora"

    @property
    def whole(self) -> str:  # type: ignore[override]
        return "has DoRA's norm, which depends on the strength" if self.spec.dora else ""

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.down.shape[0]

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self.down.shape[0]

    @property
    def ratio(self) -> float:  # type: ignore[override]
        return self.spec.ratio

    def extra_repr(self) -> str:
        return f"rank={self.width}, ratio={self.ratio:g}, kind={self.kind}"


class SpectralSlot(Slot):
    """shift [rank] of a matrix's singular values, [dim] or [1] added to a norm's weight."""

    owned = ("shift",)
    kind = "spectral"
    width = 1
    ratio = 1.0
    rank = None
    whole = "changes the weight itself"

    def __init__(self, spec: Spectral, shift: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.shift = nn.Parameter(shift)

    def extra_repr(self) -> str:
        return f"shifts={self.shift.numel()}, norms={self.spec.norms}"


def one_strength(path: str, name: str, slot: Slot) -> str:
    """Why the strength of an adapter cannot differ per sample, for errors; "" where it can."""
    if not slot.whole:
        return ""
    return (
        f"{path or 'the layer'}: {name!r} ({slot.kind}) {slot.whole}, so its strength cannot "
        "differ per sample; use a number for its scale"
    )


# Of an adapter: the parameters of its slot by name, D, its address, U, its address.
Pin = tuple[dict[str, Any], nn.Parameter, int, nn.Parameter, int]
Pins = tuple[Pin, ...]


class Packed(NamedTuple):
    """The adapters in a layer's reserve as one LoRA: what `low_rank` takes for a slot."""

    down: Tensor  # [width, ...]
    up: Tensor  # [out, width, ...]
    spec: LoRA = LoRA()

    @property
    def width(self) -> int:
        return self.down.shape[0]


BUFFERS = (
    "svd_u", "svd_s", "svd_vh", "folded_weight", "folded_bias", "reserved_down", "reserved_up",
)  # fmt: skip


class Slots(nn.ModuleDict):
    """The slots of a layer by adapter name, with what they share, never part of a state dict:
    the singular value decomposition of the base weight, what is folded, and the reserve.

    The parameters of the adapters in the reserve are views of its buffers: one after another along
    the rank, so that all of them are one LoRA of the reserve's rank, at addresses that stay when
    adapters come and go. Rows that nobody has are zeros.
    """

    svd_u: Tensor | None  # [out, rank]
    svd_s: Tensor | None  # [rank]
    svd_vh: Tensor | None  # [rank, in]
    folded_weight: Tensor | None
    folded_bias: Tensor | None  # where adapters change the bias
    reserved_down: Tensor | None  # [capacity, in], and as LoRASlot.down for other layers
    reserved_up: Tensor | None  # [out, capacity]

    if TYPE_CHECKING:  # torch knows of modules only

        def __getitem__(self, key: str) -> Any: ...
        def items(self) -> Any: ...

    def __init__(self) -> None:
        super().__init__()
        # What register_buffer(name, None, persistent=False) does.
        self._buffers.update(dict.fromkeys(BUFFERS))
        self._non_persistent_buffers_set.update(BUFFERS)
        self.reserved_rows: dict[str, int] = {}  # the first row of each adapter in the reserve
        self.drops = False  # one of them has dropout
        self.pins: Pins = ()  # their parameters and where those are
        self.register_load_state_dict_post_hook(take_in)

    # --- the reserve ------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """The rank of the reserve; 0 without one."""
        down = self._buffers["reserved_down"]  # at once: a model has hundreds of these
        return 0 if down is None else down.shape[0]

    def takes(self, slot: Slot) -> bool:
        """Whether such a slot belongs into the reserve."""
        reserved = self._buffers["reserved_down"] is not None
        return reserved and isinstance(slot, LoRASlot) and not slot.spec.dora

    def outside(self) -> tuple[tuple[str, Slot], ...]:
        """The slots that are not in the reserve."""
        return tuple((n, s) for n, s in self.items() if n not in self.reserved_rows)

    def room(self, without: str = "") -> int:
        """Ranks of the reserve that no adapter has, or none but `without`."""
        return self.capacity - sum(self[n].width for n in self.reserved_rows if n != without)

    @torch.no_grad()
    def set_reserve(self, down: Tensor | None, up: Tensor | None) -> None:
        """Other buffers (zeros, with room for all that belongs into them), or none."""
        for name in list(self.reserved_rows):
            self.leave(name)
        self.reserved_down, self.reserved_up = down, up
        for name, slot in self.items():
            if self.takes(slot):
                self.enter(name)

    @torch.no_grad()
    def enter(self, name: str) -> None:
        """Moves a slot into the reserve, which has room for it."""
        self.renew()
        width, row = self[name].width, 0
        taken = sorted((start, self[n].width) for n, start in self.reserved_rows.items())
        for start, other in taken:
            if start - row >= width:
                break
            row = start + other
        if row + width > self.capacity:  # there is room, in pieces
            others = list(self.reserved_rows)
            for other in others:
                self.leave(other)
            for other in others:
                self.enter(other)
            row = self.capacity - self.room()
        self.reserved_rows[name] = row
        self.drops |= self[name].spec.dropout > 0
        self.pins += (self.moved(name),)

    @torch.no_grad()
    def leave(self, name: str) -> None:
        """Gives a slot memory of its own again, and zeros its rows."""
        self.renew()
        slot = self[name]
        own, row = slot._parameters, self.reserved_rows.pop(name)
        for parameter, view in zip((own["down"], own["up"]), self.places(slot, row), strict=True):
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
            view.zero_()
        self.drops = any(self[n].spec.dropout > 0 for n in self.reserved_rows)
        self.pins = tuple(pin for pin in self.pins if pin[0] is not own)

    def places(self, slot: Slot, row: int) -> tuple[Tensor, Tensor]:
        down, up = self._buffers["reserved_down"], self._buffers["reserved_up"]
        assert down is not None and up is not None
        return down.narrow(0, row, slot.width), up.narrow(1, row, slot.width)

    @torch.no_grad()
    def settle(self) -> None:
        """Moves all parameters to their places."""
        self.pins = tuple(self.moved(name) for name in self.reserved_rows)

    def moved(self, name: str) -> Pin:
        """Moves the parameters of a slot to their place; where they are now. Whatever memory the
        buffers have had before may be somebody's backup, so this is for rows that nobody has."""
        slot = self[name]
        own = slot._parameters
        down, up = own["down"], own["up"]
        for parameter, view in zip(
            (down, up), self.places(slot, self.reserved_rows[name]), strict=True
        ):
            if not same_place(parameter, view):
                view.copy_(parameter)
                gradient, parameter.grad = parameter.grad, None
                parameter.data = view
                if gradient is not None:
                    parameter.grad = gradient.to(view.dtype)
        return own, down, down.data_ptr(), up, up.data_ptr()

    def renew(self) -> None:
        """New buffers where somebody has exchanged parameters or their memory: what was exchanged
        may be a backup that lies in the old ones."""
        if not in_place(self.pins):
            assert self.reserved_down is not None and self.reserved_up is not None
            self.reserved_down = torch.zeros_like(self.reserved_down)
            self.reserved_up = torch.zeros_like(self.reserved_up)
            self.settle()

    def packed(self, width: int) -> Packed:
        """The first `width` rows of the reserve."""
        assert self.reserved_down is not None and self.reserved_up is not None
        if width == self.capacity:
            return Packed(self.reserved_down, self.reserved_up)
        return Packed(self.reserved_down.narrow(0, 0, width), self.reserved_up.narrow(1, 0, width))

    def __getstate__(self) -> Any:
        return {**self.__dict__, "pins": ()}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.settle()  # a copy's parameters have memory of their own

    def extra_repr(self) -> str:
        if not self.capacity:
            return ""
        return f"reserve of rank {self.capacity}, {self.room()} of it free"

    # --- the decomposition ------------------------------------------------------------------------

    def decompose(self, matrix: Tensor, path: str) -> None:
        """The decomposition of another `matrix [out, in]`, of the rank that the shifts have."""
        assert self.svd_s is not None
        settings, cache = Settings(rank=len(self.svd_s)), FactorCache(folder_of(True), writes=False)
        try:
            found, _ = obtain(matrix, settings.of(matrix), cache, place(matrix))
        except LinAlgError as error:
            raise AdapterError(f"{path}: its weight has no decomposition: {error}") from None
        self.svd_u, self.svd_s, self.svd_vh = found[:3]
        cache.warn()

    def shifted(self) -> bool:
        """Whether a slot has shifts of the singular values."""
        return any(isinstance(slot, SpectralSlot) for slot in self.values())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        values, buffer = self.svd_s, self.reserved_down
        result = super()._apply(fn, recurse)
        if self.reserved_down is not buffer:
            self.settle()
        if values is not None and self.svd_s is not None and self.svd_u is not None:
            # Like the gates, the singular values stay float32 beside 16-bit weights.
            wide = torch.float64 if self.svd_u.dtype == torch.float64 else torch.float32
            if self.svd_s.dtype != wide:
                self.svd_s = values.to(self.svd_s.device, wide)
        return result


def take_in(slots: Slots, incompatible_keys: Any) -> None:
    """After load_state_dict, which may have replaced parameters (`assign=True`)."""
    slots.renew()


def same_place(a: Tensor, b: Tensor) -> bool:
    return (
        (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
        and a.data_ptr() == b.data_ptr()
    )  # fmt: skip


def in_place(pins: Pins) -> bool:
    """Whether the parameters of `Slots.pins` are the same ones and where they were."""
    for own, down, down_place, up, up_place in pins:
        if own.get("down") is not down or own.get("up") is not up:
            return False
        if down.data_ptr() != down_place or up.data_ptr() != up_place:
            return False
    return True


def shapes_lora(target: nn.Module, weight: Tensor, spec: LoRA) -> dict[str, tuple[int, ...]]:
    """The shapes of a LoRASlot's parameters beside a layer."""
    rank = spec.rank
    if isinstance(target, nn.Conv2d):
        shapes: dict[str, tuple[int, ...]] = {
            "down": (rank, *weight.shape[1:]),
            "up": (weight.shape[0], rank // target.groups, 1, 1),
        }
    elif isinstance(target, nn.Linear):  # a quantised weight may have any shape
        shapes = {"down": (rank, target.in_features), "up": (target.out_features, rank)}
    else:  # an embedding's weight [vocabulary, dim], Conv1D's [in, out]
        shapes = {"down": (rank, weight.shape[0]), "up": (weight.shape[1], rank)}
    if spec.dora:
        shapes["magnitude"] = (shapes["up"][0],)
    return shapes


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator, **kwargs: Any) -> Tensor:
    """U(-1/√fan_in, 1/√fan_in): `kaiming_uniform_(a=√5)`, drawn on the CPU so that a seed means the
    same numbers on every device."""
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32) * (2 * bound) - bound
    return drawn.to(**kwargs)
