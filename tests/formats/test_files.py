"""Reading and writing safetensors files: what is wrong is said, and nothing is lost on the way."""

from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlora.formats import files
from fastlora.formats.files import FormatError


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 4, generator=generator)
    return {
        "a.down": drawn,
        "a.up": drawn.bfloat16(),
        "b.up": drawn.half(),
        "c": drawn.double(),
        "d": drawn[:, ::2].t(),  # strided
        "e": torch.empty(0, 3),
        "f": torch.tensor(-0.0),
        "ü ñ/☃.down": torch.arange(4),
    }


@pytest.mark.parametrize(
    "name", ["a.safetensors", "with spaces & ünïcödé ☃.safetensors", "no_suffix"]
)
@pytest.mark.parametrize("kind", [str, Path])
def test_round_trip_is_bit_exact(tmp_path: Path, name: str, kind: Any) -> None:
    folder = tmp_path / "a folder für files"
    folder.mkdir()
    path, metadata = kind(folder / name), {"format": "x", "ünï": "☃ 'quotes' \"\n"}
    files.write(path, tensors(), metadata)
    got, meta = files.read(path)
    assert meta == metadata and got.keys() == tensors().keys()
    for key, value in tensors().items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key
        assert torch.signbit(got["f"])
    assert [p.name for p in folder.iterdir()] == [name]
    assert load_file(path).keys() == got.keys()  # any reader of the format can read it


def test_parameters_are_written_by_value(tmp_path: Path) -> None:
    p = torch.nn.Parameter(torch.randn(4, 4))
    files.write(tmp_path / "a", {"p": p, "view": p[1:3], "t": p.t()}, {})
    got, _ = files.read(tmp_path / "a")
    assert torch.equal(got["p"], p) and torch.equal(got["view"], p[1:3])
    assert torch.equal(got["t"], p.t()) and not got["p"].requires_grad


@pytest.mark.parametrize("length", [0, 1, 4, 8, 9, 40, 200, -1, -7, -60])
def test_truncated_files(tmp_path: Path, length: int) -> None:
    files.write(tmp_path / "whole", tensors(), {"format": "x"})
    data = (tmp_path / "whole").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[:length])
    with pytest.raises(
        FormatError, match="cut.safetensors: not a safetensors file, or a truncated"
    ):
        files.read(path)


@pytest.mark.parametrize(
    "data",
    [b"hello, this is text" * 10, b"\x00" * 100, b"\xff" * 100, b"{}", b"GGUF" + b"\x03" * 60],
    ids=["text", "zeros", "ones", "json", "gguf"],
)
def test_files_of_another_kind(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match="not a safetensors file"):
        files.read(path)


def test_a_header_that_lies_about_its_tensors(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"\x00" * 8)
    with pytest.raises(FormatError, match="not a safetensors file"):
        files.read(tmp_path / "a")


