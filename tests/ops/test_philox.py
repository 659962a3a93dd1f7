"""The reference noise: known answers, an independent reading of the layout, and its statistics."""

import math

import pytest
import torch
from scipy import stats

from fastlora.ops import _philox


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(v) for v in values)


# The known answers published with the Random123 library (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("0" * 32, "0" * 16, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("f" * 32, "f" * 16, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a8885a308d313198a2e03707344",
            "a4093822299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, answer):
    def split(text):
        return words(*(int(text[i : i + 8], 16) for i in range(0, len(text), 8)))

    out = _philox.philox4x32(split(counter), split(key))
    assert [int(w) for w in out] == [int(w, 16) for w in answer.split()]


def by_hand(seed: int, step: int, element: int) -> float:
    """One normal with Python's unbounded integers and math, from the words of the paper."""
    low = 2**32 - 1
    seed, step, block = seed % 2**64, step % 2**64, element // 4
    c = [block & low, block >> 32, step & low, step >> 32]
    k = [seed & low, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & low, (p0 >> 32) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    r, turn = c[element % 4 // 2 * 2 : element % 4 // 2 * 2 + 2]
    u = ((r >> 1) + 0.5) / 2**31  # to within float32's rounding
    angle = 2 * math.pi * turn / 2**32
    return math.sqrt(-2 * math.log(u)) * (math.sin(angle) if element % 2 else math.cos(angle))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("step", [0, 49, _philox.START, 2**40])
def test_layout(seed, step):
    z = _philox.normal(torch.tensor([7, seed]), step, 11, torch.float64)[1]
    expected = [by_hand(seed, step, element) for element in range(11)]
    # u is rounded to float32, which matters most where log u is smallest
    torch.testing.assert_close(z, torch.tensor(expected).double(), rtol=0, atol=2e-4)


def test_statistics():
    z = _philox.normal(torch.tensor([3]), 5, 1 << 20, torch.float64)[0]
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    n = z.numel()
    for moment, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**moment).mean() - expected) < 4 * math.sqrt(variance / n)
    assert 4.5 < z.abs().max() < 6.7


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64])
def test_elements_are_uncorrelated(lag):
    z = _philox.normal(torch.tensor([11]), 0, 1 << 20, torch.float64)[0]
    assert abs((z[lag:] * z[:-lag]).mean()) < 4 / math.sqrt(z.numel())


def test_seeds_and_steps_are_independent_streams():
    n = 1 << 16
    rows = [
        _philox.normal(torch.tensor([seed]), step, n, torch.float64)[0]
        for seed, step in ((0, 0), (1, 0), (0, 1), (1, 1), (0, -1), (2**32, 0), (0, 2**32))
    ]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert correlation.abs().max() < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("numel", [0, 1, 2, 3, 4, 5, 1023])
def test_a_longer_sample_begins_like_a_shorter_one(numel):
    z = _philox.normal(torch.tensor([1, 2]), 0, numel, torch.float32)
    assert z.shape == (2, numel)
    assert torch.equal(z, _philox.normal(torch.tensor([1, 2]), 0, 1024, torch.float32)[:, :numel])
