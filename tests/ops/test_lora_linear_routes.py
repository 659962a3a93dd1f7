"""Every route of `lora_linear` on the CPU by itself, whatever the plan would choose."""

import os
import subprocess
import sys

import pytest
import torch

from fastlora import ops
from fastlora.ops import _routes
from fastlora.ops._define import kernels
from tests.cases import DTYPES, assert_twofold, identify, linear_arguments, strided, widened

ROUTES = ("loop", "around", "products")
each_route = pytest.mark.parametrize("route", ROUTES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=identify)


def run(route, args):
    """Through a dispatcher, because the loop's plan is a native one."""
    plan = _routes.routes(*args)[route]
    return kernels.make_dispatcher(lambda *_: plan, None, None, True)[1](*args)


def check(route, args):
    y = run(route, args)
    exact = ops.lora_linear.reference(*widened(args))
    assert_twofold(y, exact, ops.lora_linear.reference(*args))
    assert torch.equal(y, run(route, args))  # two runs, the same bits
    return y


@each_route
@each_dtype
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 17, 31, 33, 130, 1100])
def test_tails_of_tokens(tokens, dtype, route):
    """More than eight blocks for two threads are 1100."""
    check(route, linear_arguments((tokens,), 40, 56, 16, dtype))
    check(route, linear_arguments((tokens,), 37, 51, 5, dtype, bias=False, scale=True))


@each_route
@each_dtype
@pytest.mark.parametrize("rank", [1, 3, 16, 17, 64, 200, 1024])
def test_ranks(rank, dtype, route):
    for tokens in (3, 21):
        args = linear_arguments((2, tokens), 48, 33, rank, dtype, rows=True)
        if route == "around" and rank > _routes.PASS_RANK:
            assert route not in _routes.routes(*args)
        else:
            check(route, args)


@each_route
@each_dtype
@pytest.mark.parametrize(
    "size", [(2600, 9), (1, 1), (1, 40), (40, 1), (7, 129), (321, 15), (1283, 641)], ids=identify
)
def test_inputs_and_outputs(size, dtype, route):
    features, out = size
    for scale, bias in ((True, True), (True, False), (False, True), (False, False)):
        check(route, linear_arguments((6,), features, out, 4, dtype, scale=scale, bias=bias))


@each_route
@each_dtype
def test_strided_arguments(dtype, route):
    """Gaps between rows, between elements, a slice of a wider gate, factors in float32."""
    args = linear_arguments((3, 11), 40, 24, 8, dtype, rows=True, scale=True)
    exact, low = ops.lora_linear.reference(*widened(args)), ops.lora_linear.reference(*args)
    x, weight, bias, down, up, gate, scale = args
    wider = torch.cat([weight, weight], 1)[:, :40]
    gates = torch.cat([gate, gate], 1)[:, :8]
    assert not wider.is_contiguous() and not gates.is_contiguous()
    views = [strided(x), wider, strided(bias), down, up, gates, strided(scale)]
    assert_twofold(run(route, views), exact, low)
    if dtype.itemsize == 2:
        mixed = [x, weight, bias, down.float(), up.float(), gate, scale.float()]
        assert_twofold(run(route, mixed), exact, low)
        assert_twofold(run(route, [*mixed[:3], down, *mixed[4:]]), exact, low)


@each_dtype
@pytest.mark.parametrize("features", [77, 2085])
@pytest.mark.parametrize("tokens", [1, 2, 3, 70, 600])
def test_a_sample_alone_is_what_it_is_in_a_batch_in_the_loop(tokens, features, dtype):
    """Whatever tile, block or thread its tokens fall to; with inputs cut into pieces, too."""
    args = linear_arguments((3, tokens), features, 130, 19, dtype, rows=True, scale=True)
    y = run("loop", args)
    for i in range(3):
        alone = [args[0][i : i + 1], *args[1:5], args[5][i : i + 1], args[6]]
        assert torch.equal(run("loop", alone)[0], y[i])


@each_dtype
def test_the_loop_gives_the_same_bits_for_any_number_of_threads(dtype):
    args = linear_arguments((50,), 640, 321, 16, dtype)
    results = []
    for threads in (1, 2, 3):  # the fixture `fixed_seed` sets them back
        torch.set_num_threads(threads)
        results.append(run("loop", args))
    assert all(torch.equal(results[0], r) for r in results)


def test_a_gate_of_zeros_leaves_the_plain_layer():
    args = linear_arguments((5,), 64, 48, 4)
    args[5] = torch.zeros(4)
    plain = [*args[:3], args[3][:0], args[4][:, :0], args[5][:0], None]
    assert torch.equal(run("loop", args), run("loop", plain))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_and_nans_pass_through(value):
    args = linear_arguments((5,), 33, 20, 4)
    args[0][2, 32] = value
    y = run("loop", args)
    assert not y[2].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    code = """
import itertools, torch
from fastlora.ops._define import kernels
from tests.cases import DTYPES, linear_arguments
from tests.ops.test_lora_linear_routes import check
for dtype, tokens in itertools.product(DTYPES, (1, 2, 3, 7, 70)):
    for features, out, rank in ((33, 17, 3), (64, 48, 16), (1, 2, 1)):
        check("loop", linear_arguments((2, tokens), features, out, rank, dtype, True, True, True))
print(kernels.build_info()["cpu_isa"])
"""
    environment = {**os.environ, "FASTLORA_CPU_ISA": isa, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}; {done.stdout.strip()} ran")


def test_the_loop_refuses_what_it_would_read_wrongly():
    x, weight, bias, down, up, gate, _ = linear_arguments((5,), 8, 8, 4)
    y, turned = torch.empty(5, 8), weight.t().contiguous().t()
    with pytest.raises(ValueError, match="weight: expected a matrix whose rows are contiguous"):
        kernels.lora_linear(y, x, turned, bias, down, up, gate, None, None, 0)
    with pytest.raises(ValueError, match="bias: expected a contiguous tensor"):
        kernels.lora_linear(y, x, weight, strided(bias), down, up, gate, None, None, 0)
    with pytest.raises(ValueError, match="y: expected a contiguous tensor"):
        kernels.lora_linear(y.t().contiguous().t(), x, weight, bias, down, up, gate, None, None, 0)


@pytest.mark.parametrize("rows", [False, True], ids=["gate", "gate-rows"])
def test_no_rank_is_the_plain_layer(rows):
    x, weight, bias, down, up, gate, _ = linear_arguments((2, 3), 8, 4, 0, rows=rows)
    expected = torch.nn.functional.linear(x, weight, bias)
    for strided_weight in (False, True):
        w = strided(weight) if strided_weight else weight
        y = ops.lora_linear(x, w, bias, down, up, gate)
        torch.testing.assert_close(y, expected)
        trained = down.clone().requires_grad_()
        inner = x.clone().requires_grad_()
        ops.lora_linear(inner, w, bias, trained, up, gate).sum().backward()
        torch.testing.assert_close(inner.grad, weight.sum(0).expand(2, 3, 8))
        assert trained.grad.shape == (0, 8)
