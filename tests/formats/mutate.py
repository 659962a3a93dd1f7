"""Files that are nearly right, made from one that is, and what a reader may do with them.

Bytes alone rarely get past a header, so there are mutants of the header as well, with its length
mended, and of the tensors and metadata, written anew. All of them follow from a seed.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor

from fastlora.formats.files import FormatError, as_bytes
from fastlora.formats.header import layout

SECONDS = 1.0  # of the processor, for a file of a few KB

NUMBERS = [-1, 0, 1, 2, 3, 7, 64, 2**31, 2**32 - 1, 2**62, 2**63, 2**64, 10**30, 0.5, 1e400]
VALUES = [*NUMBERS, None, True, "", "F32", [], {}, [[]], {"a": {}}, "\ud800", "9" * 50]
WORDS = ["", ".", "alpha", "weight", "lora_A", "lora_down", "bias", "\0", "☃", "__metadata__", "0"]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.uint16,
    torch.uint8,
    torch.bool,
]


class Mutant(NamedTuple):
    what: str  # says how to make it again
    data: bytes


def truncations(data: bytes) -> Iterator[Mutant]:
    for length in range(len(data)):
        yield Mutant(f"{length} bytes", data[:length])


def mutants(data: bytes, seed: int, count: int) -> Iterator[Mutant]:
    """`count` mutants of a file: of its bytes, its header and its tensors in turn."""
    kinds = (change_bytes, change_header, change_tensors)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        name = f"{kind.__name__} {seed}-{number}"
        yield Mutant(name, kind(data, random.Random(name)))


def survive(reader: Callable[[Path], object], files: Iterable[Mutant], path: Path) -> Counter[str]:
    """Each file is read, or refused by a FormatError that names it; nothing else, and soon.

    Counts "read" and "refused".
    """
    outcomes: Counter[str] = Counter()
    for what, data in files:
        path.unlink(missing_ok=True)  # file systems wait for the disk where one is overwritten
        path.write_bytes(data)
        begin = time.thread_time()
        try:
            reader(path)
            outcomes["read"] += 1
        except FormatError as error:
            assert path.name in str(error), f"{what}: does not name the file: {error}"
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        seconds = time.thread_time() - begin
        assert seconds < SECONDS, f"{what}: {seconds} s"
    return outcomes


def split(data: bytes) -> tuple[bytes, bytes]:
    """The header and the data of a file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def packed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A file; the library's own has its metadata in another order each time."""
    start, order = layout(tensors, metadata)
    return start + b"".join(as_bytes(tensors[key]).numpy().tobytes() for key in order)


def join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    changed, header = bytearray(data), len(data) - len(split(data)[1])
    for _ in range(rng.randint(1, 4)):
        end = min(len(changed), rng.choice([8, header, len(changed)]))
        at = rng.randrange(max(end, 1))
        other, length = rng.randrange(len(changed) + 1), rng.choice([1, 1, 2, 8, 40])
        part = changed[other : other + length]
        match rng.choice(["flip", "set", "insert", "delete", "copy", "overwrite", "punctuation"]):
            case "flip":
                changed[at : at + 1] = bytes(
                    b ^ 1 << rng.randrange(8) for b in changed[at : at + 1]
                )
            case "set":
                changed[at : at + 1] = bytes([rng.choice([0, 1, 0x20, 0x7F, 0x80, 0xFF])])
            case "insert":
                changed[at:at] = rng.randbytes(length)
            case "delete":
                del changed[at : at + length]
            case "copy":
                changed[at:at] = part
            case "overwrite":
                changed[at : at + length] = part
            case "punctuation":
                changed[at : at + 1] = rng.choice([b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\"])
    return bytes(changed)


def change_header(data: bytes, rng: random.Random) -> bytes:
    """A value, a key or a place in the JSON is another one; the length fits."""
    header, rest = split(data)
    content = json.loads(header)
    for _ in range(rng.randint(1, 3)):
        nodes = [node for node in containers(content) if node]
        node, other = rng.choice(nodes), rng.choice(nodes)
        at, place = rng.choice(places(node)), rng.choice(places(other))
        match rng.choice(["value", "number", "swap", "copy", "remove", "rename", "add"]):
            case "value":
                node[at] = copied(rng.choice(VALUES))
            case "number":
                if isinstance(node[at], int):
                    node[at] += rng.choice([-8, -4, -1, 1, 2, 4, 8, 1000, node[at]])
            case "swap":
                node[at], other[place] = copied(other[place]), copied(node[at])
            case "copy":
                node[at] = copied(other[place])
            case "remove":
                del node[at]
            case "rename":
                if isinstance(node, dict):
                    node[rng.choice([*WORDS, "shape", "dtype", "data_offsets"])] = node.pop(at)
            case "add":
                new = copied(node[at])
                if isinstance(node, dict):
                    node[rng.choice(WORDS)] = new
                else:
                    node.append(new)
        if not any(containers(content)):
            break
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 1]))
    if rng.random() < 0.2:  # a member twice
        before, comma, after = text.partition(",")
        text = before + comma + before.lstrip("{") + comma + after
    return join(text.encode(errors="surrogatepass"), rest)


