"""What `load_lora_weights` is given, as tensors and what their header says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, is_tensor

from fastlora.formats import detect, files
from fastlora.formats.changes import AdapterFile
from fastlora.formats.files import FormatError

HUB = {  # what diffusers asks the Hub with, and its defaults
    "weight_name": None,
    "use_safetensors": None,
    "local_files_only": None,
    "cache_dir": None,
    "force_download": False,
    "proxies": None,
    "token": None,
    "revision": None,
    "subfolder": None,
}
AGENT = {"file_type": "attn_procs_weights", "framework": "pytorch"}


class Source(NamedTuple):
    name: str
    tensors: dict[str, Tensor]
    header: dict[str, str]
    config: dict[str, Any] | None  # PEFT's adapter_config.json

    def unpack(self) -> AdapterFile:
        """Raises FormatError for what no format explains."""
        return detect.unpack(self.tensors, self.header, self.config, self.name)


def read(given: Any, kwargs: Mapping[str, Any]) -> Source:
    """A dict of tensors as it is, a safetensors file of this machine, or what diffusers' own code
    gets for these arguments: from the Hub, or of a pickle. Raises FormatError for a bad one."""
    if isinstance(given, Mapping):
        others = [f"{key!r}: {type(t).__name__}" for key, t in given.items() if not is_tensor(t)]
        if others:
            raise FormatError(f"the state dict: expected tensors, got {', '.join(others[:3])}")
        return Source("the state dict", dict(given), {}, None)
    local = _local(given, kwargs)
    if local is None:
        return _fetched(given, kwargs)
    tensors, header = files.read(local)
    return Source(str(local), tensors, header, detect.config_beside(local, tensors, header))


def _local(given: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Path | None:
    """The safetensors file of this machine that is meant; None for anything else."""
    path = Path(given)
    if path.is_dir():
        path = path / (kwargs.get("subfolder") or "") / (kwargs.get("weight_name") or "")
    if not path.exists() or kwargs.get("use_safetensors") is False:
        return None
    file = detect.only_file(path) if path.is_dir() else path
    return None if file.suffix in detect.PICKLES else file


def _fetched(given: Any, kwargs: Mapping[str, Any]) -> Source:
    from diffusers.loaders.lora_base import _fetch_state_dict

    options = HUB | {name: kwargs[name] for name in HUB if name in kwargs}
    allow_pickle = options["use_safetensors"] is None
    tensors, _, header = _fetch_state_dict(
        given,
        **options | {"use_safetensors": allow_pickle or options["use_safetensors"]},
        user_agent=AGENT,
        allow_pickle=allow_pickle,
        return_file_metadata=True,
    )
    header = header or {}
    return Source(str(given), tensors, header, _config_of(given, options, tensors, header))


def _config_of(
    given: Any,
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
) -> dict[str, Any] | None:
    """adapter_config.json beside a file of PEFT's, without which its alphas are lost."""
    from diffusers.utils.hub_utils import _get_model_file

    try:
        if detect.detect(tensors, header) != "peft":
            return None
    except FormatError:
        return None
    where = {n: v for n, v in options.items() if n not in ("weight_name", "use_safetensors")}
    folder = os.path.dirname(given) if os.path.isfile(given) else given
    try:
        path = _get_model_file(folder, weights_name=detect.CONFIG, user_agent=AGENT, **where)
    except OSError:  # there is none
        return None
    return files.read_json(Path(path))
