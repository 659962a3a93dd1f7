"""Changes as the tensors and the metadata of a kohya or LyCORIS file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fastlora.formats import names
from fastlora.formats._kohya_fused import Share, dense, join
from fastlora.formats._kohya_parts import parts_of
from fastlora.formats.changes import Change, Dense, LowRank, Packed, Shift, Target
from fastlora.formats.families import family_of, keys_of
from fastlora.formats.files import FormatError
from fastlora.formats.part_shapes import dims

_CONVOLUTION = re.compile(r"(.*[._])?conv\w*")
_EITHER = re.compile(r"(.*[._])?proj_(in|out)")  # a convolution in SD 1, a Linear in SD 2


def write(changes: Mapping[Target, Change], family: str | None, network: str) -> Packed:
    """The file's tensors; `network`: the Python module that is said to have trained it.

    A target without a component, which a family's names need, is written as LyCORIS does for a
    model by itself: `lycoris_<path>`. Raises FormatError naming the target.
    """
    for target, change in changes.items():
        _refuse(target, change)
    named = [target for target in changes if target.component]
    if family is None and named:
        family = family_of(named, keys_of(changes.values())).name
    tensors: dict[str, Tensor] = {}
    written: dict[str, Change] = {}
    for name, shares in _by_name(changes, family or "").items():
        change = shares[0].change if shares[0].total == 1 else join(name, shares)
        parts = parts_of(change, _dims(shares[0].target, change, family))
        written[name] = change
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    return Packed(tensors, _metadata(written, tensors, network))


def _refuse(target: Target, change: Change) -> None:
    weight = change.weight
    if isinstance(weight, Shift):
        raise FormatError(
            f"{target}: shifts of singular values need the base's weight; extract a LoRA of them"
        )
    if change.magnitude is not None and (weight is None or isinstance(weight, Dense)):
        raise FormatError(
            f"{target}: LyCORIS has DoRA of factors only, got {change.kind}; fold the adapter "
            "into the model and extract what has changed"
        )
    if isinstance(weight, LowRank) and weight.embedding:
        raise FormatError(f"{target}: kohya's files have no embeddings; write a PEFT file instead")
    if isinstance(weight, LowRank) and weight.up.shape[1] != weight.down.shape[0]:
        raise FormatError(
            f"{target}: kohya's files have no convolutions with groups, got up "
            f"{list(weight.up.shape)} and down {list(weight.down.shape)}; write a PEFT file instead"
        )
    if weight is not None and not isinstance(weight, Dense) and weight.alpha == 0:
        raise FormatError(f"{target}: alpha 0 means rank in kohya's files; leave the module out")


def _by_name(changes: Mapping[Target, Change], family: str) -> dict[str, list[Share]]:
    """What each name of the file stands for: a whole module, or shares of a fused one."""
    modules: dict[str, list[Share]] = {}
    for target, change in changes.items():
        part = names.fused(target.path) if _of_flux(target, family) else None
        if part is not None:
            flat, first, last, total = part
            modules.setdefault(f"lora_unet_{flat}", []).append(
                Share(target, change, first, last, total)
            )
            continue
        if change.rows is not None:  # of a module that is not fused under this name
            change = replace(change, weight=dense(target, change), rows=None)
        prefix, flat = _name(target, family)
        modules.setdefault(f"{prefix}_{flat}", []).append(Share(target, change, 0, 1, 1))
    for name, shares in modules.items():
        if len(shares) > 1 and any(share.total == 1 for share in shares):
            same = " and ".join(str(share.target) for share in shares)
            raise FormatError(f"{same} have the same name in kohya's files, {name}")
    return modules


def _of_flux(target: Target, family: str) -> bool:
    return family == "flux" and target.component == "transformer" and not target.flat


def _name(target: Target, family: str) -> tuple[str, str]:
    if not target.component:
        return "lycoris", target.path.replace(".", "_")
    return names.flat_name(target, family)


def _dims(target: Target, change: Change, family: str | None) -> int:
    """How many dimensions the module's weight has, by which a magnitude is written.

    The factors of LoHa and LoKr do not always tell: then the name has to.
    """
    if change.magnitude is None:
        return 2
    assert change.weight is not None and not isinstance(change.weight, Shift)
    known = dims(change.weight)
    if known is not None:
        return known
    if family == "flux" or target.component.startswith("text_encoder"):
        return 2
    if not target.component or (family == "sd" and _EITHER.fullmatch(target.path)):
        raise FormatError(
            f"{target}: whether its weight is a matrix, by which a DoRA magnitude is written, "
            f"cannot be told from {change.kind}; write a full update, or extract a LoRA"
        )
    return 4 if _CONVOLUTION.fullmatch(target.path) else 2


def _metadata(
    written: Mapping[str, Change], tensors: Mapping[str, Tensor], network: str
) -> dict[str, str]:
    """As kohya's scripts write it: rank and alpha, or "Dynamic" where modules differ."""
    weights = [c.weight for c in written.values() if not isinstance(c.weight, Shift | Dense | None)]
    ranks = {weight.rank for weight in weights if weight.rank is not None}
    alphas = {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}
    metadata = {"format": "pt", "ss_network_module": network}
    for key, values in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
        if values:
            metadata[key] = str(values.pop()) if len(values) == 1 else "Dynamic"
    return metadata
