"""`spectral_weights` and `spectral_dots`: all layers of a model in one call."""

import sys

import pytest
import torch

from fastlora import ops
from tests.cases import DTYPES, assert_twofold, identify, randn, strided, wide, widened
from tests.devices import on_devices

# (out, in, rank): 0, 1 and odd sizes, around vectors, steps and tiles, several tiles each way
SHAPES = [
    (1, 1, 1),
    (0, 4, 2),
    (4, 0, 2),
    (5, 7, 0),
    (5, 7, 12),
    (33, 36, 33),
    (64, 72, 32),
    (128, 128, 24),
    (130, 264, 40),
    (200, 20, 136),
]
LOW = [torch.bfloat16, torch.float16]


def layer(out, features, rank, dtype=torch.float32, factors=None):
    """weight, u, s, vh, shift, strength, out; every fifth component is cut off."""
    factors = factors or dtype
    shift = randn(rank, dtype=wide(dtype), seed=5)
    shift[::5] = -1e9
    return [
        randn(out, features, dtype=dtype, seed=1),
        randn(out, rank, dtype=factors, seed=2) / max(rank, 1) ** 0.5,
        randn(rank, dtype=wide(dtype), seed=3).abs() + 0.1,
        randn(rank, features, dtype=factors, seed=4),
        shift,
        torch.tensor(0.7, dtype=wide(dtype)),
        torch.full((out, features), float("nan"), dtype=dtype),
    ]


def run(layers):
    """The results, `outs` of their own."""
    ops.spectral_weights(*map(list, zip(*layers, strict=True)))
    return [x[-1] for x in layers]


def by_hand(weight, u, s, vh, shift, strength):
    change = (s + strength * shift).clamp_min(0) - s
    return weight + torch.einsum("nr,r,rk->nk", u, change, vh)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_weights_against_float64(dtype):
    layers = [layer(*shape, dtype) for shape in SHAPES]
    for args, found in zip(layers, run(layers), strict=True):
        exact = by_hand(*widened(args[:-1]))
        assert_twofold(found, exact, ops.spectral_weight.reference(*args[:-1]))


@on_devices
def test_weights_alone_and_in_a_group_of_every_dtype_have_equal_bits():
    kinds = [(torch.float32, None), *((d, None) for d in LOW), *((d, torch.float32) for d in LOW)]
    layers = [layer(*shape, *kind) for kind in kinds for shape in ((33, 36, 33), (5, 7, 3))]
    together = run(layers)
    for args, found in zip(layers, together, strict=True):
        assert torch.equal(ops.spectral_weight(*args[:-1]), found)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_weights_with_strides_and_float32_factors(dtype):
    factors = torch.float32 if dtype in LOW else dtype
    plain = [layer(33, 20, 18, dtype), layer(33, 20, 18, dtype, factors)]
    views = [[strided(t) if t.dim() == 2 else t for t in args] for args in plain]
    for args, found in zip(plain, run(views), strict=True):
        exact = by_hand(*widened(args[:-1]))
        assert_twofold(found, exact, ops.spectral_weight.reference(*args[:-1]))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_weights_in_place(dtype):
    layers = [layer(33, 36, 33, dtype), layer(5, 7, 3, dtype)]
    apart = [t.clone() for t in run(layers)]
    for args in layers:
        args[-1] = args[0]
    assert all(map(torch.equal, run(layers), apart))


def test_version_counters_of_results_rise():
    layers = [layer(33, 36, 33), layer(5, 7, 3)]
    versions = [args[-1]._version for args in layers]
    run(layers)
    assert all(args[-1]._version > v for args, v in zip(layers, versions, strict=True))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_components_without_a_shift_do_not_count_whatever_the_factors_hold(dtype):
    args = layer(33, 40, 34, dtype)
    off = torch.arange(34) % 3 == 0
    args[4][off] = 0.0
    (plain,) = run([args])
    plain = plain.clone()
    args[1][:, off], args[3][off] = float("nan"), float("inf")
    assert torch.equal(run([args])[0], plain)
    args[0][0, 0] = -0.0
    args[4].zero_()
    (still,) = run([args])
    assert torch.equal(still, args[0]) and still[0, 0].signbit()