def containers(node: Any) -> Iterator[Any]:
    """The dicts and lists in a JSON value, itself first."""
    if isinstance(node, dict | list):
        yield node
        for child in node.values() if isinstance(node, dict) else node:
            yield from containers(child)


def places(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node)))


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def change_tensors(data: bytes, rng: random.Random) -> bytes:
    """A well-formed file of tensors and metadata that are not what the reader expects."""
    tensors = dict(sorted(load(data).items()))
    metadata = json.loads(split(data)[0]).get("__metadata__", {})
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if metadata and rng.random() < 0.4:
            change_metadata(metadata, rng)
            continue
        if not tensors:
            break
        key, other = rng.choice(list(tensors)), rng.choice(list(tensors))
        match rng.choice(["rename", "rename", "drop", "copy", "swap", "tensor", "tensor"]):
            case "rename":
                tensors[renamed(key, other, rng)] = tensors.pop(key)
            case "drop":
                del tensors[key]
            case "copy":
                tensors[renamed(key, other, rng)] = tensors[key].clone()
            case "swap":
                tensors[key], tensors[other] = tensors[other], tensors[key]
            case "tensor":
                tensors[key] = changed_tensor(tensors[key], rng)
    tensors.pop("__metadata__", None)
    return packed(tensors, metadata)


def renamed(key: str, other: str, rng: random.Random) -> str:
    parts = key.split(".")
    at = rng.randrange(len(parts))
    match rng.choice(["word", "word", "remove", "twice", "flat", "borrow", "character"]):
        case "word":
            parts[at] = rng.choice(WORDS)
        case "remove":
            del parts[at]
        case "twice":
            parts.insert(at, parts[at])
        case "flat":
            return key.replace(".", "_", rng.randint(1, 3))
        case "borrow":
            parts[at] = rng.choice(other.split("."))
        case "character":
            place = rng.randrange(len(key) + 1)
            return key[:place] + rng.choice("._0aA ") + key[place + rng.randint(0, 1) :]
    return ".".join(parts)


def changed_tensor(tensor: Tensor, rng: random.Random) -> Tensor:
    axis = rng.randrange(max(tensor.dim(), 1))
    match rng.choice(["transpose", "flat", "more", "less", "longer", "empty", "dtype", "value"]):
        case "transpose":
            return tensor.transpose(0, -1) if tensor.dim() else tensor
        case "flat":
            return tensor.reshape(-1)
        case "more":
            return tensor.unsqueeze(axis)
        case "less":
            return tensor.select(axis, 0) if tensor.dim() and tensor.shape[axis] else tensor
        case "longer":
            return torch.cat([tensor, tensor], axis) if tensor.dim() else tensor.repeat(2)
        case "empty":
            return tensor.narrow(axis, 0, 0) if tensor.dim() else tensor.new_empty(0)
        case "dtype":
            return (tensor.real if tensor.is_complex() else tensor).to(rng.choice(DTYPES))
        case _:
            return torch.full_like(tensor, rng.choice([0, 1, 100]) if not is_float(tensor) else
                rng.choice([0.0, -1.0, 1e4, float("nan"), float("inf")]))  # fmt: skip


def is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def change_metadata(metadata: dict[str, str], rng: random.Random) -> None:
    """An entry is gone, another text, or JSON with something else in it."""
    key = rng.choice(list(metadata))
    match rng.choice(["drop", "text", "cut", "deep", "json", "json", "json"]):
        case "drop":
            del metadata[key]
        case "text":
            metadata[key] = rng.choice(["", "1", "1e400", "nan", "None", "[]", "{}", "null", "☃"])
        case "cut":
            metadata[key] = metadata[key][: rng.randrange(len(metadata[key]) + 1)]
        case "deep":
            metadata[key] = rng.choice(["[", '{"a":']) * 20_000
        case "json":
            try:
                content = json.loads(metadata[key])
            except (ValueError, RecursionError):
                return
            nodes = [node for node in containers(content) if node]
            if nodes:
                node = rng.choice(nodes)
                node[rng.choice(places(node))] = copied(rng.choice(VALUES))
                metadata[key] = json.dumps(content)
