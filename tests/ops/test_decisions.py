"""The cost model of `lora_linear`: what it decides, and that its numbers are what they say."""

import pytest
import torch

from bench import decisions
from fastlora import ops
from fastlora.ops import _routes
from fastlora.ops._define import kernels
from tests.cases import linear_arguments


def test_decisions_are_those_in_the_table():
    """`python -m bench.decisions > bench/decisions.txt` after a change that is meant."""
    assert decisions.table() == decisions.TABLE.read_text()


def test_floors_and_products_by_hand():
    """8192 tokens, 320 -> 2560, rank 16 on an H100: 132 x 6 TFLOP/s, 3 TB/s, 2.7 us a launch."""
    m, k, n, r = 8192, 320, 2560, 16
    plain, products, *_ = kernels.predict_lora_linear(m, k, n, r, 90, 132)
    arithmetic, traffic = 2 * m * k * n / (132 * 6e12), 2 * (m * k + k * n + m * n) / 3.0e12
    assert plain == pytest.approx(max(arithmetic, traffic) + 2.7e-6)
    skinny = max(2 * m * k * r / (132 * 6e12), 2 * m * k / 3.0e12)
    update = 2 * 2 * m * n / 3.0e12  # y is read and written
    gate = 2 * 2 * m * r / 3.0e12
    assert products == pytest.approx(plain + skinny + gate + update + 3 * 2.7e-6)


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


FAST = {"extended": 3.0, "appended": 4.0, "products": 5.0}


@pytest.mark.emulated
@pytest.mark.parametrize("fastest", list(FAST))
def test_the_plan_on_cuda_is_the_minimum_of_the_predictions(monkeypatch, fastest):
    args = linear_arguments((4, 16), 64, 64, 8, dtype=torch.bfloat16)
    times = {**FAST, fastest: 1.0}
    order = [times[name] for name in ("products", "extended", "appended")]
    monkeypatch.setattr(kernels, "predict_lora_linear", lambda *_: (0.5, *order))
    with ops.emulated():
        name, plan = _routes.chosen(*args)
        assert name == fastest and plan is not None
        assert set(_routes.routes(*args)) == {"tiled", *FAST}


@pytest.mark.emulated
def test_where_tensor_cores_are_not_for():
    x, weight, bias, down, up, gate, m = linear_arguments((4, 16), 64, 64, 8, torch.bfloat16)
    turned = weight.t().contiguous().t()
    many = linear_arguments((4, 16), 64, 64, 33, dtype=torch.bfloat16)
    wide = linear_arguments((4, 16), 64, 64, 8)
    large = linear_arguments((2, 600), 96, 80, 8)
    with ops.emulated():
        assert "appended" not in _routes.routes(*many) and "extended" in _routes.routes(*many)
        assert set(_routes.routes(*wide)) == {"tiled", "products"}
        assert _routes.chosen(*wide)[0] == "tiled"
        assert _routes.chosen(x, turned, bias, down, up, gate, m)[0] == "tiled"
        assert _routes.chosen(*large)[0] == "products"


# --- on the CPU -----------------------------------------------------------------------------------

CPU_ROUTES = ("loop", "around", "products")


@pytest.mark.parametrize("fastest", CPU_ROUTES)
def test_the_plan_on_the_cpu_is_the_minimum_of_the_predictions(monkeypatch, fastest):
    args = linear_arguments((40,), 64, 48, 8)
    times = {"plain": 0.1, **dict.fromkeys(CPU_ROUTES, 2.0), fastest: 1.0}
    monkeypatch.setattr(kernels, "predict_lora_linear_cpu", lambda *_: dict(times))
    name, plan = _routes.chosen(*args)
    assert name == fastest and plan is _routes.routes(*args)[fastest]


def test_products_on_the_cpu_by_hand():
    """512 tokens, 1280 -> 640, rank 16, float32, two threads; the constants of heuristics.h."""
    m, k, n, r = 512, 1280, 640, 16
    times = kernels.predict_lora_linear_cpu(m, k, n, r, 0, 2, 2)

    def library(m, k, n):
        return 3e-6 + 110e-12 * k * n + 2 * m * k * n / (2 * 98e9)

    assert times["plain"] == pytest.approx(library(m, k, n))
    update = 3e-6 + 4 * 2 * m * n / (2 * 12e9)
    expected = library(m, k, n) + library(m, k, r) + library(m, r, n) + update
    assert times["products"] == pytest.approx(expected)
    inputs = (k + r + 44) * n + (k + 44) * r
    assert times["loop"] == pytest.approx(3e-6 + m / 4 * 77e-12 * inputs / 2)


@pytest.mark.parametrize("isa", _routes.ISAS.values(), ids=list(_routes.ISAS))
@pytest.mark.parametrize("dtype", _routes.DTYPES.values(), ids=map(str, _routes.DTYPES))
def test_more_work_never_takes_a_cpu_less_time(dtype, isa):
    for shape in ((2, 1280, 320, 16), (154, 768, 640, 64), (8192, 320, 320, 4)):
        start = kernels.predict_lora_linear_cpu(*shape, dtype, isa, 2)
        assert min(start.values()) > 0 and start["products"] > start["plain"]
        for i in range(4):
            more = [2 * n if i == j else n for j, n in enumerate(shape)]
            times = kernels.predict_lora_linear_cpu(*more, dtype, isa, 2)
            assert all(times[name] >= 0.999 * start[name] for name in start), (shape, i)
        slower = kernels.predict_lora_linear_cpu(*shape, dtype, 0, 2)
        assert slower["loop"] >= start["loop"]


def test_what_the_loop_does_not_read_goes_to_the_library():
    args = linear_arguments((40,), 64, 48, 8)
    args[1] = args[1].t().contiguous().t()  # as a backward pass reads W
    assert set(_routes.routes(*args)) == {"around", "products"}
    empty = linear_arguments((0,), 64, 48, 8)
    assert set(_routes.routes(*empty)) == {"products"}
