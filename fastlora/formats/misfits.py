"""Whether a change fits the module of a checkpoint that it is for, told from shapes alone."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastlora.formats.changes import Change, Target
from fastlora.formats.checkpoints import Weights
from fastlora.formats.files import FormatError
from fastlora.formats.rewriting import Edit, folded, folded_bias, touched


def misfit(weights: Weights, target: Target, change: Change) -> str | None:
    """Why the change cannot be made in the module, with its name; None: it can.

    Computes it on the meta device, so that what is said is what the computation itself would say.
    """
    edits = [Edit(_without_values(change), 1.0)]
    try:
        for places in touched(weights, {target: edits}).values():
            for _, name, place in places:
                shape = place.shape(weights.info(place.key).shape)
                before = torch.empty(shape, device="meta")
                folded(before, edits) if name == "weight" else folded_bias(before, edits)
    except FormatError as error:
        start = f"{target}: "
        return f"{start}{str(error).removeprefix(start)}"
    return None


def _without_values(change: Change) -> Change:
    """The change on the meta device."""

    def meta(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to("meta")

    weight = change.weight
    if weight is not None:
        parts = {name: tensor.to("meta") for name, tensor in weight.tensors().items()}
        weight = dataclasses.replace(weight, **parts)
    return dataclasses.replace(
        change, weight=weight, bias=meta(change.bias), magnitude=meta(change.magnitude)
    )
