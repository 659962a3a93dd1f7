"""The cost model of `lora_linear`: what it decides, and that its numbers are what they say."""

import sys

import pytest
import torch

from bench import decisions
from fastlora import ops
from fastlora.ops._define import kernels
from tests.cases import linear_arguments

module = sys.modules["fastlora.ops.lora_linear"]


def test_decisions_are_those_in_the_table():
    """`python -m bench.decisions > bench/decisions.txt` after a change that is meant."""
    assert decisions.table() == decisions.TABLE.read_text()


def test_floors_and_products_by_hand():
    """8192 tokens, 320 -> 2560, rank 16 on an H200: 132 x 6 TFLOP/s, 4.3 TB/s, 1 us a launch."""
    m, k, n, r = 8192, 320, 2560, 16
    plain, products, *_ = kernels.predict_lora_linear(m, k, n, r, 90, 132)
    arithmetic, traffic = 2 * m * k * n / (132 * 6e12), 2 * (m * k + k * n + m * n) / 4.3e12
    assert plain == pytest.approx(max(arithmetic, traffic) + 1e-6)
    skinny = max(2 * m * k * r / (132 * 6e12), 2 * m * k / 4.3e12)
    update = 2 * 2 * m * n / 4.3e12  # y is read and written
    gate = 2 * 2 * m * r / 4.3e12
    assert products == pytest.approx(plain + skinny + gate + update + 3e-6)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("shape", [(8192, 320, 320, 16), (2, 1280, 320, 64), (512, 1280, 1280, 4)])
def test_more_work_never_takes_the_library_less_time(shape, capability):
    tokens, features, out, rank = shape
    start = kernels.predict_lora_linear(*shape, capability, 100)
    assert min(start) > 0 and start[1] > start[0]
    for more in (
        (2 * tokens, features, out, rank),
        (tokens, 2 * features, out, rank),
        (tokens, features, 2 * out, rank),
        (tokens, features, out, 2 * rank),
    ):
        times = kernels.predict_lora_linear(*more, capability, 100)
        assert all(a >= b * 0.999 for a, b in zip(times[:2], start[:2], strict=True))


def test_the_plan_follows_the_prediction(monkeypatch):
    x, weight, _, down, up, *_ = linear_arguments((4, 16), 64, 64, 8, dtype=torch.bfloat16)
    for times, form in (
        ((1, 2, 3, 4), None),
        ((1, 9, 3, 4), module.EXTENDED),
        ((1, 9, 5, 4), module.APPENDED),
    ):
        monkeypatch.setattr(kernels, "predict_lora_linear", lambda *_, t=times: t)
        assert module.chosen_form(x, weight, down, up, 64) == form
    many = torch.zeros(64, 33, dtype=torch.bfloat16)
    assert module.chosen_form(x, weight, many.t().contiguous(), many, 64) == module.EXTENDED
    wide = x.float(), weight.float(), down.float(), up.float()
    assert module.chosen_form(*wide, 64) == module.TILED
    turned = weight.t().contiguous().t()
    assert module.chosen_form(x, turned, down, up, 64) == module.TILED


def test_large_float32_problems_go_to_the_library():
    with ops.emulated():
        args = linear_arguments((2, 600), 96, 80, 8, dtype=torch.float32)
        assert module._plan(*args) is module._products
