"""A model's weights on disk: one safetensors file, shards with an index, or diffusers' folders."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from fastlora.formats import checkpoint_names
from fastlora.formats.changes import Target
from fastlora.formats.diffusers import COMPONENTS
from fastlora.formats.files import FormatError, Info, SafetensorsFile, read_json
from fastlora.formats.names import Index

PIPELINE = "model_index.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# How transformers and diffusers name weights in a folder; in between may be a variant.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


class Weights:
    """The tensors of one model in one file or several, open; `modules` says what they are.

    Raises FormatError for a key that two files have, and the errors of `SafetensorsFile`.
    """

    def __init__(self, paths: Iterable[Path], component: str = "") -> None:
        self._files: dict[str, SafetensorsFile] = {}
        self._last: tuple[str, Tensor] | None = None
        self.paths = list(paths)
        with ExitStack() as stack:
            for path in self.paths:
                file = stack.enter_context(SafetensorsFile(path))
                for key in file.keys:
                    if key in self._files:
                        raise FormatError(f"{path}: {key} is in {self._files[key].path} as well")
                    self._files[key] = file
            self._stack = stack.pop_all()
        self.modules = checkpoint_names.modules_of(self._files, component)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def keys(self) -> list[str]:
        return list(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def file(self, key: str) -> SafetensorsFile:
        return self._files[key]

    def info(self, key: str) -> Info:
        return self._files[key].info(key)

    def tensor(self, key: str) -> Tensor:
        return self._files[key].tensor(key)

    @functools.cached_property
    def has_conv1d(self) -> bool:
        """Whether linear layers are stored `[in, out]`, as Conv1D of transformers does: a bias is
        as long as the last dimension. Asked of the whole model, as square ones do not tell."""
        for target, own in self.modules.items():
            if {"weight", "bias"} <= own.keys():
                shape, bias = (self.shape(target, name) for name in ("weight", "bias"))
                if len(shape) == 2 and bias == shape[1:] != shape[:1]:
                    return True
        return False

    def parameter(self, target: Target, name: str) -> Tensor:
        """A module's parameter. The last tensor is kept: it may have several modules' rows."""
        where = self.modules[target][name]
        if self._last is None or self._last[0] != where.key:
            self._last = None  # not two at a time
            self._last = where.key, self.tensor(where.key)
        return where.of(self._last[1])

    def shape(self, target: Target, name: str) -> tuple[int, ...]:
        where = self.modules[target][name]
        return where.shape(self.info(where.key).shape)


class Checkpoint:
    """The weights at a path, by component: all sets of files that a component has.

    `path`: a safetensors file; an index of shards; the folder of a component, or of a pipeline
    (with model_index.json), of which the components are read that adapters are for. A component may
    be there in several variants ("fp16", "non_ema"): each is a `Weights` with the same modules.

    Raises FileNotFoundError, and FormatError for a folder without safetensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        self.is_pipeline = (self.path / PIPELINE).is_file()
        with ExitStack() as stack:
            self.parts: dict[str, dict[str, Weights]] = {
                component: {
                    name: stack.enter_context(Weights(paths, component))
                    for name, paths in found.items()
                }
                for component, found in self._sets().items()
            }
            self._stack = stack.pop_all()
        if not self.parts:
            raise FormatError(
                f"{path}: expected safetensors files of {sorted(COMPONENTS)}, got none"
            )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def weights(self) -> list[Weights]:
        return [weights for variants in self.parts.values() for weights in variants.values()]

    def main(self) -> list[Weights]:
        """One set of each component. Raises FormatError where it is not plain which is meant."""
        return [_main(self.path / component, found) for component, found in self.parts.items()]

    def indices(self) -> dict[str, Index]:
        """The modules of all variants, by component as their targets have it."""
        paths: dict[str, set[str]] = {}
        for weights in self.weights():
            for target in weights.modules:
                paths.setdefault(target.component, set()).add(target.path)
        return {component: Index(found) for component, found in paths.items()}

    def _sets(self) -> dict[str, dict[str, list[Path]]]:
        if not self.path.is_dir():
            shards = self.path.suffix == ".json"
            return {"": {self.path.name: shards_of(self.path) if shards else [self.path]}}
        if not self.is_pipeline:
            return {"": sets_of(self.path)}
        content = read_json(self.path / PIPELINE)
        folders = [self.path / name for name in content if name in COMPONENTS]
        return {f.name: sets_of(f) for f in folders if f.is_dir() and any(_weight_files(f))}


def sets_of(folder: Path) -> dict[str, list[Path]]:
    """The sets of weights in a folder, by the name of their file or index.

    Raises FormatError where there are pickles only, or files that are not named as weights are.
    """
    found = {
        path.name: shards_of(path) for path in sorted(folder.glob("*.safetensors.index*.json"))
    }
    shards = {path.name for paths in found.values() for path in paths}
    single = [p for p in sorted(folder.glob("*.safetensors")) if p.name not in shards]
    named = [p for p in single if p.name.partition(".")[0] in STEMS]
    if not named and not found:
        if len(single) > 1:
            names = ", ".join(p.name for p in single)
            raise FormatError(f"{folder}: expected one of {STEMS}, got {names}; name the file")
        named = single
    found |= {path.name: [path] for path in named}
    if not found:
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
        hint = "; save the model again with safe_serialization=True" if pickles else ""
        raise FormatError(f"{folder}: expected safetensors files, got {pickles or 'none'}{hint}")
    return found


def shards_of(index: Path) -> list[Path]:
    """The files of a sharded model. Raises FormatError for an index that is none."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise FormatError(f'{index}: expected a "weight_map" of keys to files')
    files = sorted(set(shards.values()))
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise FormatError(f"{index}: expected files beside it, got {outside[0]!r}")
    return [index.parent / name for name in files]


def _weight_files(folder: Path) -> Iterable[Path]:
    return (p for p in folder.iterdir() if p.suffix in (".safetensors", *PICKLES))


def _main(folder: Path, variants: Mapping[str, Weights]) -> Weights:
    plain = [f"{stem}.safetensors{end}" for stem in STEMS for end in ("", ".index.json")]
    chosen = [name for name in plain if name in variants] or list(variants)
    if len(chosen) > 1:
        raise FormatError(f"{folder}: expected one set of weights, got {', '.join(chosen)}")
    return variants[chosen[0]]
