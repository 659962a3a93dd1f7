import importlib
import os
import subprocess
import sys

import pytest
import torch

import fastlora
from fastlora import ops
from tests.cases import DTYPES, FOLD_SHAPES, assert_twofold, fold_layer, identify, strided, widened
from tests.devices import DEVICES, on_devices

op = ops.fold
LOW = [torch.float32, torch.bfloat16, torch.float16]


def lists(*layers):
    """Arguments of the operator from layers of (weight, down, up, gate, out)."""
    return [list(column) for column in zip(*layers, strict=True)]


def by_hand(weight, down, up, gate, _=None):
    """The formula by einsum in float64; components with gate 0 do not take part."""
    on = gate != 0
    factors = (up[:, on].double(), gate[on].double(), down[on].double())
    return weight.double() + torch.einsum("or,r,ri->oi", *factors)


def check(*layers):
    """Folds layers of mixed kinds in one call and holds each against float64."""
    low = [torch.empty_like(layer[0]) for layer in layers]
    op.reference(*lists(*[[*layer[:4], out] for layer, out in zip(layers, low, strict=True)]))
    assert op(*lists(*layers)) is None
    for layer, plain in zip(layers, low, strict=True):
        assert_twofold(layer[4], by_hand(*layer[:4]), plain)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("shape", FOLD_SHAPES, ids=identify)
def test_against_float64(shape, dtype):
    check(fold_layer(*shape, dtype=dtype))


@on_devices
def test_layers_of_every_kind_in_one_call(device):
    dtypes = DTYPES if device == "cpu" else DTYPES[:3]
    layers = [fold_layer(*shape, dtype=dtype) for shape in FOLD_SHAPES for dtype in dtypes]
    check(*layers, *[fold_layer(40, 24, 8) for _ in range(100)])


def test_no_layers():
    assert op([], [], [], [], []) is None


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=identify)
def test_float32_adapter_on_a_low_precision_weight(dtype):
    weight, down, up, gate, out = fold_layer(50, 70, 9, dtype, torch.float32)
    op([weight], [down], [up], [gate], [out])
    # the factors are not rounded, so W' is the exact sum rounded once
    assert_rounded_once(out, weight, down, up, gate)
    check([weight, down, up.to(dtype), gate, out], [weight, down.to(dtype), up, gate, out.clone()])


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_strides_of_every_argument(dtype):
    weight, down, up, gate, out = fold_layer(50, 70, 9, dtype)
    exact = by_hand(weight, down, up, gate)
    plain = torch.empty_like(weight)
    op.reference([weight], [down], [up], [gate], [plain])
    turned = [t.t().contiguous().t() for t in (weight, down, up)]
    spread = [strided(t) for t in (weight, down, up, gate, out)]
    for arguments in (
        [*turned, gate, out],
        spread,
        [weight, *spread[1:4], out],
        [weight, down, up, gate, torch.empty(70, 50, dtype=dtype).t()],
        [weight, down, up, gate, torch.empty(50, 99, dtype=dtype)[:, 3:73]],
    ):
        op(*lists(arguments))
        assert_twofold(arguments[4], exact, plain)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("shape", [(8, 32, 16), (151, 129, 33)], ids=identify)
def test_all_gates_zero_is_the_weight_bit_for_bit(shape, dtype):
    weight, down, up, gate, out = fold_layer(*shape, dtype=dtype)
    weight[0, 0] = -0.0
    down[0, 0], up[0, 0] = float("nan"), float("inf")  # adapters that are off do no harm
    op([weight], [down], [up], [torch.zeros_like(gate)], [out])
    assert torch.equal(out, weight) and out[0, 0].signbit()
    assert out.data_ptr() != weight.data_ptr()


@on_devices
def test_a_component_that_is_off_is_left_out():
    weight, down, up, gate, out = fold_layer(50, 70, 9)
    expected = torch.empty_like(out)
    keep = [0, 1, 2, 4, 5, 6, 7, 8]
    op([weight], [down[keep]], [up[:, keep]], [gate[keep]], [expected])
    gate[3], down[3] = 0, float("nan")
    op([weight], [down], [up], [gate], [out])
    assert torch.equal(out, expected)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("shape", [(17, 33, 3), (151, 129, 33)], ids=identify)
