"""The names that files have for a model's weights, and the weights that are meant."""

from __future__ import annotations

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
