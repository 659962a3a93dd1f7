import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from fastlora import ops
from fastlora.ops.spectral_linear import activations_are_cheaper
from tests.cases import DTYPES, assert_twofold, identify, randn, strided, wide, widened
from tests.devices import on_devices

op = ops.spectral_linear
# (leading shape of x, in, out)
SHAPES = [
    ((1,), 1, 1), ((3,), 7, 5), ((3,), 5, 7), ((2, 3), 33, 65), ((2, 1, 4), 16, 8), ((70,), 40, 24),
    ((0,), 4, 3), ((2, 0), 4, 3), ((2,), 0, 3), ((2,), 3, 0), ((), 6, 4),
]  # fmt: skip
OPERANDS = ("x", "weight", "bias", "shift", "strength")


def arguments(lead, features, out, dtype=torch.float32, factors=None, bias=True):
    weight = randn(out, features, dtype=torch.float64, seed=1) / max(features, 1) ** 0.5
    if weight.numel():
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, vh = torch.zeros(out, 0), torch.zeros(0), torch.zeros(0, features)
    factors, coefficients = factors or dtype, wide(dtype)
    shift = randn(len(s), dtype=coefficients, seed=2)
    shift[::5] = -1e9  # components that are cut off
    shift[1::5] = 0.0  # and untouched ones
    return [
        randn(*lead, features, dtype=dtype, seed=3),
        weight.to(dtype),
        randn(out, dtype=dtype, seed=4) if bias else None,
        u.to(factors),
        s.to(coefficients),
        vh.to(factors),
        shift,
        torch.tensor(0.7, dtype=coefficients),
    ]


def by_hand(x, weight, bias, u, s, vh, shift, strength):
    """On the changed weight, written out; for float64."""
    changed = weight + torch.einsum("nr,r,rk->nk", u, (s + strength * shift).clamp_min(0) - s, vh)
    y = torch.einsum("...k,nk->...n", x, changed)
    return y if bias is None else y + bias


@on_devices
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_against_float64(shape, dtype, bias):
    args = arguments(*shape, dtype, bias=bias)
    assert_twofold(op(*args), by_hand(*widened(args)), op.reference(*args))


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=identify)
@pytest.mark.parametrize("shape", [((2, 3), 33, 65), ((5,), 65, 33)], ids=identify)
def test_is_the_layer_on_the_spectral_weight(shape, dtype):
    x, weight, bias, *shifted = args = arguments(*shape, dtype)
    changed = ops.spectral_weight.reference(weight, *shifted)
    torch.testing.assert_close(op(*args), F.linear(x, changed, bias))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1]], ids=identify)
def test_no_shift_is_the_plain_layer_bit_for_bit(shape, dtype):
    for zero in (6, 7):
        args = arguments(*shape, dtype)
        args[zero] = torch.zeros_like(args[zero])
        assert torch.equal(op(*args), op_linear(*args[:3]))


def op_linear(x, weight, bias):
    """F.linear on the device whose kernels run: its products round in their own order."""
    if hasattr(op, "operator"):  # on a GPU
        return F.linear(x.cuda(), weight.cuda(), bias.cuda()).cpu()
    return F.linear(x, weight, bias)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=identify)
def test_a_large_negative_shift_removes_its_rank(dtype):
    x, weight, _, u, s, vh, shift, one = arguments((4,), 9, 6, dtype, bias=False)
    shift = torch.zeros_like(shift)
    shift[0] = -1e9
    exact = x.double() @ (weight.double() - s[0].double() * torch.outer(u[:, 0], vh[0]).double()).T
    ours = op(x, weight, None, u, s, vh, shift, one)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=identify)
def test_a_component_without_a_shift_contributes_nothing(dtype):
    """However large x is along it: V x is beyond the range of float16 here."""
    x, weight, bias, u, s, vh, shift, one = arguments((3,), 24, 16, dtype)
    shift = torch.zeros_like(shift)
    shift[1] = 0.25
    x = (x.double() + 3e5 * vh[0].double()).clamp(-6e4, 6e4).to(dtype)
    weight = weight * 1e-3  # so that the result is finite
    ours = op(x, weight, bias, u, s, vh, shift, one)
    exact = by_hand(*widened([x, weight, bias, u, s, vh, shift, one]))
    only = [a[..., 1:2] if i == 0 else a[1:2] for i, a in enumerate((u, s, vh, shift))]
    assert_twofold(ours, exact, op.reference(x, weight, bias, *only, one))


