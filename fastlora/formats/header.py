"""The header of a safetensors file: which tensor is where.

A file is the header's length (8 bytes, little endian), the header (a JSON object, UTF-8) and the
data. The header has for each tensor `{"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}`,
where offsets are from the beginning of the data, and may have `"__metadata__"`, an object of
strings. The tensors fill the data: no holes, no overlaps, nothing behind the last.

The header is read here and not by the safetensors library, which of two equal keys takes the last
one, ignores fields that it does not know, and maps the file into memory. JSON of this form needs no
recursion, and what it takes is bounded by what it describes: nothing else is ever built.

All errors are ValueErrors that say what is wrong; the caller knows the file's name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LENGTH_BYTES = 8
LIMIT = 100_000_000  # bytes; the library's own
METADATA = "__metadata__"
FIELDS = ("dtype", "shape", "data_offsets")
MOST_DIMENSIONS = 64  # PyTorch's, for most operators

# In the order in which the library sorts tensors, last ones first: by alignment. PyTorch has no
# tensors of F6, and computes nothing with its F4, which has two values in an element.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANKS = {dtype: rank for rank, dtype in enumerate(NAMES)}


class Entry(NamedTuple):
    """A tensor: the bytes [start, stop) of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    entries: dict[str, Entry]
    metadata: dict[str, str]


def parse(data: bytes, data_size: int) -> Header:
    """The header, checked against the number of bytes that follow it in the file."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a header in UTF-8, got {error}") from None
    if not text.startswith("{"):
        raise ValueError(f"expected a header that begins with '{{', got {shown(text)}")
    cursor, header = Cursor(text), Header({}, {})
    for key in cursor.keys():
        if key == METADATA:
            header.metadata.update((k, cursor.string()) for k in cursor.keys())
        else:
            header.entries[key] = read_entry(cursor, key)
    cursor.end()
    check_layout(header.entries, data_size)
    return header


def read_entry(cursor: Cursor, key: str) -> Entry:
    name, shape, offsets = cursor.fields()
    dtype = DTYPES.get(name)
    if dtype is None:
        raise ValueError(f"{shown(key)}: expected a dtype of {list(DTYPES)}, got {name!r}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{shown(key)}: expected offsets [start, stop], got {list(offsets)}")
    expected, got = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    # Dimensions whose product overflows make no tensor even beside one of 0.
    if expected >= 2**63 or (not expected and math.prod(filter(None, shape)) >= 2**60):
        raise ValueError(f"{shown(key)}: expected a shape that fits, got {list(shape)}")
    if expected != got:
        raise ValueError(
            f"{shown(key)}: expected {expected} bytes for {list(shape)} of {name}, got {got}"
        )
    return Entry(dtype, shape, *offsets)


def check_layout(entries: Mapping[str, Entry], data_size: int) -> None:
    """The tensors, in whatever order the header has them, follow each other and fill the data."""
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            problem = "a hole" if entry.start > end else "an overlap"
            raise ValueError(
                f"{shown(key)}: expected its data at byte {end}, got {entry.start}: {problem}"
            )
        end = entry.stop
    if end != data_size:
        raise ValueError(f"expected {end} bytes of data for its tensors, got {data_size}")


def layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """A file's beginning (length and header) and the order of the tensors' data after it.

    The same bytes as the library writes.
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(f"metadata: expected strings, got {key!r}: {value!r}")
    for key, tensor in tensors.items():
        check_storable(key, tensor)
    order = sorted(tensors, key=lambda key: (-RANKS[tensors[key].dtype], key))
    content: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        tensor, start = tensors[key], end
        end += tensor.numel() * tensor.itemsize
        content[key] = dict(
            zip(FIELDS, (NAMES[tensor.dtype], list(tensor.shape), [start, end]), strict=True)
        )
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # data are aligned
    if len(text) > LIMIT:
        raise ValueError(f"expected a header of at most {LIMIT} bytes, got {len(text)}")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, order


def check_storable(key: str, tensor: Tensor) -> None:
    if not isinstance(key, str) or key == METADATA:
        raise ValueError(f"expected tensors' names, other than {METADATA}, got {key!r}")
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{shown(key)}: expected a dense tensor with values, got {type(tensor)}")
    if tensor.dtype not in NAMES:
        raise ValueError(f"{shown(key)}: expected a dtype of {list(DTYPES)}, got {tensor.dtype}")


def shown(text: str) -> str:
    """For messages: keys have any length."""
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


# Nothing here lets two repetitions share spaces: what does not match is found in linear time.
_S = r"[ \t\n\r]*"
_NUMBER = rf"{_S}(?:0|[1-9][0-9]{{0,18}})"
_NUMBERS = rf"\[((?:{_NUMBER}(?:{_S},{_NUMBER}){{0,{MOST_DIMENSIONS - 1}}})?){_S}\]"
_FIELD = (
    rf'{_S}(?:"dtype"{_S}:{_S}"([^"\\]{{1,20}})"'
    rf'|"shape"{_S}:{_S}{_NUMBERS}|"data_offsets"{_S}:{_S}{_NUMBERS}){_S}'
)


class Cursor:
    """A place in JSON text. Each method takes what it is named after, or raises ValueError."""

    SPACES = " \t\n\r"
    SPACE = re.compile(_S)
    FIELDS = re.compile(rf"\{{{_FIELD},{_FIELD},{_FIELD}\}}")
    STRING = json.JSONDecoder()

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def skip(self) -> str:
        """The next character that is no space; "" at the end."""
        found = self.text[self.at : self.at + 1]
        if found not in self.SPACES:  # most often: writers leave spaces out
            return found
        match = self.SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.text[self.at : self.at + 1]

    def fail(self, expected: str) -> ValueError:
        found = shown(self.text[self.at : self.at + 100]) if self.skip() else "the end"
        return ValueError(f"header: character {self.at}: expected {expected}, got {found}")

    def punctuation(self, allowed: str) -> str:
        found = self.skip()
        if not found or found not in allowed:
            raise self.fail(" or ".join(map(repr, allowed)))
        self.at += 1
        return found

    def string(self) -> str:
        if self.skip() != '"':
            raise self.fail("a string")
        value, self.at = self.STRING.raw_decode(self.text, self.at)
        value.encode()  # which half of a surrogate pair, written as \ud800, has no bytes for
        return value

    def fields(self) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """A tensor's dtype, shape and offsets, which have any order."""
        self.skip()
        match = self.FIELDS.match(self.text, self.at)
        found = match.groups() if match else ()
        dtype, shape, offsets = (found[i::3] for i in range(3))
        if not match or any(field.count(None) != 2 for field in (dtype, shape, offsets)):
            raise self.fail(
                f'{{"dtype": a name, "shape": at most {MOST_DIMENSIONS} whole numbers, '
                '"data_offsets": two of them} and nothing else'
            )
        self.at = match.end()
        return first(dtype), numbers(first(shape)), numbers(first(offsets))

    def keys(self) -> Iterator[str]:
        """An object's keys; whoever asks takes a key's value before the next key."""
        self.punctuation("{")
        if self.skip() == "}":
            self.at += 1
            return
        seen: set[str] = set()
        while True:
            key = self.string()
            if key in seen:
                raise ValueError(f"header: {shown(key)} is there twice")
            seen.add(key)
            self.punctuation(":")
            yield key
            if self.punctuation(",}") == "}":
                return

    def end(self) -> None:
        if self.skip():
            raise self.fail("the end")


def first(found: tuple[str | None, ...]) -> str:
    return found[0] or found[1] or found[2] or ""


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()
