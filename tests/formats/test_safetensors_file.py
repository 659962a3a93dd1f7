"""SafetensorsFile and what write makes, against the safetensors library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlora.formats import files, header
from fastlora.formats.files import FormatError, SafetensorsFile

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(path: Path, content: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file of this header (bytes, text or an object) and data, whatever they are."""
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    text = text if isinstance(text, bytes) else text.encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def sample(dtype: torch.dtype, *shape: int) -> Tensor:
    """Finite values of any dtype: small whole numbers."""
    return torch.arange(torch.Size(shape).numel()).remainder(2).reshape(shape).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """The same dtype, shape and bits."""
    bits = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


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


def fields(**changes: Any) -> dict[str, Any]:
    return {"a": {k: v for k, v in {**F32, **changes}.items() if v is not ...}}


A_FIELD = 'expected {"dtype": a name'
MALFORMED: dict[str, tuple[Any, str]] = {
    "not an object": ([1], "begins with '{', got '\\[1\\]'"),
    "space first": (' {"a": 1}', "begins with '{'"),
    "not closed": ('{"a"', "expected ':', got the end"),
    "ends after a comma": ('{"__metadata__": {}, ', "expected a string, got the end"),
    "a comma too many": ('{"__metadata__": {},}', "expected a string, got '}'"),
    "text after it": ('{"__metadata__": {}} {}', "character 21: expected the end, got '{}'"),
    "zeros after it": (b'{"__metadata__": {}}\0\0', "expected the end"),
    "nested deeply": ('{"a":' + "[" * 100_000, A_FIELD),
    "objects nested deeply": ('{"a":' * 100_000, A_FIELD),
    "not UTF-8": (b'{"\xff": 1}', "expected a header in UTF-8"),
    "half a surrogate pair": ('{"\\ud800": 1}', "surrogates not allowed"),
    "control character": ('{"a\nb": 1}', "Invalid control character"),
    "bad escape": ('{"\\x": 1}', "Invalid .*escape"),
    "key is no string": ("{1: 2}", "expected a string, got '1"),
    "tensor is a list": ({"a": [1]}, A_FIELD),
    "tensor is null": ({"a": None}, A_FIELD),
    "tensor has nothing": ({"a": {}}, A_FIELD),
    "no dtype": (fields(dtype=...), A_FIELD),
    "no shape": (fields(shape=...), A_FIELD),
    "no offsets": (fields(data_offsets=...), A_FIELD),
    "unknown field": (fields(colour="red"), A_FIELD),
    "two shapes": (
        '{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}',
        A_FIELD,
    ),
    "shape instead of offsets": ('{"a":{"dtype":"F32","shape":[2],"shape":[0,8]}}', A_FIELD),
    "unknown dtype": (fields(dtype="F128"), "'a': expected a dtype of .*'F32'.* got 'F128'"),
    "lower case dtype": (fields(dtype="f32"), "got 'f32'"),
    "packed dtype": (fields(dtype="F4", shape=[16]), "got 'F4'"),
    "dtype is a number": (fields(dtype=32), A_FIELD),
    "shape is a number": (fields(shape=2), A_FIELD),
    "shape of texts": (fields(shape=["2"]), A_FIELD),
    "shape of fractions": (fields(shape=[2.0]), A_FIELD),
    "shape of booleans": (fields(shape=[True, 2]), A_FIELD),
    "shape with an exponent": ('{"a":{"dtype":"F32","shape":[2e0],"data_offsets":[0,8]}}', A_FIELD),
    "negative shape": (fields(shape=[-2]), A_FIELD),
    "two negative dimensions": (fields(shape=[-1, -2]), A_FIELD),
    "leading zeros": ('{"a":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}', A_FIELD),
    "other digits": ('{"a":{"dtype":"F32","shape":[２],"data_offsets":[0,8]}}', A_FIELD),
    "many digits": (fields(shape=[10**4000]), A_FIELD),
    "many dimensions": (fields(shape=[1] * 64 + [2]), A_FIELD),
    "shape too large": (fields(shape=[3]), "expected 12 bytes for \\[3\\] of F32, got 8"),
    "shape too small": (fields(shape=[]), "expected 4 bytes for \\[\\] of F32, got 8"),
    "product of 2^64": (fields(shape=[2**32, 2**32]), "expected a shape that fits"),
    "product of 2^64 times 0": (fields(shape=[2**32, 0, 2**32]), "expected a shape that fits"),
    "three offsets": (fields(data_offsets=[0, 4, 8]), "expected offsets \\[start, stop\\]"),
    "one offset": (fields(data_offsets=[8]), "expected offsets \\[start, stop\\]"),
    "offsets in disorder": (fields(data_offsets=[8, 0]), "expected offsets \\[start, stop\\]"),
    "negative offset": (fields(data_offsets=[-8, 0]), A_FIELD),
    "NaN for an offset": (fields(data_offsets=[0, float("nan")]), A_FIELD),
    "beyond the file": (fields(shape=[4], data_offsets=[0, 16]), "expected 16 bytes .* got 8"),
    "10 GB": (
        fields(shape=[10**10], dtype="U8", data_offsets=[0, 10**10]),
        "expected 10000000000 bytes of data for its tensors, got 8",
    ),
    "a hole first": (fields(shape=[1], data_offsets=[4, 8]), "at byte 0, got 4: a hole"),
    "a hole": (
        {"b": {**F32, "shape": [0], "data_offsets": [12, 12]}, "a": F32},
        "'b': expected its data at byte 8, got 12: a hole",
    ),
    "an overlap": (
        {"a": F32, "b": {**F32, "shape": [1], "data_offsets": [4, 8]}},
        "'b': expected its data at byte 8, got 4: an overlap",
    ),
    "the same data twice": ({"a": F32, "b": F32}, "got 0: an overlap"),
    "nothing inside": (
        {"a": F32, "b": {**F32, "shape": [0], "data_offsets": [4, 4]}},
        "got 4: an overlap",
    ),
    "bytes after the last": (fields(shape=[1], data_offsets=[0, 4]), "expected 4 bytes .* got 8"),
    "no tensors, but data": ({}, "expected 0 bytes of data for its tensors, got 8"),
    "a key twice": (f'{{"a": {json.dumps(F32)}, "a": {json.dumps(F32)}}}', "'a' is there twice"),
    "a key twice, once escaped": (
        f'{{"a": {json.dumps(F32)}, "\\u0061": {json.dumps(F32)}}}',
        "'a' is there twice",
    ),
    "metadata twice": ('{"__metadata__": {}, "__metadata__": {}}', "twice"),
    "metadata with a key twice": ('{"__metadata__": {"a": "", "a": ""}}', "'a' is there twice"),
    "metadata is null": ({"__metadata__": None}, "expected '{', got 'null"),
    "metadata is a list": ({"__metadata__": []}, "expected '{'"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "expected a string, got '1"),
    "metadata in metadata": ({"__metadata__": {"a": {}}}, "expected a string, got '{}"),
    "metadata of half a pair": ('{"__metadata__": {"a": "\\udfff"}}', "surrogates not allowed"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_headers(tmp_path: Path, content: Any, message: str) -> None:
    path = raw(tmp_path / "a.safetensors", content, b"\0" * 8)
    message = f"a.safetensors: not a safetensors file, or a truncated one: .*{message}"
    with pytest.raises(FormatError, match=message) as caught:
        files.read(path)
    assert len(str(caught.value)) < 1000


WELL_FORMED: dict[str, Any] = {
    "another order": {"b": {**F32, "shape": [1], "data_offsets": [4, 8]}, "a": fields(shape=[1],
        data_offsets=[0, 4])["a"]},
    "spaces": json.dumps(fields(), indent=3) + " \n\t\r",
    "order of fields": {"a": dict(reversed(F32.items()))},
    "ones": fields(shape=[1] * 63 + [2]),
    "huge, but empty": {"b": {**F32, "shape": [0, 2**58], "data_offsets": [8, 8]}, **fields()},
    "escaped": '{"\\u0061\\ud83d\\ude00\\/": ' + json.dumps(F32) + "}",
    "empty key": {"": F32},
    "no metadata": {"__metadata__": {}, **fields()},
}  # fmt: skip


@pytest.mark.parametrize("content", WELL_FORMED.values(), ids=WELL_FORMED.keys())
def test_unusual_headers(tmp_path: Path, content: Any) -> None:
    path = raw(tmp_path / "a", content, bytes(range(8)))
    got, metadata = files.read(path)
    expected = load_file(path)
    assert got.keys() == expected.keys() and metadata == {}
    assert all(same(got[key], expected[key]) for key in got)


def test_lengths_of_the_header(tmp_path: Path) -> None:
    for length in (2**63, 2**64 - 1, 100):
        raw(tmp_path / "a", fields(), b"\0" * 8, length)
        with pytest.raises(
            FormatError, match=f"expected a header of {length} bytes, got a file of"
        ):
            files.read(tmp_path / "a")
    raw(tmp_path / "a", "", length=100_000_001)
    os.truncate(tmp_path / "a", 100_000_009)  # a hole: no disk is used
    with pytest.raises(FormatError, match="at most 100000000 bytes, got 100000001"):
        files.read(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(FormatError, match="got a file of 0"):
        files.read(tmp_path / "a")


@pytest.mark.parametrize("value", [2, 255])
def test_booleans_are_0_or_1(tmp_path: Path, value: int) -> None:
    raw(tmp_path / "a", fields(dtype="BOOL", shape=[8]), bytes([0, 1] * 3 + [1, value]))
    with pytest.raises(FormatError, match="a: expected booleans of 0 or 1, got other bytes"):
        files.read(tmp_path / "a")


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


SIZE = 10**10
WHOLE = {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}
CLAIMS = {  # files of 1 KB that say they have 10 GB
    "one tensor": {"a": WHOLE},
    "another dtype": {"a": {**WHOLE, "dtype": "F16", "shape": [SIZE // 2]}, "b": F32},
    "eight": {str(i): {**WHOLE, "data_offsets": [i * SIZE, (i + 1) * SIZE]} for i in range(8)},
    "one is empty": {"a": {**WHOLE, "shape": [SIZE, 0], "data_offsets": [0, 0]}, "b": WHOLE},
}
LENGTH = 10**7
LENGTHY = {  # headers of 10 MB; as Python's objects some would be 250 MB
    "nested": '{"a":' + "[" * LENGTH,
    "lists": '{"a":{"shape":[' + "[]," * (LENGTH // 3),
    "objects": '{"__metadata__":{"a":' + "{}," * (LENGTH // 3),
    "shape": '{"a":{"shape":[' + "1," * (LENGTH // 2),
    "spaces": "{" + " " * LENGTH,
    "spaces in a shape": '{"a":{"shape":[' + " " * LENGTH,
    "spaces after a number": '{"a":{"shape":[1' + " " * LENGTH,
    "key": '{"' + "a" * LENGTH,
}

# Run in a process of its own, whose memory is that of these lines: MiB beyond what it had before.
MEASURE = """
import json, pathlib, resource, sys, torch
from fastlora.formats import files

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024

growths = {}

def measure(name, call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what there is now
    before = status("VmRSS")
    result = call()  # kept until the peak is known
    growths[name] = status("VmHWM") - before

def outline(path):
    with files.SafetensorsFile(path) as file:
        return file.outline()

def refused(path):
    try:
        files.read(path)
    except files.FormatError:
        return
    sys.exit(f"{path} was read")

folder = pathlib.Path(sys.argv[1])
path = folder / "a"
files.write(path, {"x": torch.ones(3)}, {})
files.read(path)
whole = {str(i): torch.ones(8, 2**19, dtype=torch.half) for i in range(12)}
measure("write", lambda: files.write(path, whole, {}))
measure("write strided", lambda: files.write(path, {k: t.t() for k, t in whole.items()}, {}))
measure("read", lambda: files.read(path))
measure("outline", lambda: outline(path))
del whole

limit = int(status("VmSize") * 2**20) + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.empty(10**10, dtype=torch.uint8)
    sys.exit("the limit does not limit")
except RuntimeError:
    pass
for path in (folder / "refused").iterdir():
    measure(path.name, lambda: refused(path))
print(json.dumps(growths))
"""


@pytest.fixture(scope="module")
def growths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The memory that each thing takes, MiB."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("measures memory as Linux does")
    folder = tmp_path_factory.mktemp("memory")
    (folder / "refused").mkdir()
    for name, content in (CLAIMS | LENGTHY).items():
        raw(folder / "refused" / name, content, b"\0" * 1000)
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_of_reading_and_writing(growths: dict[str, float]) -> None:
    mib = 12 * 8
    assert growths["write"] < 4 and growths["outline"] < 4
    assert growths["write strided"] < mib / 2  # copies of one tensor at a time
    assert growths["read"] < mib + 8


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_take_no_memory(growths: dict[str, float], name: str) -> None:
    """Nothing of the claimed size is asked for: the process may have 256 MiB more."""
    assert growths[name] < 4


@pytest.mark.parametrize("name", LENGTHY)
def test_headers_that_say_little_at_length(growths: dict[str, float], name: str) -> None:
    """The bytes, the text and at most two copies of a part."""
    assert growths[name] < 4 * LENGTH / 2**20 + 4


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
