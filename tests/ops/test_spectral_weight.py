import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastlora import ops
from tests.cases import DTYPES, assert_twofold, identify, randn, strided, wide, widened
from tests.devices import on_devices

op = ops.spectral_weight
SHAPES = [(1, 1), (5, 7), (7, 5), (33, 65), (8, 16), (130, 70), (0, 4), (4, 0)]


def arguments(out, features, dtype=torch.float32, factors=None):
    weight = randn(out, features, dtype=torch.float64, seed=1)
    if weight.numel():
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vh = torch.zeros(out, 0), torch.zeros(0), torch.zeros(0, features)
    factors = factors or dtype
    shift = randn(len(s), dtype=wide(dtype), seed=2)
    shift[::5] = -1e9  # components that are cut off
    strength = torch.tensor(0.7, dtype=wide(dtype))
    return [weight.to(dtype), u.to(factors), s.to(wide(dtype)), vh.to(factors), shift, strength]


def by_hand(weight, u, s, vh, shift, strength):
    change = (s + strength * shift).clamp_min(0) - s
    return weight + torch.einsum("nr,r,rk->nk", u, change, vh)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_against_float64(shape, dtype):
    args = arguments(*shape, dtype)
    assert_twofold(op(*args), by_hand(*widened(args)), op.reference(*args))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_no_shift_is_the_weight_bit_for_bit(shape, dtype):
    args = arguments(*shape, dtype)
    args[4] = torch.zeros_like(args[4])
    assert torch.equal(op(*args), args[0])
    args = arguments(*shape, dtype)
    args[5] = torch.zeros_like(args[5])
    assert torch.equal(op(*args), args[0])


@pytest.fixture
def by_products(monkeypatch):
    """As if every size were large enough for torch's matrix product."""
    module = sys.modules["fastlora.ops.spectral_weight"]
    monkeypatch.setattr(module, "LOOP", dict.fromkeys(module.LOOP, -1))
    op.clear()
    yield
    op.clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("shape", SHAPES, ids=identify)
@pytest.mark.usefixtures("by_products")
def test_by_products_against_float64(shape, dtype):
    args = arguments(*shape, dtype)
    assert_twofold(op(*args), by_hand(*widened(args)), op.reference(*args))
    still = op(*args[:4], torch.zeros_like(args[4]), args[5])
    assert torch.equal(still, args[0])
    assert not still.numel() or still.data_ptr() != args[0].data_ptr()


@on_devices
def test_no_shift_keeps_the_sign_of_zero():
    args = arguments(33, 65)
    args[0][0, 0] = -0.0
    args[4] = torch.zeros_like(args[4])
    assert op(*args)[0, 0].signbit()


def test_a_large_negative_shift_kills_its_component():
    weight, u, s, vh, _, one = arguments(9, 6, torch.float64)
    shift = torch.zeros(6, dtype=torch.float64)
    shift[0] = -1e9
    left = torch.linalg.svdvals(op(weight, u, s, vh, shift, one))
    torch.testing.assert_close(left[:-1], s[1:])
    assert left[-1] < 1e-12


def test_signs_and_order_of_the_decomposition_do_not_matter():
    weight, u, s, vh, shift, strength = arguments(9, 6, torch.float64)
    order, sign = torch.randperm(6), torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)
    u_other, vh_other = (u * sign)[:, order], (vh * sign[:, None])[order]
    other = op(weight, u_other, s[order], vh_other, shift[order], strength)
    torch.testing.assert_close(other, op(weight, u, s, vh, shift, strength))


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=identify)
def test_float32_factors_on_a_low_precision_weight(dtype):
    args = arguments(33, 20, dtype, factors=torch.float32)
    assert op(*args).dtype == dtype
    assert_twofold(op(*args), by_hand(*widened(args)), op.reference(*args))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_strided_inputs(dtype):
    args = arguments(33, 20, dtype)
    views = [strided(a) if a.dim() else a for a in args]
    assert_twofold(op(*views), by_hand(*widened(args)), op.reference(*args))


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 1)], ids=identify)
def test_gradcheck(shape):
    weight, u, s, vh, shift, strength = arguments(*shape, torch.float64)
    trained = [t.requires_grad_() for t in (weight, shift, strength)]

    def run(weight, shift, strength):
        return op(weight, u, s, vh, shift, strength)

    assert gradcheck(run, trained)
    assert gradgradcheck(run, trained)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=identify)
