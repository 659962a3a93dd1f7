"""What `--model` and `--device` name, and models without what else a pipeline has."""

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

# What tells diffusers' folders: of a whole pipeline, of one model.
PIPELINE, COMPONENT = "model_index.json", "config.json"


def model_folder(name: str, *kinds: str) -> Path | None:
    """The folder that `--model` names, which has one of the files `kinds`; None for `digits`.

    Raises CommandError for anything else.
    """
    if name == "digits":
        return None
    folder = Path(name)
    if not any((folder / kind).is_file() for kind in kinds):
        raise CommandError(
            f"--model: expected digits or a folder with {' or '.join(kinds)}, as diffusers saves"
            f" it, got {name}"
        )
    return folder


def chosen_device(name: str | None) -> torch.device:
    """What `--device` names; without it the GPU, if there is one that fastlora was built for.

    Raises AdapterError for a device that is not there.
    """
    from fastlora.adapters.decomposing import usable_device
    from fastlora.ops._define import kernels

    if name:
        return usable_device(name, "--device")
    usable = torch.cuda.is_available() and bool(kernels.build_info()["cuda"])
    return torch.device("cuda" if usable else "cpu")


def load_models(
    name: str, parts: Collection[str], device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """The components `parts` of a pipeline's folder; the model "" of a component's, or `digits`.

    A part "" is a file that does not name its model: the UNet or transformer. Raises CommandError
    for a folder that is none of these.
    """
    folder = model_folder(name, PIPELINE, COMPONENT)
    if folder is None:
        from fastlora.models import digits

        return {"": digits.load(device=device).to(dtype).eval()}
    if (folder / PIPELINE).is_file():
        found = _parts(folder, parts, dtype)
    else:
        config = _read(folder / COMPONENT)
        kinds = config.get("architectures") or ["AutoModel"]
        library, kind = "transformers", kinds[0]
        if "_class_name" in config:
            library, kind = "diffusers", config["_class_name"]
        found = {"": pretrained(folder, library, kind, dtype, use_safetensors=True)}
    return {part: model.to(device).eval() for part, model in found.items()}


def _parts(folder: Path, parts: Collection[str], dtype: torch.dtype) -> dict[str, nn.Module]:
    index = _read(folder / PIPELINE)
    wanted = {p or next((n for n in ("unet", "transformer") if n in index), p) for p in parts}
    names = {n: index[n] for n in sorted(wanted) if isinstance(index.get(n), list)}
    found = {
        n: pretrained(folder / n, library, kind, dtype, use_safetensors=True)
        for n, (library, kind) in names.items()
        if (folder / n).is_dir()
    }
    if not found:
        raise CommandError(
            f"--model: {folder} has none of the parts that the file is for: "
            + ", ".join(sorted(wanted))
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise CommandError(f"--model: {path}: expected a JSON object, got {error}") from None


def pretrained(folder: Path, library: Any, kind: Any, dtype: torch.dtype, **options: Any) -> Any:
    """`library.kind.from_pretrained(folder)`, without its progress bars and from the disk alone.

    Raises CommandError where that fails.
    """
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
                folder, torch_dtype=dtype, local_files_only=True, **options
            )
    # ImportError: of what diffusers needs for it, transformers as a rule.
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
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
