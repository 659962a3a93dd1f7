"""Arguments of wrong types: errors that name the argument, what was expected and what came."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastlora import Schedule, ddim, sample
from fastlora.samplers import noise, sample_steps
from fastlora.samplers.arguments import integer, number


@pytest.mark.parametrize(
    "value",
    [2, 2.0, True + 1, np.float32(2), np.int8(2), Fraction(2), torch.tensor([2.0])],
    ids=repr,
)
def test_number(value):
    assert number(value) == 2.0


@pytest.mark.parametrize("value", [None, "2", [2], 2j, torch.ones(2), 10**400, math.nan], ids=str)
def test_no_number(value):
    assert math.isnan(number(value))


@pytest.mark.parametrize("value", [2, np.uint8(2), torch.tensor(2)], ids=repr)
def test_integer(value):
    assert integer(value) == 2 and type(integer(value)) is int


@pytest.mark.parametrize("value", [None, "2", 2.0, True, torch.tensor(2.0), [2]], ids=repr)
def test_no_integer(value):
    assert integer(value) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": None}, r"table: expected a Table, as ddim\(...\) makes, got None"),
        ({"table": Schedule.cosine()}, r"table: expected a Table, .* got a Schedule"),
        ({"model": None}, "model: expected a module or a function, got None"),
    ],
    ids=["no-table", "schedule", "no-model"],
)
@pytest.mark.parametrize("run", [sample, sample_steps], ids=["sample", "steps"])
def test_wrong_types(run, change, message):
    options = {
        "model": lambda x, t, cond: x,
        "table": ddim(Schedule.cosine(), 3),
        "x": noise([1], (2, 3)),
    }
    with pytest.raises(TypeError, match=f"^sample: {message}"):
        run(**options | change)


@pytest.mark.parametrize(
    ("error", "seeds", "shape", "message"),
    [
        (TypeError, [1], 5, "shape: expected the sizes of one sample, got 5"),
        (TypeError, [1], None, "shape: expected the sizes of one sample, got None"),
        (ValueError, [1], (2, 0.5), r"shape: expected ints >= 0, got \(2, 0.5\)"),
        (ValueError, [1], (2, -1), r"shape: expected ints >= 0, got \(2, -1\)"),
        (ValueError, [1], "ab", "shape: expected ints >= 0, got 'ab'"),
        (TypeError, 7, (2,), "seeds: expected int64 numbers, one per sample, got 7"),
        (TypeError, None, (2,), "seeds: expected int64 numbers, one per sample, got None"),
        (TypeError, torch.tensor(7), (2,), r"seeds: expected int64 .*, got tensor\(7\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_noise(error, seeds, shape, message):
    with pytest.raises(error, match=f"^noise: {message}$"):
        noise(seeds, shape)


def test_sizes_of_noise_may_come_from_numpy_or_torch():
    expected = noise([1], (2, 3))
    assert torch.equal(noise([1], np.array([2, 3])), expected)
    assert torch.equal(noise([1], expected.shape[1:]), expected)
