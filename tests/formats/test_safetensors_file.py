"""SafetensorsFile and what write makes, against the safetensors library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastlora.formats import files, header
from fastlora.formats.files import FormatError, SafetensorsFile
from tests.formats.samples import raw, same, sample


@pytest.mark.parametrize("dtype", header.NAMES, ids=str)
def test_every_dtype_both_ways(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"odd": sample(dtype, 3, 1, 5), "scalar": sample(dtype), "none": sample(dtype, 0, 3)}
    save_file(tensors, tmp_path / "library", {"a": "b"})
    files.write(tmp_path / "ours", tensors, {"a": "b"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    got, metadata = files.read(tmp_path / "library")
    assert metadata == {"a": "b"} and got.keys() == tensors.keys()
    assert all(same(got[key], value) for key, value in tensors.items())


def test_the_library_writes_the_same_bytes_of_many_dtypes(tmp_path: Path) -> None:
    tensors = {
        f'{dtype}.{key} ☃\n\\"\x7f\x01': sample(dtype, n)
        for dtype in header.NAMES
        for key, n in (("b", 3), ("a", 5))
    }
    for metadata in ({}, {"one ü\x00\t": '{"json": "\\"}'}):
        save_file(tensors, tmp_path / "library", metadata or None)
        files.write(tmp_path / "ours", tensors, metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_an_open_file(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3, 4).half(), "alpha": torch.tensor(4.0), "one": torch.ones(1, 1)}
    save_file({**tensors, "none": torch.empty(0, 7)}, tmp_path / "a", {"k": "v"})
    with SafetensorsFile(str(tmp_path / "a")) as file:
        assert file.path == tmp_path / "a" and file.metadata == {"k": "v"}
        assert sorted(file.keys) == ["alpha", "none", "one", "w"]
        assert file.info("w") == (torch.float16, (3, 4), 24)
        assert file.info("none") == (torch.float32, (0, 7), 0)
        assert same(file.tensor("w"), tensors["w"]) and same(file.tensor("w"), tensors["w"])
        outline = file.outline()
        with pytest.raises(KeyError, match="nothing"):
            file.tensor("nothing")
    assert {key for key, tensor in outline.items() if tensor.is_meta} == {"w"}
    assert outline["w"].shape == (3, 4) and outline["w"].dtype == torch.float16
    assert outline["alpha"].item() == 4 and same(outline["one"], tensors["one"])
    assert outline["none"].shape == (0, 7)


def test_tensors_do_not_share_and_are_on_the_cpu(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "a")
    with torch.device("meta"), SafetensorsFile(tmp_path / "a") as file:
        first, again = file.tensor("a"), file.tensor("a")
    first += 1
    assert first.device.type == "cpu" and again.tolist() == [0, 0]
    assert first.untyped_storage().nbytes() == 8  # not the whole file


def test_what_was_read_stays_when_the_file_changes(tmp_path: Path) -> None:
    path, value = tmp_path / "a", torch.randn(1000)
    files.write(path, {"x": value, "y": value}, {})
    with SafetensorsFile(path) as file:
        x = file.tensor("x")
        files.write(path, {"x": torch.zeros(5)}, {})
        assert torch.equal(file.tensor("y"), value)  # the file that was opened
    os.truncate(path, 0)  # which kills a process with a mapped file
    assert torch.equal(x, value)
    files.write(path, {"x": value, "y": value}, {})
    with SafetensorsFile(path) as file:
        os.truncate(path, 5000)
        with pytest.raises(FormatError, match="a: y: the file became shorter while it was read"):
            file.tensor("y")


@pytest.mark.skipif(os.name == "nt", reason="counts the open files of Linux")
def test_no_file_stays_open(tmp_path: Path) -> None:
    save_file({"a": torch.full((2,), torch.nan)}, tmp_path / "nan")
    raw(tmp_path / "bad", "{]")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("nan", "bad"):
        with pytest.raises(FormatError):
            files.read(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("at", [0, files.PIECE - 1, files.PIECE, 2 * files.PIECE + 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.float8_e8m0fnu], ids=str)
def test_a_single_nan_is_found_wherever_it_is(tmp_path: Path, dtype: torch.dtype, at: int) -> None:
    values = torch.ones(2 * files.PIECE + 7)
    save_file({"x": values.to(dtype)}, tmp_path / "a")
    files.read(tmp_path / "a")
    values[at] = torch.nan
    save_file({"x": values.to(dtype)}, tmp_path / "a")
    with pytest.raises(FormatError, match="x: expected finite values, got NaN or infinity"):
        files.read(tmp_path / "a")


REFUSED: dict[str, tuple[dict[Any, Any], dict[Any, Any], str]] = {
    "metadata's key": ({}, {1: "a"}, "metadata: expected strings, got 1: 'a'"),
    "metadata's value": ({}, {"a": None}, "metadata: expected strings, got 'a': None"),
    "half a surrogate pair": ({}, {"a": "\ud800"}, "surrogates not allowed"),
    "tensor's key": ({1: torch.ones(2)}, {}, "expected tensors' names.* got 1"),
    "metadata as a tensor": ({"__metadata__": torch.ones(2)}, {}, "expected tensors' names"),
    "complex128": ({"x": torch.ones(2, dtype=torch.complex128)}, {}, "'x': expected a dtype.*128"),
    "meta": ({"x": torch.ones(2, device="meta")}, {}, "'x': expected a dense tensor with values"),
    "sparse": ({"x": torch.ones(2).to_sparse()}, {}, "'x': expected a dense tensor"),
    "no tensor": ({"x": [1.0]}, {}, "'x': expected a dense tensor.*list"),
}


@pytest.mark.parametrize(("tensors", "metadata", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_file_cannot_hold(tmp_path: Path, tensors: Any, metadata: Any, message: str) -> None:
    files.write(tmp_path / "a", {"old": torch.ones(1)}, {})
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(FormatError, match=f"a: .*{message}"):
        files.write(tmp_path / "a", tensors, metadata)
    assert (tmp_path / "a").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_views_are_written_as_they_read(tmp_path: Path) -> None:
    z = torch.randn(4, 6, dtype=torch.complex64)
    views = {
        "conj": z.conj(),
        "negative": z.conj().imag,
        "expanded": z.real[0].expand(3, 6),
        "strided": z.real[::2, ::3],
        "transposed": z.t(),
        "single": z.real[:1, 2],  # contiguous, with a stride
        "parameter": torch.nn.Parameter(z.abs()),
        "part": z.view(-1)[5:9],
        "permuted": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    assert views["conj"].is_conj() and views["negative"].is_neg()
    files.write(tmp_path / "a", views, {})
    for key, got in load_file(tmp_path / "a").items():
        assert torch.equal(got, views[key]), key


@pytest.mark.parametrize("count", [10_000])
def test_many_tensors(tmp_path: Path, count: int) -> None:
    content = {
        f"blocks.{i}.alpha": {"dtype": "F32", "shape": [], "data_offsets": [4 * i, 4 * i + 4]}
        for i in range(count)
    }
    values = torch.randn(count)
    raw(tmp_path / "a", content, values.numpy().tobytes())
    with SafetensorsFile(tmp_path / "a") as file:
        got = file.outline()
    assert torch.equal(torch.stack(list(got.values())), values)
    with safe_open(tmp_path / "a", "pt") as file:
        assert set(file.keys()) == got.keys()