@pytest.mark.parametrize("shape", [(33, 65), (200, 150)], ids=identify)
def test_gradient_of_the_shift_is_a_row_dot(shape, dtype):
    """dδ_i = strength u_iᵀ G v_i where the singular value stays positive, in several tiles."""
    args = arguments(*shape, dtype)
    probe = randn(*shape, dtype=dtype, seed=7)
    args[4].requires_grad_()
    (ours,) = torch.autograd.grad(op(*args), args[4], probe)
    _, u, s, vh, shift, strength = widened(args)
    exact = strength * torch.einsum("nr,nk,rk->r", u, probe.double(), vh)
    exact = exact.detach() * (s + strength * shift > 0)
    low = strength.to(dtype) * ((probe @ args[3].t()) * args[1]).sum(0).to(dtype)
    low = low * (args[2] + args[5] * args[4].detach() > 0)
    assert_twofold(ours, exact, low.to(ours.dtype))


def test_opcheck():
    weight, u, s, vh, shift, strength = arguments(7, 5)
    torch.library.opcheck(op.overload, (weight, u, s, vh, shift.requires_grad_(), strength))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """In a process of its own: the choice is made once."""
    code = """
import torch
from fastlora.ops._define import kernels
from tests.cases import DTYPES
from tests.ops.test_spectral_weight import *
for dtype in DTYPES:
    for shape in SHAPES:
        test_against_float64(shape, dtype)
        test_no_shift_is_the_weight_bit_for_bit(shape, dtype)
test_gradient_of_the_shift_is_a_row_dot((33, 65), torch.float32)
sys.modules["fastlora.ops.spectral_weight"].LOOP.update(dict.fromkeys(DTYPES, -1))
op.clear()
for dtype in DTYPES:
    test_against_float64((33, 65), dtype)
print(kernels.build_info()["cpu_isa"])
"""
    environment = {**os.environ, "FASTLORA_CPU_ISA": isa, "PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    if run.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa}; {run.stdout.strip()} ran")


def test_opcheck_of_the_gradient():
    _, u, _, vh, _, _ = arguments(7, 5)
    torch.library.opcheck(ops.spectral_dots.overload, ([randn(7, 5)], [u], [vh]))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_compile_fullgraph_with_its_backward():
    weight, u, s, vh, shift, strength = arguments(7, 5)
    shift.requires_grad_()

    def loss(shift):
        return op(weight, u, s, vh, shift, strength).square().sum()

    expected = torch.autograd.grad(loss(shift), shift)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(shift), shift)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_compile_fullgraph():
    args = arguments(7, 5)
    torch.testing.assert_close(torch.compile(op, fullgraph=True)(*args), op(*args))


BROKEN = {
    "weight dims": (0, lambda a: a[0], "weight: expected [out, in]"),
    "u": (1, lambda a: a[:-1], "u: expected float32 [7, 5], got float32 [6, 5]"),
    "vh dtype": (3, lambda a: a.half(), "vh: expected float32 [5, 5], got float16"),
    "shift": (4, lambda a: a[:-1], "shift: expected float32 [5], got float32 [4]"),
    "strength": (5, lambda a: a[None], "strength: expected float32 [], got float32 [1]"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_contract_is_an_error_that_names_it(case):
    args = arguments(7, 5)
    index, change, message = BROKEN[case]
    args[index] = change(args[index])
    with pytest.raises(ops.ContractError) as caught:
        op(*args)
    assert str(caught.value).startswith("spectral_weight: ") and message in str(caught.value)


@pytest.mark.parametrize("size", [20, 320])  # a loop of ours, the library's product
def test_autocast_changes_nothing(size):
    args = arguments(size, size, torch.float32)
    weight, u, _, vh, *_ = args
    expected, dots = op(*args), ops.spectral_dots([weight], [u], [vh])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(*args), expected)
        assert torch.equal(ops.spectral_dots([weight], [u], [vh])[0], dots)
