"""Every form of the CUDA version of `lora_linear`, whatever the plan would choose."""

import pytest
import torch

from fastlora import ops
from fastlora.ops import _routes as module
from fastlora.ops._device import kernels_of
from tests.cases import assert_twofold, identify, linear_arguments, strided, widened
from tests.devices import DEVICES

TILED, EXTENDED, APPENDED = module.TILED, module.EXTENDED, module.APPENDED
FORMS = pytest.mark.parametrize(
    "form", [EXTENDED, APPENDED, TILED], ids=["extended", "appended", "tiled"]
)
LOW = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)


def op(x, weight, bias, down, up, gate, row_scale, form=TILED):
    return module._kernel(x, weight, bias, down, up, gate, row_scale, form)


def check(args, form):
    exact = ops.lora_linear.reference(*widened(args))
    y = op(*args, form=form)
    assert_twofold(y, exact, ops.lora_linear.reference(*args))
    return y


# (leading shape, in, out, rank): tails in every dimension, one and more tiles of each
SHAPES = [
    ((1,), 1, 1, 1),
    ((5,), 8, 8, 3),
    ((2, 33), 40, 24, 16),
    ((2, 65), 129, 151, 5),
    ((64,), 64, 64, 16),
    ((3, 50), 96, 136, 17),
    ((2, 70), 200, 72, 32),
    ((129,), 33, 130, 1),
]


@FORMS
@pytest.mark.parametrize("rows", [False, True], ids=["gate", "gate-rows"])
@pytest.mark.parametrize("dtype", LOW, ids=identify)
@pytest.mark.parametrize("shape", SHAPES, ids=identify)
def test_against_float64(device, shape, dtype, rows, form):
    for bias, scale in ((True, True), (False, False)):
        check(linear_arguments(*shape, dtype=dtype, rows=rows, bias=bias, scale=scale), form)


@pytest.mark.parametrize("rank", [33, 64, 200, 1024])
@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_ranks_beyond_the_registers(device, dtype, rank):
    check(linear_arguments((2, 70), 72, 136, rank, dtype=dtype, rows=True), EXTENDED)


@FORMS
@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_strided_operands(device, dtype, form):
    """Rows apart (a slice of a wider tensor), elements apart, transposed, not aligned."""
    x, weight, bias, down, up, gate, scale = linear_arguments((40,), 48, 56, 8, dtype, scale=True)
    wide = torch.zeros(40, 100, dtype=dtype)
    wide[:, 8:56] = x
    for variant in (
        [wide[:, 8:56], weight, bias, down, up, gate, scale],
        [strided(t) for t in (x, weight, bias, down, up, gate, scale)],
        [x, weight.t().contiguous().t(), bias, down.t().contiguous().t(), up.t().contiguous().t(),
         gate, scale],
    ):  # fmt: skip
        assert torch.equal(variant[0], x)
        check(variant, form)


@FORMS
@pytest.mark.parametrize("turned", range(1, 16))
def test_operands_that_are_read_the_other_way(device, form, turned):
    """x, W, D, U with the neighbours of a sum apart, as a backward has them; every combination."""
    args = linear_arguments((40,), 40, 72, 8, torch.bfloat16)
    for bit, i in enumerate((0, 1, 3, 4)):
        if turned >> bit & 1:
            args[i] = args[i].t().contiguous().t()
    exact = ops.lora_linear.reference(*widened(args))
    y = args[0].new_empty(40, 72)
    h = None if form == APPENDED else args[0].new_empty(40, 8)
    x, weight, bias, down, up, gate, scale = args
    kernels_of(x).lora_linear(y, x, weight, bias, down, up, gate, scale, h, form)
    assert_twofold(y, exact, ops.lora_linear.reference(*args))


@FORMS
def test_two_runs_have_equal_bits_and_a_sample_is_alone_what_it_is_in_a_batch(device, form):
    args = linear_arguments((3, 70), 96, 136, 16, dtype=torch.bfloat16, rows=True, scale=True)
    y = op(*args, form=form)
    assert torch.equal(y, op(*args, form=form))
    for i in range(3):
        alone = op(args[0][i : i + 1], *args[1:5], args[5][i : i + 1], args[6], form=form)
        assert torch.equal(alone[0], y[i])


def test_forms_and_tiles_have_equal_bits(device):
    """The plan chooses by the number of all tokens: a sample has to be the same whatever that is.
    (What the library computes is its own.)"""
    out, samples = 128 * 11, 12
    args = linear_arguments((samples, 128), 32, out, 16, dtype=torch.bfloat16, rows=True)
    y = op(*args, form=EXTENDED)  # by large tiles
    assert torch.equal(y, op(*args, form=APPENDED))
    one = [args[0][3:4], *args[1:5], args[5][3:4], args[6]]  # by small ones
    for form in (EXTENDED, APPENDED):
        assert torch.equal(op(*one, form=form)[0], y[3])


@FORMS
def test_gates_of_zero_are_the_plain_product(device, form):
    args = linear_arguments((2, 40), 64, 72, 16, dtype=torch.bfloat16, bias=False)
    args[5] = torch.zeros_like(args[5])
    plain = op(*args[:3], args[3][:0], args[4][:, :0], args[5][:0], None, form=TILED)
    exact = widened([args[0]])[0] @ widened([args[1]])[0].t()
    assert_twofold(op(*args, form=form), exact, plain)


def test_products_of_many_tiles(device):
    """More tiles than the small shape is for."""
    module_shape = ((128 * 12,), 32, 128 * 11, 8)
    check(linear_arguments(*module_shape, dtype=torch.bfloat16), APPENDED)
    check(linear_arguments(*module_shape, dtype=torch.bfloat16), EXTENDED)


@pytest.mark.parametrize("form", [EXTENDED, APPENDED])
def test_what_a_form_cannot_do_is_refused(device, form):
    args = linear_arguments((4,), 8, 8, 4)
    with pytest.raises(ValueError, match="float16 or bfloat16 for tensor cores"):
        op(*args, form=form)
    if form == APPENDED:
        with pytest.raises(ValueError, match="a rank from 1 to 32"):
            op(*linear_arguments((4,), 8, 8, 33, dtype=torch.bfloat16), form=form)


def test_unknown_form(device):
    with pytest.raises(ValueError, match="form: expected 0 to 2, got 7"):
        op(*linear_arguments((4,), 8, 8, 4, dtype=torch.bfloat16), form=7)
