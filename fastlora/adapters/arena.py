"""The gates of all adapters of a model in one flat float32 buffer: strength is data, not code."""

import copy
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastlora.adapters.slots import one_strength
from fastlora.adapters.specs import AdapterError, fits_float32

Scale = float | Tensor
PIECE = (1 << 15) - 1  # entries that torch writes without waking its threads, which takes longer


class Arena:
    """Scales by adapter name, and the gate values `scale · α/r` of every layer's every rank.

    A layer owns the entries `[offset, offset + width)`: those of its reserve, where adapters have
    theirs and the rest is zero, then those of its other adapters one after another. The values have
    shape `[total]`, or `[batch, total]` once a scale is a tensor with one strength per sample. They
    are written in place, so their addresses stay as long as total and batch do, and those of
    reserves come first; `epoch` rises whenever something that a layer may have cached changes.
    Writing a number waits for no device.
    """

    generation = 0  # how often any arena has been laid out: what a walk over a model found is valid

    def __init__(self) -> None:
        self.scales: dict[str, Scale] = {}
        self.enabled: dict[str, bool] = {}
        self.epoch = 0
        self.copies = 1  # how often the batch is repeated (classifier-free guidance)
        self.per_sample: tuple[str, ...] = ()  # adapters that are on and whose scale is a tensor
        self.froze: set[str] = set()  # adapters whose injection asked for a frozen base
        self.reserve_froze = False  # so did a reserve, which is there
        self.learned = False  # some scale requires a gradient
        self.folded = False  # some layer may be
        self.steady = [0, 0]  # blocks that say that weights stay; those begun in a capture
        self.unsettled = False  # some layer has others than it had when they were laid out
        self.materialize = "forward"  # how long training keeps W' of spectral shifts, or "step"
        self._layers: dict[int, weakref.ref[Any]] = {}
        self._total = 0  # entries
        self._block = 1  # so many neighbours of each have its value: the gcd of all widths
        self._ratios = torch.empty(0)  # α/r per block
        self._largest: dict[str, float] = {}  # the largest |α/r| of each adapter
        self._whole: dict[str, str] = {}  # adapters with one strength for all samples, and why
        # Per block, which of `scales` is its; their number where it is nobody's.
        self._owners = torch.empty(0, dtype=torch.long)
        self._index: dict[torch.device, tuple[Tensor, Tensor]] = {}  # owners and ratios there
        self._values: dict[torch.device, Tensor] = {}
        self._writers: dict[torch.device, Any] = {}  # (values, a value per block, pieces of both)

    # --- layout ---------------------------------------------------------------------------------

    def layers(self) -> list[Any]:
        """The adapted layers that take their gates from here."""
        found = [ref() for ref in self._layers.values()]
        return [m for m in found if m is not None and "_state" in vars(m) and self.owns(m)]

    def owns(self, layer: Any) -> bool:
        return layer._state.arena is self

    def join(self, layer: Any) -> None:
        """Takes in a layer; `layout` gives it its entries."""
        self._layers[id(layer)] = weakref.ref(layer)
        self.folded |= layer._state.merged

    @torch.inference_mode(False)
    def layout(self) -> None:
        """Gives every layer its entries. Adapters without a layer are forgotten."""
        layers = sorted(self.layers(), key=lambda layer: not slots_of(layer).capacity)
        self._layers = {id(layer): weakref.ref(layer) for layer in layers}
        self.unsettled = False
        self._largest, self._whole = {}, {}
        spans: list[tuple[int, int, str, float]] = []  # (first entry, width, name, ratio)
        edges: list[int] = []  # a part of the gates begins and ends with a block
        before, total = self._total, 0
        for layer in layers:
            holder, state = slots_of(layer), layer._state
            state.forget()
            state.offset, state.offsets, state.outside = total, {}, holder.outside()
            edges += [total, holder.capacity]
            total += holder.capacity
            for name, slot in holder.items():
                inside = name in holder.reserved_rows
                at = state.offset + holder.reserved_rows[name] if inside else total
                total += 0 if inside else slot.width
                spans.append((at, slot.width, name, slot.ratio))
                edges += [at, slot.width]
                state.offsets[name] = at - state.offset
                self._largest[name] = max(self._largest.get(name, 0.0), abs(slot.ratio))
                if slot.whole and name not in self._whole:
                    self._whole[name] = one_strength(state.path, name, slot)
            state.width = total - state.offset
        names = list(dict.fromkeys(name for _, _, name, _ in spans))
        for name in names:
            self.scales.setdefault(name, 1.0)
            self.enabled.setdefault(name, True)
        for name in set(self.scales) - set(names):
            del self.scales[name], self.enabled[name]
        self.froze &= set(names)
        self.reserve_froze &= any(slots_of(layer).capacity for layer in layers)
        order = {name: i for i, name in enumerate(self.scales)}
        self._total, self._block = total, math.gcd(total, *edges) or 1
        block = self._block
        owners, ratios = [len(order)] * (total // block), [0.0] * (total // block)
        for at, width, name, ratio in spans:
            first, end = at // block, (at + width) // block
            owners[first:end] = [order[name]] * (end - first)
            ratios[first:end] = [ratio] * (end - first)
        self._owners = torch.tensor(owners, dtype=torch.long)
        self._ratios = torch.tensor(ratios, dtype=torch.float32)
        self._note()
        self._mark_rows()
        self._index.clear()
        self._writers.clear()
        if total != before:
            self._values.clear()
        self.epoch += 1
        Arena.generation += 1
        self.write()
        for layer in layers:
            self.prepare(layer.anchor().device)
        if total == before:
            self.share(layers)

    @torch.inference_mode(False)
    def renew_ratios(self, name: str) -> None:
        """Takes up other α/r of an adapter whose ranks and places stay: a part of `layout`, in a
        fraction of its time."""
        self._ratios = self._ratios.clone()
        blocks, largest = self._ratios.numpy(), 0.0
        for layer in self.layers():
            slot, state = slots_of(layer)._modules.get(name), layer._state
            if slot is not None:
                first = (state.offset + state.offsets[name]) // self._block
                blocks[first : first + slot.width // self._block] = ratio = slot.ratio
                largest = max(largest, abs(ratio))
        if name in self._largest:
            self._largest[name] = largest
        self._index.clear()
        self.write()

    # --- scales ---------------------------------------------------------------------------------

    @property
    def batch(self) -> int | None:
        """Samples that have a strength of their own, or None."""
        scale = self.scales[self.per_sample[0]] if self.per_sample else None
        return len(scale) if isinstance(scale, Tensor) else None

    def check(self, scales: Mapping[str, Scale]) -> None:
        """Raises AdapterError unless these scales fit the ones that stay."""
        new = {**self.scales, **scales}
        sizes = {len(s) for s in new.values() if isinstance(s, Tensor)}
        if len(sizes) > 1:
            raise AdapterError(f"per-sample scales: expected one batch size, got {sorted(sizes)}")

    def check_each(self, scales: Mapping[str, Scale]) -> None:
        """Raises AdapterError unless the gates of these scales are finite numbers, and for a scale
        per sample of an adapter that cannot have one."""
        for name, scale in scales.items():
            if isinstance(scale, Tensor) and name in self._whole:
                raise AdapterError(self._whole[name])
            require_finite(name, scale, self._largest.get(name, 1.0))

    def set(self, scales: Mapping[str, Scale], enabled: Mapping[str, bool]) -> None:
        """Replaces scales (checked ones) and switches of adapters here and writes the gates."""
        before = self._pattern()
        self.scales.update(scales)
        self.enabled.update(enabled)
        self._note()
        now = self._pattern()
        if now != before:
            self.epoch += 1
            if now[0] != before[0]:
                self._mark_rows()
        self.write()

    def set_ratio(self, layer: Any, name: str, ratio: float) -> None:
        """Writes another α/r of one adapter of one layer, which has been laid out."""
        state, width = layer._state, layer.fastlora[name].width
        offset = state.offset + state.offsets[name]
        first, count = offset // self._block, width // self._block
        self._largest[name] = max(self._largest.get(name, 0.0), abs(ratio))
        self._ratios.numpy()[first : first + count] = ratio
        for _, known in self._index.values():
            if known is not self._ratios:
                known.narrow(0, first, count).fill_(ratio)
        number = self.scales[name] if self.enabled[name] else 0.0
        for device, values in self._values.items():
            if isinstance(number, Tensor) or values.dim() == 2:
                new = self._compute(device, offset, width).detach()
                values.narrow(-1, offset, width).copy_(new)
            else:
                values.narrow(-1, offset, width).fill_(number * ratio)
        state.stale = state.merged

    def off(self, name: str) -> bool:
        """Known on the host to have no effect: the layer need not be computed."""
        scale = self.scales[name]
        return not self.enabled[name] or (not isinstance(scale, Tensor) and scale == 0.0)

    def _note(self) -> None:
        tensors = {n: s for n, s in self.scales.items() if isinstance(s, Tensor)}
        self.per_sample = tuple(name for name in tensors if self.enabled[name])
        self.learned = any(tensors[name].requires_grad for name in self.per_sample)

    def _mark_rows(self) -> None:
        """Tells the layers whether a strength in their reserve is per sample."""
        for layer in self.layers():
            names = slots_of(layer).reserved_rows
            layer._state.rows = any(name in names for name in self.per_sample)

    def _pattern(self) -> Any:
        return self.per_sample, self.learned, [self.off(name) for name in self.scales]

    # --- values ---------------------------------------------------------------------------------

    def write(self) -> None:
        """Writes every device's gates, in place while the shape stays."""
        for device, old in self._values.items():
            if self.batch is None and old.dim() == 1:
                self._write_numbers(device, old)
                continue
            new = self._compute(device, 0, self._total).detach()
            if old.shape == new.shape:
                old.copy_(new)
            else:
                self._replace(device, new)

    def _replace(self, device: torch.device, values: Tensor) -> None:
        """Other values for a device, at another address."""
        self._values[device] = values
        self.epoch += 1
        self.share(self.layers())

    # A view that is made under inference mode has to serve training later.
    @torch.inference_mode(False)
    def share(self, layers: Iterable[Any]) -> None:
        """Gives layers their parts of the values."""
        for layer in layers:
            state = layer._state
            state.parts = {
                device: values.narrow(-1, state.offset, state.width)
                for device, values in self._values.items()
            }

    @torch.no_grad()
    def _write_numbers(self, device: torch.device, values: Tensor) -> None:
        owners, ratios = self._indices(device)
        writer = self._writers.get(device)
        if writer is None or writer[0] is not values:  # views cost as much as what they are for
            step = max(1, PIECE // self._block) if device.type == "cpu" else len(ratios)
            with torch.inference_mode(False):
                blocks = torch.empty_like(ratios)
                parts = (t.split(step) for t in (values.view(-1, self._block), blocks[:, None]))
                writer = self._writers[device] = (values, blocks, list(zip(*parts, strict=True)))
        _, blocks, pieces = writer
        torch.index_select(self._numbers(device), 0, owners, out=blocks)
        blocks.mul_(ratios)
        for to, source in pieces:
            to.copy_(source)

    def gate(self, device: torch.device, offset: int, width: int) -> Tensor:
        """The gates `[width]` or `[batch, width]` of a layer: a view of the buffer."""
        if self.learned:  # with a graph of its own for each use, and always the scale's value now
            return self._compute(device, offset, width)
        self.prepare(device)
        return self._values[device].narrow(-1, offset, width)

    def stamp(self, device: torch.device) -> tuple[int, int]:
        """Another one whenever the gates on a device have been written."""
        self.prepare(device)
        values = self._values[device]
        return values.data_ptr(), values._version

    def prepare(self, device: torch.device) -> None:
        """Makes the gates exist on a device."""
        if device not in self._values and self._total:
            values = self._compute(device, 0, self._total).detach()
            if self._values.setdefault(device, values) is values:  # of two threads the first
                self.share(self.layers())

    def gates(self, device: torch.device, enabled: Mapping[str, bool], copies: int) -> Tensor:
        """All gates `[total]` or `[copies · batch, total]` as they would be with these switches, in
        the shape that they have with the present ones."""
        now = self.enabled, self.copies
        try:
            self.enabled, self.copies = {**self.enabled, **enabled}, self.copies * copies
            return self._compute(device, 0, self._total).detach()
        finally:
            self.enabled, self.copies = now

    @contextmanager
    def lent(self, device: torch.device, values: Tensor) -> Iterator[None]:
        """Within it the layers read their gates from `values`, whatever the strengths are."""
        self.prepare(device)
        own = self._values.get(device)
        self._replace(device, values)
        try:
            yield
        finally:
            del self._values[device]
            if own is not None:
                self._replace(device, own)

    # Also when first called under inference mode, the buffer has to serve training later.
    @torch.inference_mode(False)
    def _compute(self, device: torch.device, offset: int, width: int) -> Tensor:
        first, count = offset // self._block, width // self._block
        owners, ratios = (t.narrow(0, first, count) for t in self._indices(device))
        if not self.per_sample:
            values = self._numbers(device)[owners] * ratios
            return values.repeat_interleave(self._block, output_size=width)
        columns: list[Tensor] = []
        for name, scale in self.scales.items():
            if self.enabled[name] and isinstance(scale, Tensor):
                columns.append(scale.to(device, torch.float32))
            else:
                number = 0.0 if isinstance(scale, Tensor) or not self.enabled[name] else scale
                columns.append(torch.full((self.batch or 1,), number, device=device))
        columns.append(torch.zeros_like(columns[0]))  # for entries that are nobody's
        values = torch.stack(columns, -1)[:, owners] * ratios
        values = values.repeat_interleave(self._block, 1, output_size=width)
        return values.repeat(self.copies, 1)

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Owners and ratios of all blocks on a device."""
        found = self._index.get(device)
        if found is None:
            with torch.inference_mode(False):
                found = self._owners.to(device), self._ratios.to(device)
            self._index[device] = found
        return found

    def _numbers(self, device: torch.device) -> Tensor:
        """The scales, which are numbers, in their order, and a zero for entries that are nobody's.
        From pinned memory: a copy of what the host may change would wait for the device."""
        on = [s if self.enabled[n] else 0.0 for n, s in self.scales.items()]
        numbers = [s for s in on if not isinstance(s, Tensor)]
        if device.type != "cuda":
            return torch.tensor([*numbers, 0.0], dtype=torch.float32, device=device)
        host = torch.tensor([*numbers, 0.0], dtype=torch.float32, pin_memory=True)
        return host.to(device, non_blocking=True)

    # --- copies ---------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> "Arena":
        new = Arena()
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        # The values are rebuilt, and the layers of the copy join by themselves: nothing of a copy
        # may look into the original's buffer.
        scales = {
            n: s.detach() if isinstance(s, Tensor) and not s.is_leaf else s
            for n, s in self.scales.items()
        }
        rebuilt: dict[str, Any] = {"_index": {}, "_values": {}, "_writers": {}, "_layers": {}}
        rebuilt |= {"steady": [0, 0], "materialize": "forward"}
        return {**self.__dict__, "scales": scales, **rebuilt}


def slots_of(layer: Any) -> Any:
    """`layer.fastlora` without the search that a module's attribute is: models have hundreds."""
    return layer._modules["fastlora"]


def checked(name: str, scale: Any) -> Scale:
    """A scale as it is kept: a finite number, or a floating tensor [batch] that nobody else writes.

    A tensor that requires a gradient is kept as it is: the gates are computed from it at every use.
    """
    if isinstance(scale, Tensor) and scale.dim() == 0 and not scale.requires_grad:
        scale = float(scale)
    if isinstance(scale, Tensor):
        if scale.dim() != 1 or len(scale) == 0 or not scale.is_floating_point():
            hint = " (a learned strength: expand it to the batch)" if scale.requires_grad else ""
            raise AdapterError(
                f"scale of {name!r}: expected a number or a floating tensor [batch], "
                f"got {scale.dtype} {list(scale.shape)}{hint}"
            )
        require_finite(name, scale)
        return scale if scale.requires_grad else scale.clone()
    try:
        number = float(scale)
    except (TypeError, ValueError, OverflowError):
        raise AdapterError(
            f"scale of {name!r}: expected a finite number or a tensor [batch], got {scale!r}"
        ) from None
    require_finite(name, number)
    return number


def require_finite(name: str, scale: Scale, ratio: float = 1.0) -> None:
    """Raises AdapterError unless `scale · ratio` is finite in float32.

    A tensor on another device than the CPU is not looked at: that would wait for the device.
    """
    bad: float | None = None
    if not isinstance(scale, Tensor):
        bad = None if fits_float32(scale * ratio) else scale
    elif scale.device.type == "cpu":
        values = scale.detach().to(torch.float32) * ratio
        wrong = ~values.isfinite()
        bad = float(scale.detach()[wrong][0]) if wrong.any() else None
    if bad is not None:
        times = "" if ratio == 1.0 else f", also times alpha / rank = {ratio:g}"
        raise AdapterError(
            f"scale of {name!r}: expected a finite number or a tensor [batch] of them "
            f"(float32{times}), got {bad!r}"
        )