@on_devices
@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_a_shift_of_minus_infinity_takes_the_component_out(dtype):
    """W = U diag(s) Vᵀ of rank 2; without its larger component the smaller is left."""
    u, _ = torch.linalg.qr(randn(24, 2, seed=1))
    v, _ = torch.linalg.qr(randn(16, 2, seed=2))
    s = torch.tensor([4.0, 2.0])
    weight, u, vh = ((u * s) @ v.t()).to(dtype), u.to(dtype), v.t().contiguous().to(dtype)
    shift = torch.tensor([-1e9, 0.0])
    args = [weight, u, s, vh, shift, torch.tensor(1.0), torch.empty_like(weight)]
    (found,) = run([args])
    kept = 2.0 * torch.outer(u[:, 1].double(), vh[1].double())
    assert (found.double() - kept).abs().max() < 4 * 3 * torch.finfo(dtype).eps


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("count", "capability", "dtype", "factors", "weights", "dots"),
    [
        pytest.param(
            *(282, 80, torch.bfloat16, None, "spectral_weight_sm80", "spectral_dots_sm80"),
            marks=pytest.mark.slow,
        ),
        (50, 80, torch.bfloat16, None, "spectral_weight_sm80", "spectral_dots_sm80"),
        (50, 80, torch.float16, None, "spectral_weight_sm80", "spectral_dots_sm80"),
        (50, 80, torch.float16, torch.float32, "rank_update_sm80", "spectral_dots"),
        (50, 80, torch.float32, None, "rank_update", "spectral_dots"),
        (50, 75, torch.float16, None, "rank_update", "spectral_dots"),
    ],
    ids=str,
)
def test_a_model_is_one_launch(count, capability, dtype, factors, weights, dots):
    from fastlora import _emulator

    before = _emulator.capability()
    layers = [layer(9, 8 + i % 3, 7, dtype, factors) for i in range(count)]
    _emulator.set_capability(capability)
    try:
        with ops.emulated(runs=1):
            found = run(layers)
            assert _emulator.launches() == [weights]
            lists = [[args[i] for args in layers] for i in (0, 1, 3)]
            sums = ops.spectral_dots(*lists)
            assert _emulator.launches() == [dots, "spectral_sums"]
    finally:
        _emulator.set_capability(before)
    for args, result, dot in zip(layers, found, sums, strict=True):
        exact = by_hand(*widened(args[:-1]))
        assert_twofold(result, exact, ops.spectral_weight.reference(*args[:-1]))
        assert_twofold(dot, exact_dots(*args[:2], args[3]), low_dots(*args[:2], args[3]))


def exact_dots(grad, u, vh):
    return torch.einsum("nr,nk,rk->r", u.double(), grad.double(), vh.double())


