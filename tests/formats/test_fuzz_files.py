"""Every reader, given files that are nearly right: it reads them, or says what is wrong with them.

A new format is a line in CASES: its name, a small file of it, and what reads such a file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from fastlora.formats import detect, files, header, native
from fastlora.formats.changes import AdapterFile, Change, Dense, Hadamard, Kronecker, LowRank
from fastlora.formats.files import FormatError, SafetensorsFile
from tests.formats import samples
from tests.formats.mutate import join, mutants, survive, truncations

MUTANTS = 21_000  # of all readers together


class Case(NamedTuple):
    name: str
    sample: Callable[[], bytes]
    reader: Callable[[Path], object]


def outline(path: Path) -> dict[str, Tensor]:
    with SafetensorsFile(path) as file:
        return file.outline()


def adapter(path: Path) -> None:
    """Read with and without values; PEFT's configuration is in the header of our sample."""
    with SafetensorsFile(path) as file:
        config = config_of(file.metadata)
        for tensors in (file.outline(), {key: file.tensor(key) for key in file.keys}):
            found = detect.unpack(tensors, file.metadata, config, str(path))
            check_adapter(found, tensors)


def config_of(metadata: dict[str, str]) -> Any:
    try:
        return json.loads(metadata["adapter_config"])
    except (KeyError, ValueError, RecursionError):
        return None


def check_adapter(file: AdapterFile, tensors: dict[str, Tensor]) -> None:
    """Every key has a meaning or a reason to have none, and changes are computed or refused."""
    meant = [key for change in file.changes.values() for key in change.keys]
    assert set(meant) | set(file.unused) == set(tensors)
    assert set(meant).isdisjoint(file.unused)
    for target, change in file.changes.items():
        assert str(target) and change.kind
        assert math.isfinite(getattr(change.weight, "ratio", 0.0)), target
        weight = weight_for(change)
        if weight is not None and not any(tensors[key].is_meta for key in change.keys):
            with suppress(FormatError):
                assert change.changed(weight).shape == weight.shape, target


