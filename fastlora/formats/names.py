"""The names that files have for a model's weights, and the weights that are meant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fastlora.formats.changes import Target


class Place(NamedTuple):
    """A module that a name means, and its share of the name's rows: fused projections have several.

    The rows [first, last) of `total` equal parts.
    """

    target: Target
    first: int = 0
    last: int = 1
    total: int = 1


def places(prefix: str, flat: str) -> tuple[Place, ...]:
    """What a kohya or LyCORIS name `<prefix>_<flat>` means: no place for a name that is unknown.

    `prefix`: "lora_unet", "lora_transformer", "lora_te", "lora_te1", ..., "lycoris". A path that the
    name does not tell stays flat (`Target.flat`), for `Index` to find in a model.
    """
    raise NotImplementedError


def dotted(flat: str) -> str | None:
    """The path whose dots were made underscores, for known architectures; else None."""
    raise NotImplementedError


def flat_name(target: Target, family: str) -> tuple[str, str]:
    """The prefix and the flat name of a module in kohya's files of "sd", "sdxl" or "flux".

    Raises FormatError for a component or a path that the family has no name for, and for a module
    that is a part of a fused one there (`fused`).
    """
    raise NotImplementedError


def fused(path: str) -> tuple[str, int, int, int] | None:
    """The fused module of the original FLUX that a module of diffusers' FLUX is a part of.

    Its flat name, and the rows [first, last) of `total` equal parts; None where none is fused.
    """
    raise NotImplementedError


def family(targets: Iterable[Target]) -> str:
    """"sd", "sdxl" or "flux", as the paths tell. Raises FormatError where they do not."""
    raise NotImplementedError


class Index:
    """The modules of a live model, by every name that a file may have for them."""

    def __init__(self, paths: Iterable[str]):
        """`paths`: the names of the model's modules."""
        raise NotImplementedError

    def find(self, target: Target) -> str | None:
        """The path of a target's module; None without one.

        Raises FormatError for a flat name that several modules have.
        """
        raise NotImplementedError