def low_dots(grad, u, vh):
    return ops.spectral_dots.reference([grad], [u], [vh])[0]


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_dots_against_float64_alone_and_in_a_group(dtype):
    layers = [layer(*shape, dtype) for shape in SHAPES]
    if dtype in LOW:
        layers += [layer(*shape, dtype, torch.float32) for shape in SHAPES[:6]]
    lists = [[args[i] for args in layers] for i in (0, 1, 3)]
    together = ops.spectral_dots(*lists)
    for grad, u, vh, found in zip(*lists, together, strict=True):
        assert found.dtype == wide(dtype)
        assert_twofold(found, exact_dots(grad, u, vh), low_dots(grad, u, vh))
    for grad, u, vh, found in list(zip(*lists, together, strict=True))[4:8]:
        assert torch.equal(ops.spectral_dots([grad], [u], [vh])[0], found)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_dots_with_strides(dtype):
    plain = [layer(33, 20, 18, dtype)[i] for i in (0, 1, 3)]
    (found,) = ops.spectral_dots(*([strided(t)] for t in plain))
    assert_twofold(found, exact_dots(*plain), low_dots(*plain))
    transposed = [t.t().contiguous().t() for t in plain]
    (found,) = ops.spectral_dots(*([t] for t in transposed))
    assert_twofold(found, exact_dots(*plain), low_dots(*plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_dots_on_the_cpu_in_several_blocks(dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["fastlora.ops.spectral_dots"], "BLOCK", 100)
    grad, u, vh = (layer(50, 20, 18, dtype)[i] for i in (0, 1, 3))
    (found,) = ops.spectral_dots([grad], [u], [vh])
    assert_twofold(found, exact_dots(grad, u, vh), low_dots(grad, u, vh))


@pytest.fixture
def by_products(monkeypatch):
    """As if every size were large enough for torch's matrix product, in blocks of a few of the
    components."""
    module = sys.modules["fastlora.ops.spectral_weight"]
    monkeypatch.setattr(module, "LOOP", dict.fromkeys(module.LOOP, -1))
    monkeypatch.setattr(module, "COMPONENTS", 16)
    for op in (ops.spectral_weight, ops.spectral_weights):
        op.clear()
    yield
    for op in (ops.spectral_weight, ops.spectral_weights):
        op.clear()


@pytest.mark.usefixtures("by_products")
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
def test_weights_by_products_in_blocks(dtype):
    layers = [layer(*shape, dtype) for shape in SHAPES[:7]]
    for args, found in zip(layers, run(layers), strict=True):
        exact = by_hand(*widened(args[:-1]))
        assert_twofold(found, exact, ops.spectral_weight.reference(*args[:-1]))
        assert torch.equal(ops.spectral_weight(*args[:-1]), found)
    apart = [args[-1].clone() for args in layers]
    for args in layers:
        args[-1] = args[0]
    assert all(map(torch.equal, run(layers), apart))
    twice = [layer(5, 7, 3, dtype) for _ in range(2)]
    twice[1][-1] = twice[0][-1]
    with pytest.raises(ValueError, match="memory that no other layer's result uses"):
        run(twice)


def test_opcheck():
    lists = list(map(list, zip(layer(7, 5, 4), layer(3, 2, 2), strict=True)))
    torch.library.opcheck(ops.spectral_weights.overload, tuple(lists))
    torch.library.opcheck(ops.spectral_dots.overload, (lists[0], lists[1], lists[3]))


@pytest.mark.usefixtures("by_products")
def test_nothing_is_differentiated():
    args = layer(7, 5, 4)
    for tensor in args[:5]:
        tensor.requires_grad_()
    assert not run([args])[0].requires_grad
    (dots,) = ops.spectral_dots([args[0]], [args[1]], [args[3]])
    assert not dots.requires_grad


@pytest.mark.parametrize("enabled", [True, False], ids=["gradients", "no gradients"])
def test_gradient_mode_is_left_as_it_was(enabled):
    args = layer(7, 5, 4)
    args[0].requires_grad_()
    with torch.set_grad_enabled(enabled):
        ops.spectral_dots([args[0]], [args[1]], [args[3]])
        run([args])
        assert torch.is_grad_enabled() is enabled
        with pytest.raises(ValueError, match="memory that no other layer's result uses"):
            run([args, args])
        with pytest.raises(ops.ContractError):
            ops.spectral_dots([args[0]], [args[1]], [])
        assert torch.is_grad_enabled() is enabled


def test_no_layers():
    ops.spectral_weights([], [], [], [], [], [], [])
    assert ops.spectral_dots([], [], []) == []


BROKEN = {
    "count": (lambda a: a[4].pop(), "shifts: expected a list of 2 tensors, one for each layer"),
    "u": (lambda a: a[1].__setitem__(1, a[1][1][:-1]), "us[1]: expected float32 [3, 2], got"),
    "strength": (lambda a: a[5].__setitem__(0, torch.ones(1)), "strengths[0]: expected float32 []"),
    "out": (lambda a: a[6].__setitem__(1, a[6][1].half()), "outs[1]: expected float32 [3, 2], got"),
    "overlap": (
        lambda a: a[6].__setitem__(1, a[6][0].view(-1)[:6].view(3, 2)),
        "memory that no other layer's",
    ),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_contract_is_an_error_that_names_it(case):
    lists = list(map(list, zip(layer(7, 5, 4), layer(3, 2, 2), strict=True)))
    change, message = BROKEN[case]
    change(lists)
    with pytest.raises(ValueError, match="^spectral_weights: ") as caught:
        ops.spectral_weights(*lists)
    assert message in str(caught.value)


def test_broken_dots_are_errors_that_name_it():
    grad, u, vh = (layer(7, 5, 4)[i] for i in (0, 1, 3))
    for lists, message in (
        (([grad], [u], []), "vhs: expected a list of 1 tensors, one for each layer, got 0 tensors"),
        (([grad], [u.half()], [vh]), "us[0]: expected float32 [7, 4], got float16 [7, 4]"),
        (([grad], [u], [vh[:, 1:]]), "vhs[0]: expected float32 [4, 5], got float32 [4, 4]"),
    ):
        with pytest.raises(ops.ContractError) as caught:
            ops.spectral_dots(*lists)
        assert str(caught.value) == f"spectral_dots: {message}"
