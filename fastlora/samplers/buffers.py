"""Conditions and numbers in tensors that stay: what a captured graph reads is written into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fastlora.samplers.arguments import describe, equal, moved

Writes = list[tuple[Tensor, Tensor]]  # (buffer, its new values)


def copied(tree: Any) -> Any:
    """The same tuples and dicts with tensors of their own; everything else as it is."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(copied(value) for value in tree)
    return tree


def fitting(buffers: Any, values: Any, part: slice, argument: str) -> Iterator[tuple[Tensor, Any]]:
    """The pairs (rows `part` of a buffer, new values) of two equal structures. Raises ValueError
    for tensors of another shape or dtype and where something else than tensors has changed."""
    if isinstance(buffers, Tensor):
        rows = buffers[part] if buffers.dim() else buffers
        if not isinstance(values, Tensor) or (values.shape, values.dtype) != (
            rows.shape,
            rows.dtype,
        ):
            raise ValueError(
                f"Sampler: {argument}: expected {describe(rows)}, as when the Sampler was made, got"
                f" {describe(values)}"
            )
        yield rows, values
    elif isinstance(buffers, Mapping):
        if not isinstance(values, Mapping) or values.keys() != buffers.keys():
            raise ValueError(
                f"Sampler: {argument}: expected {describe(buffers)}, got {describe(values)}"
            )
        for key, buffer in buffers.items():
            yield from fitting(buffer, values[key], part, f"{argument}[{key!r}]")
    elif isinstance(buffers, tuple):
        if not isinstance(values, (tuple, list)) or len(values) != len(buffers):
            raise ValueError(
                f"Sampler: {argument}: expected a tuple of {len(buffers)}, got {describe(values)}"
            )
        for i, (buffer, value) in enumerate(zip(buffers, values, strict=True)):
            yield from fitting(buffer, value, part, f"{argument}[{i}]")
    elif buffers is not values and not equal(buffers, values):
        raise ValueError(
            f"Sampler: {argument}: expected {buffers!r}, which cannot change after the Sampler was"
            f" made, got {values!r}"
        )


def write(writes: Writes) -> None:
    """All of it; values on the CPU go to a GPU through pinned memory, without waiting."""
    for buffer, values in writes:
        buffer.copy_(moved(values.to(buffer.dtype), buffer.device))
