"""Attention maps of a model as it runs, without a change to its code.

Prompt-to-Prompt (Hertz et al., 2022, arXiv 2208.01626) made them a tool; SVDiff trains on them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastlora.adapters.selecting import Where, matcher

# Cross-attention by the name that diffusers, the first Stable Diffusion and our UNet give it.
CROSS_ATTENTION = r"(.*\.)?attn2"
# What projects to queries and keys, and what norms them afterwards where there is such a thing.
PROJECTIONS = (("to_q", "to_k"), ("q_proj", "k_proj"))
NORMS = (("norm_q", "norm_k"), ("q_norm", "k_norm"))


@contextmanager
def capture_attention(
    model: nn.Module, where: Where = CROSS_ATTENTION
) -> Iterator[dict[str, torch.Tensor]]:
    """`softmax(Q K^T / sqrt(d))` [B, heads, N, L] in float32 of each attention `where` names, by
    path, as its latest call computed it: N queries, L keys, d the size of a head.

    An attention is any module with the children to_q and to_k (or q_proj and k_proj) and an int
    `heads` (or `num_heads`): diffusers' `Attention` under every processor that calls these, the
    package's UNet, and others built alike. What the projections gave (adapters included), and the
    norms of queries and keys where there are any, is kept by forward hooks for the length of the
    block, and the map is computed from it once more: a fused attention has none to give. It is
    differentiable, and a mask given as `attention_mask` or `mask` is in it (bool: True is seen;
    else added).

    `where` as in `inject`; the default is every `attn2`. Raises ValueError where nothing matches or
    what matches is no such module; RuntimeError, from the call, for an attention that did not call
    its projections (fused ones).
    """
    matches = matcher(where, "capture_attention")
    found = {p: m for p, m in model.named_modules() if matches(p, m) and _children(m) is not None}
    if not found:
        known = [p for p, m in model.named_modules() if _children(m) is not None][:5]
        raise ValueError(
            f"capture_attention: where: expected to match a module with to_q and to_k, got"
            f" {where!r}, which matches none; this model has for example {known}"
        )
    maps: dict[str, torch.Tensor] = {}
    handles: list[Any] = []
    try:
        for path, module in found.items():
            handles += _Watch(path, module, maps).handles
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def _children(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    for names in PROJECTIONS:
        pair = [getattr(module, name, None) for name in names]
        if isinstance(pair[0], nn.Module) and isinstance(pair[1], nn.Module):
            return pair[0], pair[1]
    return None


class _Watch:
    """The hooks on one attention, and what they have kept of the call that is running."""

    def __init__(self, path: str, module: nn.Module, maps: dict[str, torch.Tensor]) -> None:
        self.path, self.maps = path, maps
        heads = getattr(module, "heads", getattr(module, "num_heads", None))
        if not isinstance(heads, int):
            raise ValueError(
                f"capture_attention: {path}: expected an int `heads` or `num_heads`,"
                f" got {type(module).__name__} with {heads!r}"
            )
        self.heads = heads
        self.signature = inspect.signature(module.forward)
        self.kept: dict[str, torch.Tensor] = {}
        children = _children(module)
        assert children is not None
        self.handles: list[Any] = [
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            module.register_forward_hook(self._end, with_kwargs=True),
        ]
        for names in NORMS:  # after the projections: what is kept last is what counts
            norms = [getattr(module, name, None) for name in names]
            for which, norm in zip("qk", norms, strict=True):
                if isinstance(norm, nn.Module):
                    self.handles.append(norm.register_forward_hook(self._keep(which)))
        for which, projection in zip("qk", children, strict=True):
            self.handles.append(projection.register_forward_hook(self._keep(which)))

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.kept.clear()

    def _keep(self, which: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.kept[which] = output

        return hook

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if len(self.kept) != 2:
            raise RuntimeError(
                f"capture_attention: {self.path}: expected it to call its projections of queries"
                " and keys, got a call without (fused projections? unfuse them)"
            )
        q, k = self._split(self.kept.pop("q")), self._split(self.kept.pop("k"))
        scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        given = self.signature.bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask", given.get("mask"))
        if mask is not None:
            scores = _masked(scores, mask)
        self.maps[self.path] = scores.softmax(-1)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, heads d] as [B, heads, N, d], which norms of single heads may have made of it."""
        if x.dim() == 4:
            return x if x.shape[1] == self.heads else x.transpose(1, 2)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A mask [B, L], [B, 1 or N, L] or [B, 1 or heads, 1 or N, L]."""
    if mask.dim() < 4:
        mask = mask[:, None]
    if mask.dim() < 4:
        mask = mask[:, None]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.float()


def grid_shape(positions: int, height: int, width: int) -> tuple[int, int]:
    """(h, w) with `h w = positions` of the feature map that a picture of height x width became: of
    all factors those whose ratio is nearest. Raises ValueError if it is more than twice off."""
    pairs = [(h, positions // h) for h in range(1, positions + 1) if positions % h == 0]

    def off(pair: Sequence[int]) -> float:
        ratio = pair[0] * width / (pair[1] * height)
        return max(ratio, 1 / ratio)

    best = min(pairs, key=off)
    if off(best) > 2:
        raise ValueError(
            f"grid_shape: positions: expected those of a {height}x{width} picture's features,"
            f" got {positions}"
        )
    return best


def token_positions(ids: torch.Tensor, phrase: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """bool [L]: where the tokens of a phrase are in those of a prompt.

    `ids`, `phrase`, `empty`: int64 [L] each, a tokenizer's answers to the prompt, to the phrase
    alone, and to ""; from the last is known which ids are start, end and padding. Raises ValueError
    where the phrase is empty or not in the prompt, as one piece, exactly once.
    """
    special = set(empty.tolist())
    wanted = [i for i in phrase.tolist() if i not in special]
    row = ids.tolist()
    starts = [
        i
        for i in range(len(row) - len(wanted) + 1)
        if wanted and row[i : i + len(wanted)] == wanted
    ]
    if len(starts) != 1:
        raise ValueError(
            "token_positions: phrase: expected its tokens once in the prompt,"
            f" got {wanted} in {row}, {len(starts)} times"
        )
    found = torch.zeros(len(row), dtype=torch.bool)
    found[starts[0] : starts[0] + len(wanted)] = True
    return found
