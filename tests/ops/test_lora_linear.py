import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from fastlora import ops
from tests.cases import (
    DTYPES,
    LINEAR_SHAPES,
    assert_twofold,
    identify,
    linear_arguments,
    randn,
    strided,
    widened,
)
from tests.devices import on_devices

op = ops.lora_linear


def by_hand(x, weight, bias, down, up, gate, row_scale):
    """The formula by einsum in float64, not by the operator's reference."""
    g = gate if gate.dim() == 2 else gate.expand(x.shape[0], -1)
    h = torch.einsum("b...k,rk,br->b...r", x, down, g)
    y = torch.einsum("b...k,nk->b...n", x, weight) + torch.einsum("b...r,nr->b...n", h, up)
    y = y if row_scale is None else y * row_scale
    return y if bias is None else y + bias


@on_devices
@pytest.mark.parametrize("rows", [False, True], ids=["gate", "gate-rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=identify)
def test_against_float64(shape, dtype, rows):
    for bias, scale in ((True, False), (False, False), (True, True), (False, True)):
        args = linear_arguments(*shape, dtype=dtype, rows=rows, bias=bias, scale=scale)
        y = op(*args)
        assert y.dtype == dtype
        assert_twofold(y, by_hand(*widened(args)), op.reference(*args))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("shape", [((2, 3), 8, 8, 4), ((2, 65), 129, 151, 5)], ids=identify)
def test_strided_inputs(shape, dtype):
    args = linear_arguments(*shape, dtype=dtype, rows=True, scale=True)
    views = [strided(a) for a in args]
    assert not any(v.is_contiguous() for v in views if v.numel() > 1)
    assert_twofold(op(*views), by_hand(*widened(args)), op.reference(*args))
    transposed = [args[0], args[1].t().contiguous().t(), *args[2:]]
    assert_twofold(op(*transposed), by_hand(*widened(args)), op.reference(*args))


@on_devices
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.parametrize("tokens", [2, 300])
def test_float32_adapter_on_a_low_precision_base(low, tokens):
    args = linear_arguments((2, tokens), 24, 12, 4, dtype=low, scale=True)
    mixed = [*args[:3], args[3].float(), args[4].float(), args[5], args[6].float()]
    y = op(*mixed)
    assert y.dtype == low
    assert_twofold(y, by_hand(*widened(args)), op.reference(*args))


def test_all_gates_zero_is_the_base_by_library_products():
    args = linear_arguments((2, 400), 64, 48, 4)  # too large for the loop
    args[5] = torch.zeros(4)
    assert torch.equal(op(*args), F.linear(args[0], args[1], args[2]))


def test_sample_alone_equals_the_sample_in_a_batch_in_the_loop():
    args = linear_arguments((3, 2), 9, 7, 4, rows=True)
    y = op(*args)
    for i in range(3):
        alone = op(args[0][i : i + 1], *args[1:5], args[5][i : i + 1], args[6])
        assert torch.equal(alone[0], y[i])


@pytest.mark.parametrize("rows", [False, True], ids=["gate", "gate-rows"])
@pytest.mark.parametrize("scale", [False, True], ids=["", "row_scale"])
def test_gradcheck(rows, scale):
    args = linear_arguments((2, 3), 5, 4, 3, dtype=torch.float64, rows=rows, scale=scale)
    assert gradcheck(op, [a if a is None else a.requires_grad_() for a in args])


@on_devices
@pytest.mark.parametrize("shape", [((5,), 3, 4, 2), ((2, 0), 4, 3, 2)], ids=identify)
def test_gradients_of_other_shapes(shape):
    args = [a.requires_grad_() for a in linear_arguments(*shape, torch.float64, scale=True)]
    ours = torch.autograd.grad(op(*args).sum(), args)
    exact = torch.autograd.grad(by_hand(*args).sum(), args)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)


@on_devices
def test_gradients_survive_a_change_of_the_gate():
    args = linear_arguments((2, 3), 5, 4, 3, dtype=torch.float64)
    leaves = [a.requires_grad_() for a in args[:5] if a is not None]
    y = op(*args)
    expected = torch.autograd.grad(by_hand(*args).square().sum(), leaves)
    with torch.no_grad():
        args[5].zero_()
    for a, b in zip(torch.autograd.grad(y.square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@on_devices
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=identify)
def test_gradients_in_low_precision(low):
    args = linear_arguments((2, 40), 24, 12, 4, dtype=low)
    probe = randn(2, 40, 12, dtype=low, seed=9)
    mixed = [*args[:3], args[3].float(), args[4].float(), args[5], None]
    grads = {}
    for name, run, values in (
        ("ours", op, mixed),
        ("low", op.reference, mixed),
        ("exact", by_hand, widened(mixed)),
    ):
        leaves = [a.detach().requires_grad_() for a in values[:6]]
        y = run(*leaves, None)
        grads[name] = torch.autograd.grad((y * probe.to(y.dtype)).sum(), leaves)
    for i, (ours, plain, exact) in enumerate(zip(*grads.values(), strict=True)):
        assert ours.dtype == mixed[i].dtype
        # gradients pass through x's dtype, so its rounding is what counts
        error = (ours.double() - exact).abs().max()
        rounding = torch.finfo(low).eps / 2 * exact.abs().max()
        assert error <= 2 * max((plain.double() - exact).abs().max(), rounding)


def test_opcheck():
    for args in (
        linear_arguments((2, 3), 5, 4, 3, rows=True, scale=True),
        linear_arguments((2, 70), 40, 30, 3),
    ):
        args = [a if a is None else a.requires_grad_() for a in args]
        torch.library.opcheck(op.overload, tuple(args))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_compile_fullgraph():
    args = linear_arguments((2, 6), 8, 8, 4)
    compiled = torch.compile(lambda *a: op(*a) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(*args), op(*args) * 2)


def test_autocast_computes_in_its_dtype():
    args = linear_arguments((2, 3), 8, 8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(*args)
    assert y.dtype == torch.bfloat16
    low = [a if a is None or a is args[5] else a.bfloat16() for a in args]
    assert_twofold(y, by_hand(*widened(low)), op.reference(*low))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """In a process of its own: the choice is made once."""
    code = """
import torch
from fastlora import ops
from fastlora.ops._define import kernels
from tests.cases import DTYPES, LINEAR_SHAPES, assert_twofold, linear_arguments, widened
for dtype in DTYPES:
    for shape in LINEAR_SHAPES:
        args = linear_arguments(*shape, dtype=dtype, rows=True, scale=True)
        exact = ops.lora_linear.reference(*widened(args))
        assert_twofold(ops.lora_linear(*args), exact, ops.lora_linear.reference(*args))
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
    "x features": (0, lambda a: a[..., :-1].contiguous(), "x: expected"),
    "x dtype": (0, lambda a: a.long(), "x"),
    "weight dims": (1, lambda a: a[0], "weight: expected"),
    "weight dtype": (1, lambda a: a.double(), "weight: expected torch.float32, got float64"),
    "bias length": (2, lambda a: a[:-1], "bias: expected [8], got float32 [7]"),
    "down shape": (3, lambda a: a.t().contiguous(), "down: expected"),
    "up rank": (4, lambda a: a[:, :-1].contiguous(), "up: expected [8, 4], got float32 [8, 3]"),
    "gate dtype": (5, lambda a: a.half(), "gate: expected torch.float32, got float16"),
    "gate rank": (5, lambda a: a[:-1], "gate: expected [4] or [batch, 4], got float32 [3]"),
    "gate batch": (5, lambda a: a.expand(3, 4), "gate: expected [2, 4], got float32 [3, 4]"),
    "row_scale": (6, lambda a: torch.ones(3), "row_scale: expected [8], got float32 [3]"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_contract_is_an_error_that_names_it(case):
    args = linear_arguments((2, 3), 6, 8, 4)
    index, change, message = BROKEN[case]
    args[index] = change(args[index])
    for run in (op, op.overload):
        with pytest.raises(ops.ContractError) as caught:
            run(*args)
        assert str(caught.value).startswith("lora_linear: ") and message in str(caught.value)


def test_wrong_types_and_counts():
    args = linear_arguments((2, 3), 6, 8, 4)
    with pytest.raises(TypeError, match="down: expected a tensor, got NoneType"):
        op(*args[:3], None, *args[4:])
    with pytest.raises(TypeError, match="missing argument 'gate'"):
        op(*args[:5])
    with pytest.raises(TypeError, match="unexpected or repeated argument 'gates'"):
        op(*args, gates=1)
    torch.testing.assert_close(op(*args[:5], gate=args[5]), op(*args))
