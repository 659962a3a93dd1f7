"""PLACEHOLDER by the lead so that imports work; helper-3 replaces this file."""
from typing import Any
import torch
from torch import Tensor
from fastlora.ops._define import define_op


def fold(weights: list[Tensor], downs: list[Tensor], ups: list[Tensor], gates: list[Tensor], outs: list[Tensor]) -> None:
    with torch.no_grad():
        for w, d, u, g, o in zip(weights, downs, ups, gates, outs, strict=True):
            o.copy_(w + (u * g).to(w.dtype) @ d.to(w.dtype))


def _fake(*a: Any) -> None: ...


def _plan(*a: Any) -> Any:
    return fold_ref


fold_ref = fold
fold = define_op(fold, fake=_fake, plan=_plan, mutates=("outs",))
