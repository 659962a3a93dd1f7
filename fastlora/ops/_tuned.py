"""What `fastlora.tune` has measured: which route of `lora_linear` is fastest for which call.

A table of device -> call -> route, in this process and in a small JSON file that is read when the
first plan is made: `FASTLORA_TUNE_FILE` (empty: no file), or fastlora/tune.json in the user's cache
folder. Nothing that is wrong with the file ever fails a call.
"""

import json
import os
import platform
import tempfile
import threading
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.ops._define import kernels
from fastlora.ops._device import device_type

# Part of a device's name: entries made for another set of routes, or other kernels, do not count.
ROUTES_VERSION = 1
FORMAT = "fastlora routes"

Table = dict[str, dict[str, str]]  # device -> call -> route

_lock = threading.Lock()
_table: Table | None = None  # None: nobody has asked yet


def lookup(x: Tensor, *rest: Any) -> str | None:
    """The route that was measured to be fastest for these arguments; None: nobody has measured."""
    table = _table if _table is not None else _first_read()
    if not table:  # the usual case costs nothing
        return None
    device = device_key(x)
    return None if device is None else table.get(device, {}).get(call_key(x, *rest))


def remember(entries: Table) -> str:
    """Adds to this process' table and to the file; returns why the file did not, or ""."""
    table = _table if _table is not None else _first_read()
    with _lock:
        for device, calls in entries.items():
            table.setdefault(device, {}).update(calls)
    path = file()
    return "FASTLORA_TUNE_FILE is empty" if path is None else _write(path, entries)


def forget() -> None:
    """Lets the next lookup read the file again."""
    global _table
    with _lock:
        _table = None


# --- keys -----------------------------------------------------------------------------------------


def device_key(x: Tensor) -> str | None:
    """What the times depend on; None for an emulated GPU and for devices without routes."""
    if x.is_cuda:
        p = torch.cuda.get_device_properties(x.device)
        device = f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors"
    elif x.device.type == "cpu" and device_type(x) == "cpu":
        isa = kernels.build_info()["cpu_isa"]
        device = f"{cpu_name()}, {torch.get_num_threads()} threads, {isa}"
    else:
        return None
    return f"{device}, routes {ROUTES_VERSION}"


@lru_cache
def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def call_key(
    x: Tensor, weight: Tensor, bias: Any, down: Tensor, up: Tensor, gate: Tensor, row_scale: Any
) -> str:
    """Shapes, dtypes and layouts, readable: "2x1280x320, rank 16, float32, bias"."""
    (out, features), dtype = weight.shape, x.dtype
    tokens = x.numel() // max(features, 1)
    words = [f"{tokens}x{features}x{out}", f"rank {up.shape[1]}", _name(dtype)]
    words += ["bias"] * (bias is not None) + ["gate rows"] * (gate.dim() == 2)
    words += ["row_scale"] * (row_scale is not None)
    for name, t in (("x", x), ("weight", weight), ("down", down), ("up", up)):
        words += [f"{name} {_name(t.dtype)}"] * (t.dtype != dtype)
        words += [f"{name} strided"] * (not t.is_contiguous())
    return ", ".join(words)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the file -------------------------------------------------------------------------------------


def file() -> Path | None:
    given = os.environ.get("FASTLORA_TUNE_FILE")
    if given is not None:
        return Path(given) if given else None
    return user_cache() / "tune.json"


def user_cache() -> Path:
    """Our folder in the user's cache folder (XDG)."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "fastlora"


def _first_read() -> Table:
    global _table
    with _lock:
        if _table is None:
            path = file()
            try:
                _table = {} if path is None else _read(path)
            except (OSError, ValueError, RecursionError) as error:
                _table = {}
                _warn(f"fastlora: {path} is ignored: {error}")
        return _table


def _read(path: Path) -> Table:
    """The file's table, {} without a file. ValueError if it is not one of ours."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    content = json.loads(text)
    devices = content.get("devices") if isinstance(content, dict) else None
    if not isinstance(devices, dict) or content.get("format") != FORMAT:
        raise ValueError("not a table of fastlora.tune")
    return {
        device: {c: r for c, r in calls.items() if isinstance(r, str)}
        for device, calls in devices.items()
        if isinstance(calls, dict)
    }


def _write(path: Path, entries: Table) -> str:
    """Merges into what is there, at once or not at all; returns why not."""
    temporary = None
    try:
        devices = _read(path)  # others may have written since
        for device, calls in entries.items():
            devices.setdefault(device, {}).update(calls)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump({"format": FORMAT, "devices": devices}, stream, indent=1, sort_keys=True)
            stream.write("\n")
        os.replace(temporary, path)
    except (OSError, ValueError, RecursionError) as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        return f"{path}: {error}"
    return ""


def _warn(message: str) -> None:
    # Also where warnings are errors: this may be in the middle of a forward pass.
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
