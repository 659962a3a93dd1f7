"""The gates of all adapters of a model in one flat float32 buffer: strength is data, not code."""

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastlora.adapters.specs import AdapterError, fits_float32

Scale = float | Tensor


class Arena:
    """Scales by adapter name, and the gate values `scale · α/r` of every layer's every rank.

    A layer owns the entries `[offset, offset + width)`: those of its adapters one after another.
    The values have shape `[total]`, or `[batch, total]` once a scale is a tensor with one strength
    per sample. They are written in place, so their addresses stay as long as layout and batch do;
    `epoch` rises whenever something that a layer may have cached changes.
    """

    def __init__(self) -> None:
        self.scales: dict[str, Scale] = {}
        self.enabled: dict[str, bool] = {}
        self.epoch = 0
        self.copies = 1  # how often the batch is repeated (classifier-free guidance)
        self.per_sample: tuple[str, ...] = ()  # adapters that are on and whose scale is a tensor
        self.froze: set[str] = set()  # adapters whose injection asked for a frozen base
        self.learned = False  # some scale requires a gradient
        self._layers: dict[int, weakref.ref[Any]] = {}
        self._ratios = torch.empty(0)  # α/r per entry
        self._largest: dict[str, float] = {}  # the largest |α/r| of each adapter
        self._owners = torch.empty(0, dtype=torch.long)  # per entry, which of `scales` is its
        self._values: dict[torch.device, Tensor] = {}

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

    @torch.inference_mode(False)
    def layout(self) -> None:
        """Gives every layer its entries. Adapters without a layer are forgotten."""
        ratios: list[float] = []
        owners: list[str] = []
        layers = self.layers()
        self._largest = {}
        self._layers = {id(layer): weakref.ref(layer) for layer in layers}
        for layer in layers:
            layer._state.offset = len(owners)
            layer._state.forget()
            for name, slot in layer.fastlora.items():
                owners += [name] * slot.width
                ratios += [slot.ratio] * slot.width
                self._largest[name] = max(self._largest.get(name, 0.0), abs(slot.ratio))
        for name in dict.fromkeys(owners):
            self.scales.setdefault(name, 1.0)
            self.enabled.setdefault(name, True)
        for name in set(self.scales) - set(owners):
            del self.scales[name], self.enabled[name]
        self.froze &= set(owners)
        order = {name: i for i, name in enumerate(self.scales)}
        self._owners = torch.tensor([order[name] for name in owners], dtype=torch.long)
        self._ratios = torch.tensor(ratios, dtype=torch.float32)
        self._note()
        self._values.clear()
        self.epoch += 1
        for layer in layers:
            self.prepare(layer.anchor().device)

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

    def check_finite(self, scales: Mapping[str, Scale]) -> None:
        """Raises AdapterError unless the gates of these scales are finite numbers."""
        for name, scale in scales.items():
            require_finite(name, scale, self._largest.get(name, 1.0))

    def set(self, scales: Mapping[str, Scale], enabled: Mapping[str, bool]) -> None:
        """Replaces scales (checked ones) and switches of adapters here and writes the gates."""
        before = self._pattern()
        self.scales.update(scales)
        self.enabled.update(enabled)
        self._note()
        if self._pattern() != before:
            self.epoch += 1
        self.write()

    def off(self, name: str) -> bool:
        """Known on the host to have no effect: the layer need not be computed."""
        scale = self.scales[name]
        return not self.enabled[name] or (not isinstance(scale, Tensor) and scale == 0.0)

    def _note(self) -> None:
        enabled = {n: s for n, s in self.scales.items() if self.enabled[n]}
        tensors = {n: s for n, s in enabled.items() if isinstance(s, Tensor)}
        self.per_sample = tuple(tensors)
        self.learned = any(s.requires_grad for s in tensors.values())

    def _pattern(self) -> Any:
        return self.per_sample, self.learned, tuple(self.off(n) for n in self.scales)

    # --- values ---------------------------------------------------------------------------------

    def write(self) -> None:
        """Writes every device's gates, in place while the shape stays."""
        for device, old in self._values.items():
            new = self._compute(device, 0, len(self._owners)).detach()
            if old.shape == new.shape:
                old.copy_(new)
            else:
                self._values[device] = new
                self.epoch += 1

    def gate(self, device: torch.device, offset: int, width: int) -> Tensor:
        """The gates `[width]` or `[batch, width]` of a layer: a view of the buffer."""
        if self.learned:  # with a graph of its own for each use, and always the scale's value now
            return self._compute(device, offset, width)
        self.prepare(device)
        return self._values[device].narrow(-1, offset, width)

    def prepare(self, device: torch.device) -> None:
        """Makes the gates exist on a device."""
        if device not in self._values and len(self._owners):
            values = self._compute(device, 0, len(self._owners)).detach()
            self._values.setdefault(device, values)  # of two threads the first

    # Also when first called under inference mode, the buffer has to serve training later.
    @torch.inference_mode(False)
    def _compute(self, device: torch.device, offset: int, width: int) -> Tensor:
        owners = self._owners[offset : offset + width]
        columns: list[Tensor] = []
        for name, scale in self.scales.items():
            scale = scale if self.enabled[name] else 0.0
            if isinstance(scale, Tensor):
                columns.append(scale.to(device, torch.float32))
            else:
                column = torch.tensor(scale, dtype=torch.float32, device=device)
                columns.append(column if self.batch is None else column.expand(self.batch))
        ratios = self._ratios[offset : offset + width].to(device)
        values = torch.stack(columns, -1)[..., owners.to(device)] * ratios
        return values if self.batch is None else values.repeat(self.copies, 1)

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
        return {**self.__dict__, "scales": scales, "_values": {}, "_layers": {}}


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
