"""Pictures of a class, made once by the model itself: what prior preservation holds on to.

DreamBooth, Ruiz et al., 2022, arXiv 2208.12242; SVDiff uses the same, 200 pictures.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastlora.adapters import adapted_layers, adapters
from fastlora.adapters.factor_cache import fingerprint
from fastlora.formats import files
from fastlora.formats.files import FormatError
from fastlora.methods.arguments import check_rows, whole
from fastlora.samplers.arguments import integer
from fastlora.samplers.loop import sample
from fastlora.samplers.noise import noise
from fastlora.samplers.table import Table
from fastlora.training import ensure_writable

COUNT = 200


def sample_prior(
    model: nn.Module,
    table: Table,
    cond: torch.Tensor,  # [1, ...] for all pictures, or [count, ...] one for each
    uncond: torch.Tensor | None = None,  # the same, for guidance
    *,
    shape: Sequence[int],  # of one sample: a picture, or its latents
    count: int = COUNT,
    guidance_scale: float = 1.0,
    batch: int = 8,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
    description: str = "class pictures",
) -> torch.Tensor:
    """Samples [count, *shape] float32 of a class on the model's device, `batch` at a time.

    To be called before anything is trained: the model is sampled as it is. Picture i has noise i of
    `seed`, whatever the batch. `cache`, a directory (None, "": none), keeps them in a file whose
    name is a digest of everything that decides them (weights, adapters with their strengths and
    switches, table, conditions, seed, guidance): a second call reads them, another model or prompt
    has another file. A file that does not read is made again, with a warning.

    Raises ValueError for numbers out of their range, conditions that are not 1 or count, and what
    `sample` refuses; OSError for a directory that cannot be written.
    """
    count, batch = whole("sample_prior: count", count, 1), whole("sample_prior: batch", batch, 1)
    seed = whole("sample_prior: seed", seed, 0)
    sizes = [integer(size) for size in shape] if isinstance(shape, Sequence) else [None]
    if any(size is None or size < 1 for size in sizes):
        raise ValueError(f"sample_prior: shape: expected ints >= 1, got {shape!r}")
    check_rows("sample_prior: cond", cond, count)
    if uncond is not None:
        check_rows("sample_prior: uncond", uncond, count)
    device = cond.device
    path = None
    if cache is not None and cache != "":
        numbers = f"{count} {guidance_scale} {seed} {sizes}"
        key = _digest(numbers, model, table, [cond] if uncond is None else [cond, uncond])
        path = ensure_writable(cache, "sample_prior: cache") / f"prior-{key}.safetensors"
        found = _read(path, (count, *shape))
        if found is not None:
            return found.to(device)
    first = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (count,), generator=first).tolist()
    parts = []
    with tqdm(total=count, desc=description, unit="picture", disable=not progress) as bar:
        for start in range(0, count, batch):
            mine = seeds[start : start + batch]
            n = len(mine)
            its = _rows(cond, start, n)
            other = None if uncond is None else _rows(uncond, start, n)
            x = noise(mine, tuple(shape), device)
            parts.append(
                sample(
                    model, table, x, its, other, guidance_scale, seeds=mine, progress=False
                ).float()
            )
            bar.update(n)
    images = torch.cat(parts)
    if path is not None:
        files.write(path, {"images": images}, {"format": "pt"})
    return images


def _rows(cond: torch.Tensor, start: int, n: int) -> torch.Tensor:
    """The conditions of n pictures, from `start` on."""
    return cond.expand(n, *cond.shape[1:]) if len(cond) == 1 else cond[start : start + n]


def _digest(numbers: str, model: nn.Module, table: Table, conds: list[torch.Tensor]) -> str:
    """The hash of all that decides the pictures. What adapters do is not in the state dict alone:
    strengths, switches, alphas, and folded weights, which may be of other parameters."""
    state = dict(sorted(model.state_dict().items()))
    words: list[Any] = [numbers, table.prediction, table.init_noise_sigma, table.input_scale]
    words += [table.threshold, *state]
    tensors = [table.coefficients, table.timesteps, *conds, *state.values()]
    for name, info in adapters(model).items():
        words += [name, info.enabled]
        tensors.append(torch.as_tensor(info.scale, dtype=torch.float64))
    for path, layer in adapted_layers(model).items():
        words += [(path, name, slot.kind, slot.ratio) for name, slot in layer.fastlora.items()]
        if layer._state.merged:
            words.append((path, "folded"))
            tensors.append(layer.folded())
    return fingerprint(repr(words), tensors)


def _read(path: Path, shape: tuple[int, ...]) -> torch.Tensor | None:
    if not path.exists():
        return None
    try:
        images = files.read(path)[0].get("images")
    except (FormatError, OSError) as error:
        warnings.warn(f"sample_prior: made again: {error}", stacklevel=3)
        return None
    if images is None or tuple(images.shape) != shape:
        got = "none" if images is None else list(images.shape)
        warnings.warn(
            f"sample_prior: made again: {path}: expected images {list(shape)}, got {got}",
            stacklevel=3,
        )
        return None
    return images