class Explosive:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("how", ["torch_zip", "torch_legacy", "pickle2", "pickle5"])
def test_pickles_are_refused_unread(tmp_path: Path, how: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"  # whatever its name says
    if how.startswith("torch"):
        torch.save({"a": Explosive()}, path, _use_new_zipfile_serialization=how == "torch_zip")
    else:
        path.write_bytes(pickle.dumps(Explosive(), protocol=int(how[-1])))
    with pytest.raises(FormatError, match="expected a safetensors file, got a pickle .*convert it"):
        files.read(path)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("start", [b"\x80", b"PK"], ids=["0x80", "PK"])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path, start: bytes) -> None:
    """A file begins with its header's length, and one in 32 begins with the byte of a pickle."""
    target = int.from_bytes(start.ljust(8, b"\x00"), "little")
    target = target if len(start) == 2 else target + 256
    path, value = tmp_path / "a.safetensors", torch.randn(3)
    for padding in range(target):
        save_file({"x": value}, path, {"padding": "p" * (target - 160 + padding)})
        data = path.read_bytes()
        if data[: len(start)] == start:
            break
    assert path.read_bytes()[: len(start)] == start
    assert torch.equal(files.read(path)[0]["x"], value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2],
    ids=str,
)
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.zeros(2, 3)
    bad[1, 2] = value
    save_file({"ok": torch.ones(2), "bad.down": bad.to(dtype)}, tmp_path / "a")
    with pytest.raises(FormatError, match="bad.down: expected finite values, got NaN or infinity"):
        files.read(tmp_path / "a")
    save_file({"good": torch.ones(2).to(dtype)}, tmp_path / "a")
    assert files.read(tmp_path / "a")[0]["good"].dtype == dtype


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such file"):
        files.read(tmp_path / "nothing.safetensors")
    with pytest.raises(FormatError, match="expected a regular file, got a directory"):
        files.read(tmp_path)
    with pytest.raises(FormatError, match="/dev/null: expected a regular file, got a device"):
        files.read("/dev/null")
    with pytest.raises(FileNotFoundError, match="its directory does not exist"):
        files.write(tmp_path / "no" / "a.safetensors", tensors(), {})
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="its directory does not exist"):
        files.write(tmp_path / "file" / "a.safetensors", tensors(), {})
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch, step: str, error: type[BaseException]
) -> None:
    path = tmp_path / "a.safetensors"
    files.write(path, {"old": torch.ones(3)}, {})
    before = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        if step == "save_file":  # half a file
            Path(args[1]).write_bytes(b"half")
        raise error("disk full")

    if step == "save_file":
        monkeypatch.setattr(files, "save_file", fail)
    else:
        monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(error):
        files.write(path, tensors(), {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights there")
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    store, models = tmp_path / "store", tmp_path / "models"
    store.mkdir()
    models.mkdir()
    (models / "link").symlink_to("../store/real")
    (models / "second").symlink_to(models / "link")
    for name, value in (("link", 1.0), ("second", 2.0)):  # the first time there is no target yet
        files.write(models / name, {"x": torch.full((2,), value)}, {})
        assert (models / name).is_symlink() and not (store / "real").is_symlink()
        assert files.read(store / "real")[0]["x"].tolist() == [value] * 2
    assert [p.name for p in store.iterdir()] == ["real"]
    assert sorted(p.name for p in models.iterdir()) == ["link", "second"]
    (models / "nowhere").symlink_to("../no/real")
    with pytest.raises(FileNotFoundError, match="nowhere: its directory does not exist"):
        files.write(models / "nowhere", tensors(), {})


@pytest.mark.skipif(os.name == "nt", reason="files of POSIX")
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "circle").symlink_to("circle")
    names = {"pipe": "a device", "folder": "a dir", "link": "a device", "circle": "symbolic links"}
    for name, kind in names.items():
        message = f"{name}: expected a regular file or none, got {kind}"
        with pytest.raises(FileExistsError, match=message):
            files.write(tmp_path / name, tensors(), {})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("step", ["mkstemp", "save_file", "replace"])
def test_errors_name_the_path_that_was_given(tmp_path: Path, monkeypatch, step: str) -> None:
    real, path = tmp_path / "real", tmp_path / "given"
    real.touch()
    path.symlink_to("real")

    def fail(*args: Any, **kwargs: Any) -> None:
        if step == "save_file":  # a write() names no file
            raise OSError(28, "No space left on device")
        raise PermissionError(13, "Permission denied", f"{tmp_path}/.real.temporary")

    module = {"mkstemp": files.tempfile, "save_file": files, "replace": files.os}[step]
    monkeypatch.setattr(module, step, fail)
    expected = OSError if step == "save_file" else PermissionError
    with pytest.raises(expected, match="given") as caught:
        files.write(path, tensors(), {})
    assert "temporary" not in str(caught.value)
    assert caught.value.errno == (28 if step == "save_file" else 13)
    assert real.read_bytes() == b"" and sorted(tmp_path.iterdir()) == [path, real]


def test_a_folder_in_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        files.write(tmp_path / "a", tensors(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            files.write(tmp_path / "a", tensors(), {})
    finally:
        tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_files_have_the_permissions_of_ordinary_new_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    files.write(tmp_path / "a", tensors(), {})
    modes = {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plain", "a")}
    assert len(modes) == 1


def test_overwriting(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        files.write(tmp_path / "a", {"x": torch.full((2,), value)}, {"n": str(value)})
        got, metadata = files.read(tmp_path / "a")
        assert got["x"].tolist() == [value] * 2 and metadata == {"n": str(value)}