def test_in_place_equals_out_of_place(shape, dtype):
    weight, down, up, gate, out = fold_layer(*shape, dtype=dtype)
    pristine = weight.clone()
    op([weight], [down], [up], [gate], [out])
    assert torch.equal(weight, pristine)
    op([weight], [down], [up], [gate], [weight])
    assert torch.equal(weight, out)


def check_slices(dtype, rows, columns):
    """More than the caches hold is written past them; a slice is not, and has the same bits."""
    weight, down, up, gate, out = fold_layer(rows, columns, 2, dtype)
    op([weight], [down], [up], [gate], [out])
    for i in range(0, rows, 480):
        part = out[i : i + 480]
        expected = torch.empty_like(part)
        op([weight[i : i + 480]], [down], [up[i : i + 480]], [gate], [expected])
        assert torch.equal(part, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("columns", [1600, 1601])  # rows that are aligned, and rows that are not
def test_larger_than_the_caches(columns, dtype):
    check_slices(dtype, (10 << 20) // (columns * dtype.itemsize), columns)


def test_the_result_does_not_depend_on_the_threads():
    layers = [fold_layer(300, 400, 16), fold_layer(151, 129, 33)]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outs = [torch.empty_like(layer[0]) for layer in layers]
        op(*lists(*[[*layer[:4], out] for layer, out in zip(layers, outs, strict=True)]))
        results.append(outs)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("entry", ["eager", "overload"])
def test_parameters_are_folded_without_a_graph(entry):
    weight, down, up, gate, out = fold_layer(17, 33, 3)
    for tensor in (weight, down, up, gate):
        tensor.requires_grad_()
    version = out._version
    run = op if entry == "eager" else op.overload
    run([weight], [down], [up], [gate], [out])
    assert not out.requires_grad and out.grad_fn is None
    assert out._version > version
    expected = torch.empty_like(out)
    op.reference([weight], [down], [up], [gate], [expected])
    torch.testing.assert_close(out, expected)
    parameter = torch.nn.Parameter(weight.detach().clone())
    version = parameter._version
    run([parameter], [down], [up], [gate], [parameter])
    torch.testing.assert_close(parameter.detach(), expected)
    assert parameter._version > version


def test_backward_notices_that_a_result_was_overwritten():
    weight, down, up, gate, _ = fold_layer(17, 33, 3)
    out = torch.ones_like(weight, requires_grad=True).exp()  # its backward needs it
    op([weight], [down], [up], [gate], [out.detach()])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_opcheck():
    layers = [fold_layer(17, 33, 3), fold_layer(8, 32, 16, torch.bfloat16)]
    torch.library.opcheck(op.overload, tuple(lists(*layers)))
    for layer in layers:
        layer[1].requires_grad_()
        layer[2].requires_grad_()
    torch.library.opcheck(op.overload, tuple(lists(*layers)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_compile_fullgraph():
    layers = [fold_layer(17, 33, 3), fold_layer(8, 32, 16)]

    def function(scale):
        outs = [torch.zeros_like(layer[0]) for layer in layers]
        op(*lists(*[[*layer[:4], out] for layer, out in zip(layers, outs, strict=True)]))
        return [out * scale for out in outs]

    compiled = torch.compile(function, fullgraph=True)(torch.tensor(2.0))
    for layer, result in zip(layers, compiled, strict=True):
        torch.testing.assert_close(result.double(), 2 * by_hand(*layer[:4]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """In a process of its own: the choice is made once."""
    code = """
from fastlora.ops._define import kernels
from tests.cases import DTYPES, FOLD_SHAPES, fold_layer
from tests.ops.test_fold import check, check_slices
for dtype in DTYPES:
    check(*[fold_layer(*shape, dtype=dtype) for shape in FOLD_SHAPES])
    check_slices(dtype, 3300, 1600)
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
    "weight dims": (0, lambda a: a[0], "weights[1]: expected [out, in], got float32 [33]"),
    "weight dtype": (0, lambda a: a.long(), "weights[1]: expected float32, float16"),
    "weight shape": (0, lambda a: a[1:], "ups[1]: expected float32 [16, 3], got float32 [17, 3]"),
    "down shape": (1, lambda a: a[:, 1:], "downs[1]: expected float32 [3, 33], got"),
    "down dtype": (1, lambda a: a.half(), "downs[1]: expected float32 [3, 33], got"),
    "up dtype": (2, lambda a: a.double(), "ups[1]: expected float32 [17, 3], got float64 [17, 3]"),
    "gate rank": (3, lambda a: a[1:], "gates[1]: expected float32 [3], got float32 [2]"),
    "gate dtype": (3, lambda a: a.half(), "gates[1]: expected float32 [3], got float16 [3]"),
    "gate rows": (3, lambda a: a.expand(2, 3), "strength that differs per sample cannot be folded"),
    "out shape": (4, lambda a: a.t(), "outs[1]: expected float32 [17, 33], got float32 [33, 17]"),
    "out dtype": (4, lambda a: a.half(), "outs[1]: expected float32 [17, 33], got float16"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_contract_is_an_error_that_names_it(case):
    good, layer = fold_layer(4, 5, 2), fold_layer(17, 33, 3)
    index, change, message = BROKEN[case]
    layer[index] = change(layer[index])
    for run in (op, op.overload):
        with pytest.raises(ops.ContractError) as caught:
            run(*lists(good, layer))
        assert str(caught.value).startswith("fold: ") and message in str(caught.value)
    assert good[4].isnan().all()  # nothing was written


def test_wrong_types_and_counts():
    arguments = lists(fold_layer(4, 5, 2))
    with pytest.raises(ops.ContractError, match="gates: expected a list of 1 tensors"):
        op(*arguments[:3], [], arguments[4])
    with pytest.raises(TypeError, match=r"downs\[0\]: expected a tensor, got NoneType"):
        op(arguments[0], [None], *arguments[2:])


def test_results_that_overlap_are_refused():
    weight, down, up, gate, out = fold_layer(16, 8, 2)
    memory = torch.zeros(17, 8)
    with pytest.raises(ValueError, match=r"fold: outs\[0\]: expected .* does not overlap it"):
        op([memory[:16]], [down], [up], [gate], [memory[1:]])
    with pytest.raises(ValueError, match=r"fold: outs\[.\]: expected memory that no other layer"):
        op([weight] * 2, [down] * 2, [up] * 2, [gate] * 2, [out] * 2)
    assert out.isnan().all() and not memory.any()


OTHERS = {"weights": 0, "downs": 1, "ups": 2, "gates": 3}


@pytest.mark.parametrize("entry", ["eager", "overload"])
@pytest.mark.parametrize("own", [False, True], ids=["another layer's", "its own"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_result_that_is_read_as_an_input_is_refused(name, own, entry):
    """Square and of rank 6, so that every kind of input may lie in a result's memory."""
    first, second = fold_layer(6, 6, 6), fold_layer(6, 6, 6)
    reader = second if own else first
    index, memory = OTHERS[name], torch.zeros(8, 6)
    second[4] = memory[1:7]
    reader[index] = memory[2, :] if name == "gates" else memory[:6].t() if index else memory[:6]
    where = "weights[i] itself" if own and index == 0 else f"does not overlap {name}[{int(own)}]"
    run = op if entry == "eager" else op.overload
    with pytest.raises(ValueError, match=r"fold: outs\[1\]: expected ") as caught:
        run(*lists(first, second))
    assert where in str(caught.value)
    assert not memory.any() and first[4].isnan().all()


def test_a_result_that_is_another_layers_whole_weight_is_refused():
    a, down, up, gate, b = fold_layer(6, 6, 2)
    before = a.clone()
    with pytest.raises(ValueError, match=r"outs\[0\]: expected .* does not overlap weights\[1\]"):
        op([a, a], [down] * 2, [up] * 2, [gate] * 2, [a, b])
    assert torch.equal(a, before) and b.isnan().all()


@pytest.mark.parametrize(
    ("size", "stride"), [((6, 6), (0, 1)), ((6, 6), (1, 0)), ((4, 3), (1, 2)), ((3, 4), (4, 2))]
)
def test_a_result_whose_elements_overlap_is_refused(size, stride):
    weight, down, up, gate, _ = fold_layer(*size, 2)
    memory = torch.zeros(40)
    with pytest.raises(ValueError, match=r"outs\[0\]: expected memory of its own for every"):
        op([weight], [down], [up], [gate], [memory.as_strided(size, stride)])
    assert not memory.any()


@pytest.mark.parametrize(
    ("size", "stride"), [((6, 1), (0, 1)), ((1, 6), (1, 1)), ((3, 2), (1, 3)), ((2, 3), (3, 2))]
)
def test_results_without_overlap_are_allowed_whatever_their_strides(size, stride):
    weight, down, up, gate, _ = fold_layer(*size, 2)
    if stride == (0, 1):
        size, stride = (1, 6), (0, 1)
        weight, down, up, gate, _ = fold_layer(*size, 2)
    out = torch.zeros(40).as_strided(size, stride)
    op([weight], [down], [up], [gate], [out])
    torch.testing.assert_close(out.double(), by_hand(weight, down, up, gate), rtol=1e-5, atol=1e-5)


def test_operands_that_interleave_without_sharing_elements_are_allowed():
    """Columns of one block of memory: weights, factors and results side by side."""
    memory = torch.randn(6, 40)
    w, u, out, other = (memory[:, i : i + 7] for i in (0, 8, 16, 24))
    turns = torch.randn(7, 12).t()  # results in every second row
    down, gate = torch.randn(7, 7), torch.randn(7)
    exact = by_hand(w, down, u, gate)
    op([w, w, w], [down] * 3, [u] * 3, [gate] * 3, [out, other, turns[::2]])
    for result in (out, other, turns[::2]):
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-5)
    op([w, other], [down] * 2, [u] * 2, [gate] * 2, [w, out])  # in place beside them
    torch.testing.assert_close(w.double(), exact, rtol=1e-4, atol=1e-5)


def assert_rounded_once(out, weight, down, up, gate):
    """W' is the exact sum plus the error of the sum before rounding, rounded once.

    Float32 arithmetic is off by less than 2^-16 of `Σ |u g d|`, and so are two bfloat16 parts of
    U diag(g) and of D on tensor cores: 2^-18 each for what two parts leave of a number, 2^-18 for
    the product of the two low parts. Had a part been lost, the error would be 2^-9.
    """
    exact, dtype = by_hand(weight, down, up, gate), out.dtype
    on = gate != 0
    sizes = up[:, on].double().abs() * gate[on].double().abs() @ down[on].double().abs()
    error = 2.0**-16 * sizes
    once = exact.to(dtype)
    finfo = torch.finfo(dtype)
    # distance of neighbours: that of the number's binade
    exponent = torch.frexp(once.double().abs().clamp_min(finfo.smallest_normal))[1] - 1
    unit = torch.ldexp(torch.full_like(exact, finfo.eps), exponent)
    assert ((out.double() - exact).abs() <= unit / 2 + error).all()
    # It may fall on the other side of a tie if the tie is nearer than the error. Errors of single
    # terms have either sign and are smaller than their bound: half of it is generous.
    other_side = (error / unit).clamp_max(1).mean().item()
    assert (out != once).double().mean().item() <= other_side + 3 / out.numel()


@on_devices
@pytest.mark.parametrize("factors", [None, torch.float32], ids=["factors-alike", "factors-wide"])
@pytest.mark.parametrize("dtype", LOW[1:], ids=identify)
@pytest.mark.parametrize("shape", [(64, 128, 8), (64, 96, 40), (33, 130, 200)], ids=identify)
def test_rounds_once(shape, dtype, factors):
    weight, down, up, gate, out = fold_layer(*shape, dtype, factors)
    for scale in (1.0, 0.05):  # what is added is as large as the weight, or small beside it
        op([weight], [down], [up], [gate * scale], [out])
        assert_rounded_once(out, weight, down, up, gate * scale)


def test_widened_arguments_are_the_oracle_of_the_reference():
    layer = fold_layer(17, 33, 5)
    exact = widened(layer)
    op.reference(*lists(exact))
    torch.testing.assert_close(exact[4], by_hand(*layer[:4]))


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
def test_float64_on_cuda_is_refused_in_words(device):
    with pytest.raises(ops.ContractError, match="float32, float16 or bfloat16 on CUDA"):
        op(*([a] for a in fold_layer(4, 5, 2, torch.float64)))


# --- CUDA -----------------------------------------------------------------------------------------

on_cuda = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
emulated_only = pytest.mark.parametrize("device", DEVICES[1:2], indirect=True)

# (out, in, rank): tails in every dimension of tiles (64 x 128), chunks (32) and vectors (8)
TILES = [
    (64, 128, 16),
    (65, 129, 17),
    (63, 127, 1),
    (80, 200, 3),
    (320, 8, 64),
    (1, 320, 33),
    (16, 64, 32),
    (17, 72, 200),
    (33, 24, 1024),
    (40, 300, 0),
]


@pytest.fixture
def old_gpu():
    """An emulated GPU without tensor cores for bfloat16."""
    emulator = importlib.import_module("fastlora._emulator")
    before = emulator.capability()
    emulator.set_capability(75)
    yield
    emulator.set_capability(before)


def launches():
    return importlib.import_module("fastlora._emulator").launches()


@on_cuda
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [*((d, d) for d in LOW), *((d, torch.float32) for d in LOW[1:])],
    ids=identify,
)
@pytest.mark.parametrize("shape", TILES, ids=identify)
def test_tails_of_tiles(device, shape, dtype, factors):
    layer = fold_layer(*shape, dtype, factors)
    if shape[2] > 3:
        layer[3][::3] = 0
    check(layer)
    if dtype != torch.float32:
        assert_rounded_once(layer[4], *layer[:4])


@emulated_only
@pytest.mark.parametrize("dtype", LOW[1:], ids=identify)
def test_without_tensor_cores(device, dtype, old_gpu):
    check(*[fold_layer(*shape, dtype=dtype) for shape in TILES[:6]])
    assert launches() == ["rank_update"]


@emulated_only
def test_layers_of_one_dtype_are_one_launch(device):
    """As many as a model has: SD 1.5's Linear layers and convolutions are 282."""
    layers = [fold_layer(1 + i % 5, 8 + i % 9, i % 3, torch.bfloat16) for i in range(300)]
    with fastlora.emulated(runs=2):
        check(*layers, fold_layer(7, 9, 2), fold_layer(7, 9, 2, torch.float16))
    assert launches() == ["rank_update", "rank_update_sm80", "rank_update_sm80"]


@emulated_only
def test_more_layers_than_one_launch_takes(device):
    layers = [fold_layer(1 + i % 3, 5 + i % 7, 1) for i in range(330)]
    with fastlora.emulated(runs=2):
        check(*layers)
    assert launches() == ["rank_update"] * 2


@emulated_only
def test_layers_without_elements_are_no_launch(device):
    op(*lists(fold_layer(0, 5, 2), fold_layer(5, 0, 2)))
    assert launches() == []
    empty, layer = fold_layer(0, 5, 2, torch.bfloat16), fold_layer(9, 7, 2, torch.bfloat16)
    check(empty, layer, empty)
    assert launches() == ["rank_update_sm80"]


@on_cuda
@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_signs_of_zero_and_what_is_off(device, dtype):
    """Off components may hold anything, in every place of a chunk; where none adds W stays."""
    weight, down, up, gate, out = fold_layer(70, 140, 40, dtype)
    weight[::2] = -0.0
    down[:, ::2] = 0
    gate[::3] = 0
    expected = torch.empty_like(out)
    op([weight], [down], [up], [gate], [expected])
    assert torch.equal(expected[:, ::2], weight[:, ::2])
    assert expected[::2, ::2].signbit().all()
    down[::3], up[:, ::3] = float("nan"), float("inf")
    op([weight], [down], [up], [gate], [out])
    assert torch.equal(out, expected)


@on_cuda
@pytest.mark.parametrize("dtype", LOW[1:], ids=identify)
def test_factors_beyond_the_range_of_float16(device, dtype):
    """`u g` is a float32 on its way, whatever the weight's range is."""
    weight, down, up, gate, out = fold_layer(33, 70, 5, dtype)
    down, gate = down / 1024, gate * 1e6
    op([weight], [down], [up], [gate * 1e-3], [out])
    assert_rounded_once(out, weight, down, up, gate * 1e-3)
    op([weight], [down / 16], [up * 1e-3], [gate], [out])
    assert_rounded_once(out, weight, down / 16, up * 1e-3, gate)


@on_cuda
@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_two_folds_have_equal_bits(device, dtype):
    weight, down, up, gate, out = fold_layer(70, 140, 40, dtype)
    other = torch.empty_like(out)
    op([weight], [down], [up], [gate], [out])
    op([weight.clone(), weight], [down] * 2, [up] * 2, [gate] * 2, [other, weight])
    assert torch.equal(out, other) and torch.equal(out, weight)
