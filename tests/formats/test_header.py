"""Headers of safetensors files: malformed ones are refused in words, unusual ones read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastlora.formats import files
from fastlora.formats.files import FormatError
from tests.formats.samples import F32, fields, raw, same

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
