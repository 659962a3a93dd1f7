import importlib
import sys

import pytest
import torch
from torch.autograd import gradcheck

from fastlora import ops
from fastlora.ops._define import kernels
from fastlora.ops._device import kernels_of
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
from tests.devices import DEVICES, on_devices

op = ops.lora_add_


def arguments(shape, dtype=torch.float32, rows=False, down=True):
    x, _, _, d, up, gate, _ = linear_arguments(*shape, dtype=dtype, rows=rows)
    lead, _, out, rank = shape
    y = randn(*lead, out, dtype=dtype, seed=8)
    return (
        [y, x, d, up, gate]
        if down
        else [y, randn(*lead, rank, dtype=dtype, seed=9), None, up, gate]
    )


def by_hand(y, x, down, up, gate):
    g = gate if gate.dim() == 2 else gate.expand(x.shape[0], -1)
    h = x if down is None else torch.einsum("b...k,rk->b...r", x, down)
    return y + torch.einsum("b...r,br,nr->b...n", h, g, up)


@on_devices
@pytest.mark.parametrize("down", [True, False], ids=["down", "activation"])
@pytest.mark.parametrize("rows", [False, True], ids=["gate", "gate-rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=identify)
def test_against_float64(shape, dtype, rows, down):
    args = arguments(shape, dtype, rows, down)
    exact = by_hand(*widened(args))
    low = args[0].clone()
    op.reference(low, *args[1:])
    version = args[0]._version
    assert op(*args) is None
    assert args[0]._version > version
    assert_twofold(args[0], exact, low)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_strided_output_and_inputs(dtype):
    args = arguments(((2, 40), 24, 40, 4), dtype, rows=True)
    exact = by_hand(*widened(args))
    low = args[0].clone()
    op.reference(low, *args[1:])
    views = [strided(a) for a in args]
    op(*views)
    assert_twofold(views[0], exact, low)


@on_devices
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("down", [True, False], ids=["down", "activation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_channels_first_output(dtype, down, memory):
    y, x, d, up, gate = arguments(((2, 6, 7), 9, 33, 4), dtype, True, down)
    exact = by_hand(*widened([y, x, d, up, gate]))
    low = y.clone()
    op.reference(low, x, d, up, gate)
    image, inputs = (t.movedim(-1, 1).clone(memory_format=memory) for t in (y, x))
    op(image.movedim(1, -1), inputs.movedim(1, -1), d, up, gate)
    assert_twofold(image.movedim(1, -1), exact, low)


@on_devices
def test_gradients_are_those_of_the_formula():
    args = arguments(((2, 3), 5, 4, 3), torch.float64, rows=True)

    def functional(y, *rest):
        y = y.clone()
        op(y, *rest)
        return y

    assert gradcheck(functional, [a.requires_grad_() for a in args])


def test_backward_notices_that_the_output_was_overwritten():
    a = torch.randn(2, 4, requires_grad=True)
    y = a.exp()  # its backward needs y
    with torch.no_grad():
        op(y, torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 2), torch.ones(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_opcheck():
    args = arguments(((2, 3), 5, 4, 3), rows=True)
    torch.library.opcheck(op.overload, tuple(args))
    trained = [*args[:2], args[2].requires_grad_(), args[3].requires_grad_(), args[4]]
    torch.library.opcheck(op.overload, tuple(trained))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_compile_fullgraph():
    y, *rest = arguments(((2, 6), 8, 8, 4))

    def function(y):
        y = y * 2
        op(y, *rest)
        return y

    expected = by_hand(y * 2, *rest)
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(y), expected)


BROKEN = {
    "y shape": (0, lambda a: a[:, :-1], "y: expected [2, 3] + [out]"),
    "y dtype": (0, lambda a: a.double(), "y: expected torch.float32, got float64"),
    "up out": (3, lambda a: a[:-1], "up: expected [4, 3], got float32 [3, 3]"),
    "gate": (4, lambda a: a[:-1], "gate: expected [3] or [batch, 3], got float32 [2]"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_contract_is_an_error_that_names_it(case):
    args = arguments(((2, 3), 5, 4, 3))
    index, change, message = BROKEN[case]
    args[index] = change(args[index])
    before = args[0].clone()
    with pytest.raises(ops.ContractError) as caught:
        op(*args)
    assert str(caught.value).startswith("lora_add_: ") and message in str(caught.value)
    assert torch.equal(args[0], before)


# --- CUDA -----------------------------------------------------------------------------------------

module = sys.modules["fastlora.ops.lora_add"]
EXTENDED, TILED = module.EXTENDED, module.TILED
on_cuda = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
LOW = [torch.bfloat16, torch.float16]

# (leading shape, in, out, rank): tails in every dimension, one and more tiles of each
SHAPES = [
    ((1,), 1, 1, 1),
    ((5,), 8, 8, 3),
    ((2, 33), 40, 24, 16),
    ((2, 65), 129, 151, 5),
    ((64,), 64, 64, 16),
    ((3, 50), 96, 136, 17),
    ((2, 70), 72, 200, 64),
    ((129,), 33, 130, 200),
    ((7,), 24, 72, 1024),
]


def check(args, form=EXTENDED):
    exact = by_hand(*widened(args))
    low = args[0].clone()
    op.reference(low, *args[1:])
    module._kernel(*args, form=form)
    assert_twofold(args[0], exact, low)


@on_cuda
@pytest.mark.parametrize("down", [True, False], ids=["down", "activation"])
@pytest.mark.parametrize("rows", [False, True], ids=["gate", "gate-rows"])
@pytest.mark.parametrize("dtype", LOW, ids=identify)
@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_tensor_cores_against_float64(device, shape, dtype, rows, down):
    check(arguments(shape, dtype, rows, down))


@on_cuda
@pytest.mark.parametrize("form", [EXTENDED, TILED], ids=["extended", "tiled"])
@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_rows_apart_and_elements_apart(device, dtype, form):
    """Slices of wider tensors, aligned or not; transposed factors; y with gaps between elements."""
    args = arguments(((70,), 48, 56, 8), dtype)

    def inside(t, left, width):
        wide = t.new_zeros(*t.shape[:-1], width)
        view = wide[..., left : left + t.shape[-1]]
        view.copy_(t)
        return view

    turned = [t.t().contiguous().t() for t in args[2:4]]
    for y, x, down, up, gate in (
        [inside(args[0], 8, 72), inside(args[1], 16, 80), *args[2:]],
        [inside(args[0], 3, 71), inside(args[1], 1, 67), *args[2:]],
        [args[0].clone(), args[1], *turned, args[4]],
        [strided(t) for t in args],
    ):
        exact, low = by_hand(*widened([y, x, down, up, gate])), y.clone()
        op.reference(low, x, down, up, gate)
        h = x.new_empty(x.shape[0], up.shape[1])
        kernels_of(x).lora_add_(y, x, down, up, gate, h, form)
        assert_twofold(y, exact, low)


@on_cuda
def test_many_tiles(device):
    """More than the small shape is for."""
    check(arguments(((128 * 12,), 32, 128 * 11, 8), torch.bfloat16))


@on_cuda
@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_rounds_once_and_in_equal_bits(device, dtype):
    """h is rounded, the sum is not before it is added to y."""
    y, x, _, up, gate = arguments(((40,), 8, 72, 4), dtype, down=False)
    gate = torch.full_like(gate, 0.5)  # h has the bits of x
    exact = y.double() + (x.double() * 0.5) @ up.double().t()
    first, second = y.clone(), y.clone()
    module._kernel(first, x, None, up, gate, form=EXTENDED)
    module._kernel(second, x, None, up, gate, form=EXTENDED)
    assert torch.equal(first, second)
    assert (first == exact.to(dtype)).float().mean() > 0.995  # ties that float32 decides


@on_cuda
def test_gates_of_zero_and_no_components_leave_y(device):
    y, x, down, up, gate = arguments(((2, 40), 64, 72, 16), torch.bfloat16)
    before = y.clone()
    module._kernel(y, x, down, up, torch.zeros_like(gate), form=EXTENDED)
    assert torch.equal(y, before)
    y[0, 0, 0] = -0.0
    module._kernel(y, x, down[:0], up[:, :0], gate[:0], form=EXTENDED)
    assert torch.equal(y[0, 0, 1:], before[0, 0, 1:]) and y[0, 0, 0].signbit()


@on_cuda
def test_what_tensor_cores_cannot_do_is_refused(device):
    y, x, down, up, gate = arguments(((4,), 8, 8, 4))
    h = x.new_empty(4, 4)
    with pytest.raises(ValueError, match="float16 or bfloat16 for tensor cores"):
        kernels_of(x).lora_add_(y, x, down, up, gate, h, EXTENDED)
    args = [t.to(torch.bfloat16) for t in (y, x, down, up)]
    with pytest.raises(ValueError, match="weight: expected a matrix for this form"):
        kernels_of(x).lora_add_(*args, gate, h.to(torch.bfloat16), module.EXTENDED + 1)


@pytest.mark.parametrize("device", DEVICES[1:2], indirect=True)
def test_which_route_a_call_takes(device):
    """The emulated GPU is an H100; a library's products are no launches of ours."""

    def launched(args):
        plan = module._plan(*args)
        plan(*args)
        route = getattr(plan, "func", plan)
        return (route, importlib.import_module("fastlora._emulator").launches())

    low = torch.bfloat16
    args = arguments(((2, 40), 64, 72, 16), low)
    assert launched(args) == (module._kernel, ["gated activation", "extended product"])
    args = arguments(((2, 40), 64, 72, 16), low, down=False)
    assert launched(args) == (module._kernel, ["gate", "extended product"])
    args = arguments(((2, 40), 64, 72, 16))
    assert launched(args) == (module._kernel, ["lora_linear", "lora_linear"])
    y, *rest = arguments(((2, 40), 64, 72, 16), low)
    wide = y.new_zeros(2, 40, 100)
    assert module._plan(wide[..., 8:80], *rest).func is module._kernel
    assert module._plan(strided(y), *rest) is module._products
    image = y.view(2, 5, 8, 72).movedim(-1, 1).contiguous().movedim(1, -1)
    x = rest[0].view(2, 5, 8, 64)
    assert module._plan(image, x, *rest[1:]) is module._channels_first
    channels_last = y.view(2, 5, 8, 72)
    assert module._plan(channels_last, x, *rest[1:]).func is module._kernel
    assert module._plan(*arguments(((2, 0), 64, 72, 16), low)) is module._products


def test_predicted_seconds_by_hand():
    """8192 tokens, 320 -> 2560, rank 16 on an H100: 132 x 6 TFLOP/s, 3 TB/s, 2.7 us a launch."""
    m, k, n, r = 8192, 320, 2560, 16
    products, ours = kernels.predict_lora_add(m, k, n, r, 90, 132)
    update, skinny, gate = 2 * 2 * m * n / 3.0e12, 2 * m * k / 3.0e12, 2 * 2 * m * r / 3.0e12
    assert products == pytest.approx(update + skinny + gate + 3 * 2.7e-6)
    steps = 320 / 32 * 0.38e-6  # one after the other: longer than reading x
    main = update + 2 * (m * r + n * r) / 3.0e12
    assert ours == pytest.approx(main + steps + 1.5 * 2.7e-6, rel=0.01)
    assert ours < products
    without = kernels.predict_lora_add(m, 0, n, r, 90, 132)
    assert without[0] == pytest.approx(update + gate + 2 * 2.7e-6) and without[1] < ours
    # a product with as many operations as a layer's is the library's on a GPU with wgmma
    assert (
        kernels.predict_lora_add(8192, 4096, 4096, 1024, 90, 132)[1]
        > (kernels.predict_lora_add(8192, 4096, 4096, 1024, 90, 132)[0])
    )


def test_long_sums_round_little():
    """One token goes by plain loops; thousands of inputs must not be summed one after the other."""
    ratios = []
    for seed in range(24):
        x, down = randn(777, seed=seed), randn(15, 777, seed=seed + 100) / 777**0.5
        up, gate, y = randn(170, 15, seed=seed), randn(15, seed=seed), torch.zeros(170)
        exact, low = y.double(), y.clone()
        op.reference(exact, *(t.double() for t in (x, down, up, gate)))
        op.reference(low, x, down, up, gate)
        op(y, x, down, up, gate)
        ratios.append((y.double() - exact).norm() / (low.double() - exact).norm())
    assert sum(ratios) / len(ratios) <= 2, ratios
