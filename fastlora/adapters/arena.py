"""The gates of all adapters of a model in one flat float32 buffer: strength is data, not code."""

import copy
from typing import Any

import torch
from torch import Tensor

from fastlora.adapters.specs import AdapterError


class Arena:
    """Scales by adapter name, and the gate values `scale · α/r` of every layer's every rank.

    A layer owns the entries `[offset, offset + width)`: those of its adapters one after another. The
    values have shape `[total]`, or `[batch, total]` once a scale is a tensor with one strength per
    sample. They are written in place, so their addresses stay as long as layout and batch do;
    `epoch` rises whenever something that a layer may have cached changes.
    """

    def __init__(self) -> None:
        self.scales: dict[str, float | Tensor] = {}
        self.enabled: dict[str, bool] = {}
        self.epoch = 0
        self.frozen: list[torch.nn.Parameter] = []  # base parameters that injecting froze
        self.copies = 1  # how often the batch is repeated (classifier-free guidance)
        self._ratios: list[float] = []  # α/r per entry
        self._owners: list[str] = []  # adapter name per entry
        self._values: dict[torch.device, Tensor] = {}

    # --- layout ---------------------------------------------------------------------------------

    def layout(self, layers: list[list[tuple[str, int, float]]]) -> list[int]:
        """Takes each layer's (name, width, ratio) list and returns the layers' offsets."""
        self._ratios, self._owners, offsets = [], [], []
        for slots in layers:
            offsets.append(len(self._owners))
            for name, width, ratio in slots:
                self._owners += [name] * width
                self._ratios += [ratio] * width
        for name in dict.fromkeys(self._owners):
            self.scales.setdefault(name, 1.0)
            self.enabled.setdefault(name, True)
        for name in set(self.scales) - set(self._owners):
            del self.scales[name], self.enabled[name]
        self._values.clear()
        self.epoch += 1
        return offsets

    # --- scales ---------------------------------------------------------------------------------

    def known(self, name: str) -> str:
        if name not in self.scales:
            raise AdapterError(
                f"no adapter named {name!r}; this model has {sorted(self.scales) or 'none'}"
            )
        return name

    @property
    def batch(self) -> int | None:
        """Samples that have a strength of their own, or None."""
        sizes = {len(s) for s in self.scales.values() if isinstance(s, Tensor)}
        return sizes.pop() if sizes else None

    def set(self, scales: dict[str, float | Tensor], enabled: dict[str, bool]) -> None:
        """Replaces scales and switches of the named adapters and writes the gates."""
        new = {**self.scales}
        for name, scale in scales.items():
            self.known(name)
            new[name] = _checked(name, scale)
        for name in enabled:
            self.known(name)
        sizes = {len(s) for s in new.values() if isinstance(s, Tensor)}
        if len(sizes) > 1:
            raise AdapterError(f"per-sample scales: expected one batch size, got {sorted(sizes)}")
        before = self._pattern()
        self.scales = new
        self.enabled.update(enabled)
        if self._pattern() != before:
            self.epoch += 1
        self.write()

    def tile(self, copies: int) -> None:
        """Repeats the rows of per-sample scales `copies` times along the batch."""
        if copies != self.copies:
            self.copies = copies
            if self.batch is not None:
                self.write()

    def off(self, name: str) -> bool:
        """Known on the host to have no effect: the layer need not be computed."""
        scale = self.scales[name]
        return not self.enabled[name] or (not isinstance(scale, Tensor) and scale == 0.0)

    def _pattern(self) -> Any:
        return self.batch, self.copies, tuple(self.off(n) for n in self.scales)

    # --- values ---------------------------------------------------------------------------------

    def write(self) -> None:
        """Writes every device's gates, in place while the shape stays."""
        for device in list(self._values):
            new = self._compute(device)
            old = self._values[device]
            if old.shape == new.shape and not new.requires_grad and not old.requires_grad:
                old.copy_(new)
            else:
                self._values[device] = new
                self.epoch += 1

    def gate(self, device: torch.device, offset: int, width: int) -> Tensor:
        """The view `[width]` or `[batch, width]` of a layer's gates."""
        self.prepare(device)
        return self._values[device].narrow(-1, offset, width)

    def prepare(self, device: torch.device) -> None:
        """Makes the gates exist on a device."""
        if device not in self._values and self._owners:
            self._values[device] = self._compute(device)

    # Also when first called under inference mode, the buffer has to serve training later.
    @torch.inference_mode(False)
    def _compute(self, device: torch.device) -> Tensor:
        names = list(self.scales)
        columns: list[Tensor] = []
        batch = self.batch
        for name in names:
            scale = self.scales[name] if self.enabled[name] else 0.0
            if isinstance(scale, Tensor):
                columns.append(scale.to(device, torch.float32))
            else:
                column = torch.tensor(scale, dtype=torch.float32, device=device)
                columns.append(column if batch is None else column.expand(batch))
        owner = torch.tensor([names.index(o) for o in self._owners], dtype=torch.long)
        ratio = torch.tensor(self._ratios, dtype=torch.float32)
        values = torch.stack(columns, -1)[..., owner.to(device)] * ratio.to(device)
        return values if batch is None else values.repeat(self.copies, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Arena":
        # The values are rebuilt: layers of the copy must not look into the original's buffer.
        new = Arena()
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": {}, "epoch": self.epoch + 1}


def _checked(name: str, scale: Any) -> float | Tensor:
    if isinstance(scale, Tensor):
        if scale.dim() == 0:
            return float(scale)
        if scale.dim() != 1 or len(scale) == 0 or not scale.is_floating_point():
            raise AdapterError(
                f"scale of {name!r}: expected a number or a floating tensor [batch], "
                f"got {scale.dtype} {list(scale.shape)}"
            )
        return scale
    try:
        return float(scale)
    except (TypeError, ValueError):
        raise AdapterError(
            f"scale of {name!r}: expected a number or a tensor [batch], got {scale!r}"
        ) from None