def weight_for(change: Change) -> Tensor | None:
    """Any weight that the change is for; None where its tensors do not tell the shape."""
    match change.weight:
        case LowRank(down, up, mid=None, embedding=False):
            shape = (up.shape[0], *down.shape[1:])
        case LowRank(down, up, mid=None):
            shape = (down.shape[1], up.shape[0])
        case Hadamard(w1_a, w1_b, t1=None):
            shape = (w1_a.shape[0], w1_b.shape[1])
        case Kronecker(t2=None) as found:
            first = found.w1 if found.w1 is not None else _ends(found.w1_a, found.w1_b)
            second = found.w2 if found.w2 is not None else _ends(found.w2_a, found.w2_b)
            rows, columns, *kernel = second.shape
            shape = (first.shape[0] * rows, first.shape[1] * columns, *kernel)
        case Dense(diff):
            shape = diff.shape
        case _:
            return None
    rows = shape[0] if change.rows is None else change.rows[1] - change.rows[0]
    if change.axis == "in" and change.magnitude is not None and len(shape) == 2:
        columns = len(change.magnitude)  # a matrix may have a kernel in it
        shape = (rows, columns, shape[1] // columns)
    return torch.ones(rows, *shape[1:], dtype=torch.float64)


def _ends(a: Tensor | None, b: Tensor | None) -> Tensor:
    """Something of the shape of a @ b."""
    assert a is not None and b is not None
    return torch.empty(a.shape[0], b.shape[1], device="meta")


CASES = [
    Case("files.read", samples.assorted, files.read),
    Case("outline", samples.assorted, outline),
    Case("native", samples.fastlora_lora, lambda path: native.unpack(*files.read(path), str(path))),
    Case("fastlora lora", samples.fastlora_lora, adapter),
    Case("fastlora svdiff", samples.fastlora_svdiff, adapter),
    Case("peft", samples.peft_dora, adapter),
    Case("diffusers", samples.diffusers_styles, adapter),
    Case("kohya", samples.kohya_lora, adapter),
    Case("kohya flux", samples.kohya_flux, adapter),
    Case("lycoris", samples.lycoris, adapter),
]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


@every_case
def test_truncated_at_every_byte(tmp_path: Path, case: Case) -> None:
    data, path = case.sample(), tmp_path / "a.safetensors"
    path.write_bytes(data)
    case.reader(path)
    assert survive(case.reader, truncations(data), path) == {"refused": len(data)}


@every_case
def test_mutants(tmp_path: Path, case: Case) -> None:
    data, count = case.sample(), -(-MUTANTS // len(CASES))
    outcomes = survive(case.reader, mutants(data, 0, count), tmp_path / "a.safetensors")
    # Enough of them get past each check for the next one to be tried.
    assert outcomes.total() == count and min(outcomes.values()) > count / 50, outcomes


def test_mutants_of_a_seed_are_the_same() -> None:
    data = samples.assorted()
    first, again, other = (list(mutants(data, seed, 60)) for seed in (0, 0, 1))
    assert first == again and first != other
    assert len({mutant.data for mutant in first} | {data}) > 50


@pytest.mark.parametrize(
    "error", [KeyError("a"), RecursionError(), FormatError("another file")], ids=repr
)
def test_what_a_reader_does_wrong_is_seen(tmp_path: Path, error: Exception) -> None:
    def reader(path: Path) -> None:
        raise error

    with pytest.raises(AssertionError, match="change_bytes 0-0: "):
        survive(reader, mutants(samples.assorted(), 0, 1), tmp_path / "a.safetensors")


# Headers of any structure: valid ones of which parts have been replaced by any JSON.
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
SHAPES = st.lists(st.integers(0, 3), max_size=3)
NUMBERS = st.integers(-1, 20) | st.sampled_from([2**31, 2**62, 2**63, 2**64])
KEYS = st.text(max_size=4)
BROKEN = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*header.DTYPES, "F4", "F6_E2M3", "f32"]) | JUNK,
        "shape": st.lists(NUMBERS, max_size=4) | JUNK,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JUNK,
    },
    optional={"device": JUNK},
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, int]:
    """A header's text and the number of bytes after it."""
    content: dict[str, Any] = {}
    end = 0
    for key in draw(st.lists(KEYS, max_size=4, unique=True)):
        name, shape = draw(st.sampled_from(list(header.DTYPES))), draw(SHAPES)
        size = torch.Size(shape).numel() * header.DTYPES[name].itemsize
        content[key] = {"dtype": name, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    for key, value in draw(st.dictionaries(KEYS, BROKEN | JUNK, max_size=1)).items():
        content[key] = value
    if draw(st.booleans()):
        content["__metadata__"] = draw(st.dictionaries(KEYS, KEYS, max_size=2) | JUNK)
    order = draw(st.permutations(list(content)))
    text = json.dumps({key: content[key] for key in order}, indent=draw(st.sampled_from([None, 1])))
    spaces = draw(st.sampled_from(["", "", "   ", "\n"]))
    return text + spaces, max(end + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 8])), 0)


# What the library reads and we do not, and for which reason.
STRICTER = "nothing else|expected '{', got 'null|got 'F4'|shape that fits|expected booleans"


@settings(
    max_examples=600,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(file=headers())
def test_any_header_means_what_the_library_says(tmp_path: Path, file: tuple[str, int]) -> None:
    text, size = file
    path = tmp_path / "a.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(join(text.encode(), b"\0" * size))
    theirs = of_library(path)
    try:
        tensors, metadata = files.read(path)
    except FormatError as error:
        assert theirs is None or re.search(STRICTER, str(error)), error
        return
    assert theirs is not None, "the library refuses it"
    assert metadata == theirs[1] and tensors.keys() == theirs[0].keys()
    for key, tensor in tensors.items():
        other = theirs[0][key]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), key


def of_library(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except Exception:  # of several kinds
        return None