def test_signs_and_order_of_the_decomposition_do_not_matter():
    x, weight, bias, u, s, vh, shift, strength = arguments((4,), 9, 6, torch.float64)
    order, sign = torch.randperm(6), torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)
    u_other, vh_other = (u * sign)[:, order], (vh * sign[:, None])[order]
    other = op(x, weight, bias, u_other, s[order], vh_other, shift[order], strength)
    torch.testing.assert_close(other, op(x, weight, bias, u, s, vh, shift, strength))


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=identify)
def test_float32_factors_on_a_low_precision_weight(dtype):
    args = arguments((2, 3), 33, 20, dtype, factors=torch.float32)
    assert op(*args).dtype == dtype
    assert_twofold(op(*args), by_hand(*widened(args)), op.reference(*args))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_strided_inputs(dtype):
    args = arguments((2, 3), 33, 20, dtype)
    views = [strided(a) if a.dim() else a for a in args]
    assert_twofold(op(*views), by_hand(*widened(args)), op.reference(*args))


@pytest.mark.parametrize("shape", [((3,), 5, 7), ((2, 2), 7, 5), ((), 4, 3)], ids=identify)
def test_gradcheck(shape):
    x, weight, bias, u, s, vh, shift, strength = arguments(*shape, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias, shift, strength)]

    def run(x, weight, bias, shift, strength):
        return op(x, weight, bias, u, s, vh, shift, strength)

    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)


@on_devices
def test_only_the_gradients_that_are_asked_for():
    args = arguments((3,), 7, 5, torch.float64)
    places = dict(zip(OPERANDS, (0, 1, 2, 6, 7), strict=True))
    for names in itertools.chain.from_iterable(itertools.combinations(OPERANDS, n) for n in (1, 2)):
        grads = []
        for run in (op, by_hand):
            values = [a.detach().clone() for a in args]
            leaves = [values[places[name]].requires_grad_() for name in names]
            grads.append(torch.autograd.grad(run(*values).square().sum(), leaves))
        torch.testing.assert_close(*grads)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.parametrize("shape", [((2, 20), 33, 65), ((40,), 65, 33)], ids=identify)
def test_gradients_by_the_twofold_rule(shape, dtype):
    args = arguments(*shape, dtype)
    probe = randn(*shape[0], shape[2], dtype=dtype, seed=7)
    grads = []
    for run, values in ((op, args), (op.reference, args), (by_hand, widened(args))):
        leaves = [values[i].detach().requires_grad_() for i in (0, 1, 2, 6, 7)]
        x, weight, bias, shift, strength = leaves
        y = run(x, weight, bias, *values[3:6], shift, strength)
        grads.append(torch.autograd.grad((y * probe.to(y.dtype)).sum(), leaves))
    for ours, plain, exact in zip(*grads, strict=True):
        # gradients pass through x's dtype, so its rounding is what counts
        error = (ours.double() - exact).abs().max()
        rounding = torch.finfo(dtype).eps / 2 * exact.abs().max()
        assert ours.dtype == plain.dtype
        assert error <= 2 * max((plain.double() - exact).abs().max(), rounding)


@on_devices
def test_no_gradient_where_the_relu_cuts():
    args = arguments((4,), 9, 6, torch.float64)
    shift = args[6].requires_grad_()
    (grad,) = torch.autograd.grad(op(*args).sum(), shift)
    cut = args[4] + args[7] * shift.detach() < 0
    assert cut.any() and not grad[cut].any() and grad[~cut].all()


@on_devices
def test_gradients_survive_a_change_of_the_strength():
    args = arguments((3,), 7, 5, torch.float64)
    args[6].requires_grad_()
    y = op(*args)
    (expected,) = torch.autograd.grad(by_hand(*args).sum(), args[6])
    args[7].zero_()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), args[6])[0], expected)


