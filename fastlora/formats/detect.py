"""Which format a file has, by its content, and the reader for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastlora.formats.changes import AdapterFile


def unpack(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
    source: str = "the file",
) -> AdapterFile:
    """The changes that a file asks for, whatever its format; `config`: PEFT's adapter_config.json.

    Values are not looked at but for scalars, so that all else may be on the meta device. Raises
    FormatError naming `source` and the keys for a file that no format explains.
    """
    raise NotImplementedError
