import pytest
import torch
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
