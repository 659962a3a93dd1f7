"""Models that adapter files are for, without what else a pipeline has."""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.commands import CommandError


def load_models(
    name: str, parts: Collection[str], device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The components `parts` of a pipeline's folder; the model "" of a component's, or `digits`.

    A part "" is a file that does not name its model: the UNet or transformer. Raises CommandError
    for a folder that is none of these.
    """
    if name == "digits":
        from fastlora.models import digits

        return {"": digits.load(device=device).to(dtype).eval()}
    folder = Path(name)
    if (folder / "model_index.json").is_file():
        index = _read(folder / "model_index.json")
        wanted = {p or next((n for n in ("unet", "transformer") if n in index), p) for p in parts}
        names = {n: index[n] for n in sorted(wanted) if isinstance(index.get(n), list)}
        found = {
            n: _load(folder / n, library, kind, dtype)
            for n, (library, kind) in names.items()
            if (folder / n).is_dir()
        }
        if not found:
            raise CommandError(
                f"--model: {folder} has none of the parts that the file is for: "
                + ", ".join(sorted(wanted))
            )
    elif (folder / "config.json").is_file():
        config = _read(folder / "config.json")
        kinds = config.get("architectures") or ["AutoModel"]
        library, kind = "transformers", kinds[0]
        if "_class_name" in config:
            library, kind = "diffusers", config["_class_name"]
        found = {"": _load(folder, library, kind, dtype)}
    else:
        raise CommandError(
            "--model: expected digits or a folder with model_index.json or config.json, as"
            f" diffusers saves it, got {name}"
        )
    return {part: model.to(device).eval() for part, model in found.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise CommandError(f"--model: {path}: expected a JSON object, got {error}") from None


def _load(folder: Path, library: Any, kind: Any, dtype: torch.dtype) -> nn.Module:
    if library not in ("diffusers", "transformers"):  # a pipeline's own code, which is not run
        raise CommandError(f"--model: {folder}: expected one of diffusers, got {library}.{kind}")
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise CommandError(f'{library} is not installed; try: pip install "{library}"') from error
    if not hasattr(module, str(kind)):
        raise CommandError(f"--model: {folder}: this {library} has no {kind}")
    try:
        with without_bars(library):
            return getattr(module, kind).from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise CommandError(f"--model: {folder}: {' '.join(str(error).split())}") from error


@contextmanager
def without_bars(library: str) -> Iterator[None]:
    """Without the progress bars that diffusers and transformers put onto stderr."""
    logging = importlib.import_module(f"{library}.utils.logging")
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
