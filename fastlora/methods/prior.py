"""Pictures of a class, made once by the model itself: what prior preservation holds on to.

DreamBooth, Ruiz et al., 2022, arXiv 2208.12242; SVDiff uses the same, 200 pictures.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fastlora.formats import files
from fastlora.formats.files import FormatError
from fastlora.samplers.loop import sample
from fastlora.samplers.noise import noise
from fastlora.samplers.table import Table

COUNT = 200


def sample_prior(
    model: nn.Module,
    table: Table,
    cond: torch.Tensor,  # [1, ...] for all pictures, or [count, ...] one for each
    uncond: torch.Tensor | None = None,  # [1, ...], for guidance
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
    `seed`, whatever the batch. `cache`, a directory, keeps them in a file whose name is a digest of
    everything that decides them (weights, buffers, table, conditions, seed, guidance): a second
    call reads them, another model or prompt has another file. A file that does not read is made
    again, with a warning.

    Raises ValueError for numbers below 1, conditions that are not 1 or count, and what `sample`
    refuses; OSError for a directory that cannot be written.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"sample_prior: count, batch: expected >= 1, got {count} and {batch}")
    if len(cond) not in (1, count):
        raise ValueError(
            f"sample_prior: cond: expected 1 or {count} conditions, got {list(cond.shape)}"
        )
    device = cond.device
    path = None
    if cache is not None:
        from fastlora.training import ensure_writable

        numbers = (
            f"{table.prediction} {table.init_noise_sigma} {table.input_scale} {table.threshold}"
            f" {count} {guidance_scale} {seed} {tuple(shape)}"
        )
        tensors = [table.coefficients, table.timesteps, cond]
        tensors += [] if uncond is None else [uncond]
        tensors += [value for _, value in sorted(model.state_dict().items())]
        path = ensure_writable(cache) / f"prior-{digest(numbers, tensors)}.safetensors"
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
            its = cond[start : start + n] if len(cond) == count else cond.expand(n, *cond.shape[1:])
            other = None if uncond is None else uncond.expand(n, *uncond.shape[1:])
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


def digest(words: str, tensors: Sequence[torch.Tensor]) -> str:
    """32 hex digits of a text and of tensors: their dtypes, shapes and bytes."""
    found = hashlib.sha256(words.encode())
    for tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        found.update(f"{value.dtype} {list(value.shape)}".encode())
        found.update(value.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


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
