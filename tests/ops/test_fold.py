import os
import subprocess
import sys

import pytest
import torch

from fastlora import ops
from tests.cases import DTYPES, assert_twofold, identify, randn, strided, wide, widened

op = ops.fold
LAYERS = [(1, 1, 1), (5, 7, 2), (8, 16, 4), (33, 65, 3), (0, 4, 2), (4, 0, 2), (6, 9, 0), (130, 257, 16), (40, 48, 70)]


def arguments(dtype=torch.float32, layers=LAYERS, low_rank=None):
    low_rank = low_rank or dtype
    weights = [randn(o, i, dtype=dtype, seed=1) for o, i, _ in layers]
    downs = [randn(r, i, dtype=low_rank, seed=2) for _, i, r in layers]
    ups = [randn(o, r, dtype=low_rank, seed=3) for o, _, r in layers]
    gates = [randn(r, dtype=wide(dtype), seed=4) for *_, r in layers]
    return [weights, downs, ups, gates, [torch.full_like(w, torch.nan) for w in weights]]


def by_hand(weights, downs, ups, gates, outs):
    return [
        w + torch.einsum("nr,r,rk->nk", u, g, d)
        for w, d, u, g in zip(weights, downs, ups, gates, strict=True)
    ]


def check(args, low_args=None):
    exact = by_hand(*widened(args))
    low_args = low_args or args
    low = [torch.empty_like(o) for o in args[4]]
    op.reference(*low_args[:4], low)
    pristine = [w.clone() for w in args[0]]
    op(*args)
    for out, e, p, w, before in zip(args[4], exact, low, args[0], pristine, strict=True):
        assert_twofold(out, e, p)
        assert torch.equal(w, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_a_model_of_odd_layers_against_float64(dtype):
    check(arguments(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=identify)
def test_float32_adapters_on_a_low_precision_base(dtype):
    check(arguments(dtype, low_rank=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_strided_everything(dtype):
    args = arguments(dtype, [(33, 65, 3), (8, 16, 4)])
    check([[strided(t) for t in group] for group in args], args)
    transposed = [[t.t().contiguous().t() if t.dim() == 2 else t for t in g] for g in args]
    check(transposed, args)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=identify)
def test_rounds_once(dtype):
    """Equal to the float64 result rounded once, but for ties that float32 sums decide."""
    args = arguments(dtype, [(64, 96, 8)])
    op(*args)
    once = by_hand(*widened(args))[0].to(dtype)
    assert (args[4][0] == once).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_gates_of_zero_give_the_weight_bit_for_bit(dtype):
    args = arguments(dtype)
    args[3] = [torch.zeros_like(g) for g in args[3]]
    args[1] = [torch.full_like(d, torch.inf) for d in args[1]]  # off is off, whatever it holds
    op(*args)
    for w, out in zip(args[0], args[4], strict=True):
        assert torch.equal(w, out)


def test_in_place_when_the_result_is_the_weight():
    args = arguments()
    exact = by_hand(*widened(args))
    args[4] = args[0]
    op(*args)
    for out, e in zip(args[4], exact, strict=True):
        torch.testing.assert_close(out.double(), e, rtol=1e-5, atol=1e-5)


def test_results_that_overlap_other_memory_are_refused():
    args = arguments(layers=[(8, 16, 4), (8, 16, 4)])
    args[4] = [args[4][0], args[4][0]]
    with pytest.raises(ValueError, match="fold: outs"):
        op(*args)


def test_versions_rise_and_gradients_are_not_recorded():
    args = arguments(layers=[(8, 16, 4)])
    args[1][0].requires_grad_()
    version = args[4][0]._version
    op(*args)
    assert args[4][0]._version > version
    assert not args[4][0].requires_grad
    torch.testing.assert_close(args[4][0].double(), by_hand(*widened(args))[0].detach(), rtol=1e-5, atol=1e-5)


def test_nothing_to_fold():
    assert op([], [], [], [], []) is None


def test_opcheck():
    torch.library.opcheck(op.overload, tuple(arguments(layers=[(8, 16, 4), (5, 7, 2)])))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    code = """
from fastlora.ops._define import kernels
from tests.cases import DTYPES
from tests.ops.test_fold import arguments, check
for dtype in DTYPES:
    check(arguments(dtype))
print(kernels.build_info()["cpu_isa"])
"""
    environment = {**os.environ, "FASTLORA_CPU_ISA": isa, "PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    if run.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}; {run.stdout.strip()} ran")


BROKEN = {
    "count": (1, lambda g: g[:-1], "downs: expected a list of 2 tensors"),
    "down shape": (1, lambda g: [g[0], g[1][:, :-1]], "downs[1]: expected float32 [2, 7]"),
    "up dtype": (2, lambda g: [g[0].half(), g[1]], "ups[0]: expected float32 [8, 4], got float16"),
    "gate rows": (3, lambda g: [g[0].expand(3, 4), g[1]], "gates[0]: expected [rank]; a strength"),
    "out shape": (4, lambda g: [g[0], g[1][:-1]], "outs[1]: expected float32 [5, 7]"),
    "weight dims": (0, lambda g: [g[0], g[1][0]], "weights[1]: expected [out, in]"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_contract_changes_nothing(case):
    args = arguments(layers=[(8, 16, 4), (5, 7, 2)])
    index, change, message = BROKEN[case]
    args[index] = change(args[index])
    with pytest.raises(ops.ContractError) as caught:
        op(*args)
    assert str(caught.value).startswith("fold: ") and message in str(caught.value)
    assert all(out.isnan().all() for out in args[4])
