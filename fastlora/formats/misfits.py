"""Whether a change fits the module of a checkpoint that it is for, told from shapes alone."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastlora.formats.changes import Change, Shift, Target
from fastlora.formats.checkpoints import Weights
from fastlora.formats.files import FormatError
from fastlora.formats.rewriting import Edit, folded, folded_bias, touched


def misfit(weights: Weights, target: Target, change: Change) -> str | None:
    """Why the change cannot be made in the module, with its name; None: it can.

    Computes it on the meta device, so that what is said is what the computation itself would say.
    """
    if _is_conv1d(weights, target) and _has_sides(change):
        return (
            f"{target}: the weight is stored [in, out] (Conv1D of transformers) and the update is "
            "[out, in]; load the adapter into the model, fold(model, permanent=True), and save that"
        )
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


def _is_conv1d(weights: Weights, target: Target) -> bool:
    own = weights.modules[target]
    linear = {"weight", "bias"} <= own.keys() and len(weights.shape(target, "weight")) == 2
    return linear and weights.has_conv1d


def _has_sides(change: Change) -> bool:
    """Whether it means something else of the weight transposed: not shifts of singular values."""
    return change.magnitude is not None or not isinstance(change.weight, Shift | None)


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
