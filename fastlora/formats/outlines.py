"""An adapter file without its values, and the norms of its changes, read module by module."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.formats import detect
from fastlora.formats.changes import AdapterFile, Change, Target
from fastlora.formats.files import SafetensorsFile
from fastlora.formats.measures import norm


class Outline(NamedTuple):
    path: Path  # of the safetensors file, in a folder or not
    tensors: dict[str, Tensor]  # by key, on the meta device but for scalars
    file: AdapterFile  # whose changes have these tensors, views of them, or what is made of them
    config: dict[str, Any] | None = None  # PEFT's


def outline(path: str | os.PathLike[str]) -> Outline:
    """What `detect.read` gives, with its errors, from the file's header alone."""
    found = Path(path)
    found = detect.only_file(found) if found.is_dir() else found
    with SafetensorsFile(found) as file:
        tensors, metadata = file.outline(), file.metadata
    config = detect.config_beside(found, tensors, metadata)
    return Outline(found, tensors, detect.unpack(tensors, metadata, config, str(found)), config)


def norms(found: Outline, threads: int | None = None) -> Iterator[tuple[Target, float]]:
    """`measures.norm` of every change, as they come; a module's tensors are read when it is
    its turn and forgotten after it.

    Raises FormatError for NaN and infinite values. `threads`: as many as PyTorch has.
    """
    keys = {id(tensor): key for key, tensor in found.tensors.items()}
    reader = _Reader(found.path)
    before = torch.get_num_threads()

    def measured(item: tuple[Target, Change]) -> tuple[Target, float]:
        return item[0], norm(_filled(found, item[0], keys, reader))

    # One thread of PyTorch in each of ours: products of thin matrices are too small to share.
    with ThreadPoolExecutor(
        threads or before, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            yield from pool.map(measured, found.file.changes.items())
        finally:
            pool.shutdown(cancel_futures=True)
            reader.close()
            torch.set_num_threads(before)  # a part of it is set for the whole process


class _Reader:
    """Tensors of a file for several threads, each with the file open for itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._own = threading.local()
        self._open: list[SafetensorsFile] = []

    def tensor(self, key: str) -> Tensor:
        if not hasattr(self._own, "file"):
            self._own.file = SafetensorsFile(self._path)
            self._open.append(self._own.file)
        return self._own.file.tensor(key)

    def close(self) -> None:
        for file in self._open:
            file.__exit__()


def _filled(found: Outline, target: Target, keys: Mapping[int, str], reader: _Reader) -> Change:
    """The change with its weight's values, views as they are in the outline."""
    change = found.file.changes[target]
    if change.weight is None:
        return change
    parts = {}
    for name, part in change.weight.tensors().items():
        if part.is_meta:
            whole = part if part._base is None else part._base
            if id(whole) not in keys:  # made of a tensor: a factor that PEFT's alpha is in
                own = {key: reader.tensor(key) for key in change.keys}
                metadata = found.file.metadata
                return detect.unpack(own, metadata, found.config, str(found.path)).changes[target]
            values = reader.tensor(keys[id(whole)])
            parts[name] = values.as_strided(part.shape, part.stride(), part.storage_offset())
    return dataclasses.replace(change, weight=dataclasses.replace(change.weight, **parts))


def block(target: Target) -> str:
    """What a norm is summed over: "down_blocks.0", "mid_block", "text_model.encoder.layers.3"."""
    mark = "_" if target.flat else "."
    parts = target.path.split(mark)
    for i, part in enumerate(parts):
        if part.endswith("_block"):
            return mark.join(parts[: i + 1])
        if part.isdecimal():
            return mark.join(parts[: i + 1])
    return parts[0] if mark == "." else target.path


def by_block(norms: Iterable[tuple[Target, float]]) -> dict[tuple[str, str], list[float]]:
    """The norms of each component's blocks, in the order of their numbers."""
    found: dict[tuple[str, str], list[float]] = {}
    for target, value in norms:
        found.setdefault((target.component, block(target)), []).append(value)
    return dict(sorted(found.items(), key=lambda item: [_natural(name) for name in item[0]]))


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Numbers in a name count as numbers: block 10 comes after block 9."""
    parts = name.replace("_", ".").split(".")
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]