def test_no_temporary_of_the_weight_s_size():
    """Forward and backward, by what torch allocates: 4 tokens beside a weight of 300 x 500."""
    args = arguments((4,), 500, 300)
    for i in (0, 6, 7):
        args[i].requires_grad_()
    op(*args).sum().backward()  # plans are made
    with torch.profiler.profile(profile_memory=True) as found:
        op(*args).sum().backward()
    sizes = [e.self_cpu_memory_usage for e in found.events()]
    assert 0 < max(sizes) < args[1].nbytes / 4


@pytest.mark.parametrize("cheaper", [True, False])
def test_cost_by_closed_form(cheaper):
    """M < NK/(K+N), and with the backward pass M < 3NKR/(3R(K+N) - NK)."""
    for features, out in ((320, 320), (768, 320), (320, 1280), (1280, 320), (1, 1), (5120, 640)):
        rank = min(features, out)
        area, sides = features * out, features + out
        for backward, limit in (
            (False, area / sides),
            (True, 3 * area * rank / (3 * rank * sides - area)),
        ):
            tokens = int(limit * (0.9 if cheaper else 1.1)) + (not cheaper)
            assert (
                activations_are_cheaper(tokens, features, out, rank, backward=backward) == cheaper
            )


def test_cost_of_real_layers():
    """SD 1.5: the time embedding and the text's keys and values, not what looks at the image."""
    decided = {
        (2, 320, 1280): (True, True),  # time embedding
        (2, 1280, 1280): (True, True),
        (154, 768, 320): (True, True),  # two texts of 77 tokens
        (154, 768, 1280): (True, True),
        (77, 768, 768): (True, True),
        (512, 768, 1280): (False, True),  # between the two
        (650, 768, 1280): (False, False),
        (128, 1280, 1280): (True, True),  # the image at 8 x 8, twice
        (700, 1280, 1280): (False, True),
        (8192, 320, 320): (False, False),
        (2048, 640, 5120): (False, False),
    }
    for shape, expected in decided.items():
        found = tuple(
            activations_are_cheaper(*shape, min(shape[1:]), backward=b) for b in (False, True)
        )
        assert found == expected, shape


def test_opcheck():
    args = arguments((3,), 7, 5)
    args = [a.requires_grad_() if i in (0, 1, 2, 6) else a for i, a in enumerate(args)]
    torch.library.opcheck(op.overload, tuple(args))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_compile_fullgraph_with_its_backward():
    args = arguments((3,), 7, 5)
    args[6].requires_grad_()

    def loss(*args):
        return op(*args).square().sum()

    expected = torch.autograd.grad(loss(*args), args[6])
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*args), args[6])
    torch.testing.assert_close(compiled, expected)


def test_autocast_computes_in_its_dtype():
    args = arguments((2, 3), 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(*args)
    assert y.dtype == torch.bfloat16
    low = [a.bfloat16() if i in (0, 1, 2) else a for i, a in enumerate(args)]
    assert_twofold(y, by_hand(*widened(low)), op.reference(*low))


BROKEN = {
    "x features": (0, lambda a: a[..., :-1], "x: expected [..., 7], got float32 [3, 6]"),
    "x dtype": (0, lambda a: a.long(), "x: expected float32, float16, bfloat16 or float64"),
    "weight dims": (1, lambda a: a[0], "weight: expected [out, in]"),
    "weight dtype": (1, lambda a: a.half(), "weight: expected float32 [5, 7], got float16"),
    "bias": (2, lambda a: a[1:], "bias: expected float32 [5], got float32 [4]"),
    "u": (3, lambda a: a[:-1], "u: expected float32 [5, 5], got float32 [4, 5]"),
    "s": (4, lambda a: a[None], "s: expected [rank], got float32 [1, 5]"),
    "vh dtype": (5, lambda a: a.half(), "vh: expected float32 [5, 7], got float16"),
    "shift": (6, lambda a: a[:-1], "shift: expected float32 [5], got float32 [4]"),
    "strength": (7, lambda a: a[None], "strength: expected float32 [], got float32 [1]"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_contract_is_an_error_that_names_it(case):
    args = arguments((3,), 7, 5)
    index, change, message = BROKEN[case]
    args[index] = change(args[index])
    for run in (op, op.overload):
        with pytest.raises(ops.ContractError) as caught:
            run(*args)
        assert str(caught.value).startswith("spectral_linear: ") and message in str(caught.value)
