from typing import Any

import pytest
import torch

from fastlora import Schedule, ops
from fastlora.ops import _philox
from tests.devices import on_devices

SHAPES = [(1,), (0, 4), (3,), (2, 0, 5), (1, 1, 1), (3, 5), (2, 3, 5, 7), (3, 1030), (2, 4, 64, 65)]
LOW = [torch.float32, torch.float16, torch.bfloat16]
ROWS = 10


def dtype_id(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def arguments(
    shape: tuple[int, ...] = (3, 5, 7), dtype: torch.dtype = torch.float32, seeded: bool = False
) -> list[Any]:
    g = torch.Generator().manual_seed(1)
    x0 = torch.randn(shape, generator=g).to(dtype)
    noise = torch.randn(shape, generator=g).to(dtype)
    seeds = torch.randint(-(2**63), 2**63 - 1, shape[:1], generator=g)
    t = torch.randint(ROWS, shape[:1], generator=g)
    table = torch.randn(ROWS, 4, generator=g)
    return [x0, None if seeded else noise, seeds if seeded else None, t, table]


def widened(args: list[Any]) -> list[Any]:
    return [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]


@on_devices
@pytest.mark.parametrize("seeded", [True, False], ids=["seeds", "noise"])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, seeded):
    args = arguments(shape, dtype, seeded)
    results = ops.add_noise(*args)
    low, oracle = ops.add_noise.reference(*args), ops.add_noise.reference(*widened(args))
    for ours, theirs, exact in zip(results, low, oracle, strict=True):
        assert ours.shape == exact.shape and ours.dtype == dtype
        if exact.numel():
            # at most twice PyTorch's error, or two roundings where it has made none
            error = (ours.double() - exact).abs().max()
            rounding = torch.finfo(dtype).eps * exact.abs().max()
            assert error <= 2 * max((theirs.double() - exact).abs().max(), rounding)


@on_devices
def test_by_hand():
    x0, noise, _, _, table = arguments((1,))
    alpha, sigma, p_0, p_e = table[7].tolist()
    x_t, target = ops.add_noise(x0, noise, None, torch.tensor([7]), table)
    x, eps = x0.item(), noise.item()
    torch.testing.assert_close(x_t, torch.tensor([alpha * x + sigma * eps]))
    torch.testing.assert_close(target, torch.tensor([p_0 * x + p_e * eps]))


@on_devices
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_like_diffusers(prediction):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    schedule = Schedule.scaled_linear(beta_start=0.0001, beta_end=0.02)
    x0, noise, *_ = arguments((4, 3, 8, 8))
    t = torch.tensor([0, 10, 500, 999])
    x_t, target = ops.add_noise(x0, noise, None, t, schedule.noise_table(prediction))
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, t), rtol=0, atol=1e-5)
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-5)


@on_devices
def test_noise_is_the_reference_stream():
    *_, seeds, t, _ = arguments((3, 1030), seeded=True)
    table = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    eps, again = ops.add_noise(torch.zeros(3, 1030), None, seeds, torch.zeros_like(t), table)
    exact = _philox.normal(seeds, _philox.START, 1030, torch.float64)
    low = _philox.normal(seeds, _philox.START, 1030, torch.float32)
    assert (eps - exact).abs().max() <= 2 * (low - exact).abs().max()
    assert torch.equal(eps, again)


@on_devices
@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 65, 67)], ids=str)
def test_a_sample_does_not_depend_on_its_batch(shape):
    x0, _, seeds, t, table = arguments(shape, seeded=True)
    batch = ops.add_noise(x0, None, seeds, t, table)
    for b in range(shape[0]):
        one = slice(b, b + 1)
        alone = ops.add_noise(x0[one], None, seeds[one], t[one], table)
        assert all(torch.equal(a, row[one]) for a, row in zip(alone, batch, strict=True))


@on_devices
@pytest.mark.parametrize("seeded", [True, False], ids=["seeds", "noise"])
def test_non_contiguous_inputs(seeded):
    x0, noise, seeds, t, table = plain = arguments((6, 4, 10, 8), seeded=seeded)
    strided = [
        x0.to(memory_format=torch.channels_last),
        None if noise is None else noise.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        None if seeds is None else seeds.repeat_interleave(2)[::2],
        t.repeat_interleave(3)[::3],
        table.t().contiguous().t(),
    ]
    assert not any(a.is_contiguous() for a in strided if a is not None)
    pairs = zip(ops.add_noise(*strided), ops.add_noise(*plain), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@on_devices
@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_any_alignment(dtype):
    x0, noise, *rest = arguments((2, 64), dtype)

    def shifted(t):
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    pairs = zip(
        ops.add_noise(shifted(x0), shifted(noise), *rest),
        ops.add_noise(x0, noise, *rest),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@on_devices
def test_inputs_are_left_alone():
    args = arguments()
    before = [(a.clone(), a._version) for a in args if a is not None]
    ops.add_noise(*args)
    for a, (value, version) in zip([a for a in args if a is not None], before, strict=True):
        assert torch.equal(a, value) and a._version == version


# --- torch's machinery ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3), (2,)], ids=str)
def test_gradcheck(shape):
    x0, noise, _, t, table = widened(arguments(shape))
    x0.requires_grad_(), noise.requires_grad_()
    torch.autograd.gradcheck(lambda a, b: ops.add_noise(a, b, None, t, table), (x0, noise))
    torch.autograd.gradgradcheck(lambda a, b: ops.add_noise(a, b, None, t, table), (x0, noise))
    seeds = torch.tensor([3, 4])
    torch.autograd.gradcheck(lambda a: ops.add_noise(a, None, seeds, t, table), (x0,))


@on_devices
@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_gradients_are_those_of_the_reference(dtype):
    def gradients(f):
        x0, noise, *rest = arguments((2, 50), dtype)
        results = f(x0.requires_grad_(), noise.requires_grad_(), *rest)
        return torch.autograd.grad(sum((r.float() ** 2).sum() for r in results), (x0, noise))

    ours, theirs = gradients(ops.add_noise), gradients(ops.add_noise.reference)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        tolerance = 8 * torch.finfo(dtype).eps * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_table_is_constant():
    *args, table = arguments()
    with pytest.raises(ValueError, match="add_noise: table: expected constants"):
        ops.add_noise(*args, table.requires_grad_())


@pytest.mark.parametrize("seeded", [True, False], ids=["seeds", "noise"])
@pytest.mark.parametrize("shape", [(3, 5), (0, 3)], ids=str)
def test_opcheck(shape, seeded):
    x0, *rest = arguments(shape, torch.bfloat16, seeded)
    torch.library.opcheck(ops.add_noise.overload, (x0.requires_grad_(), *rest))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_compile():
    def loss(x0, seeds, t, table):
        x_t, target = ops.add_noise(x0, None, seeds, t, table)
        return (x_t.sin() - target).square().mean()

    x0, _, *rest = arguments(seeded=True)
    x0.requires_grad_()
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x0, *rest), x0)
    (eager,) = torch.autograd.grad(loss(x0, *rest), x0)
    torch.testing.assert_close(compiled, eager)


def test_modes():
    args = arguments(seeded=True)
    expected = ops.add_noise(*args)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            results = ops.add_noise(*args)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# --- bad input -----------------------------------------------------------------------------------

BAD = [
    ("x0-dtype", 0, lambda x: x.int(), r"x0: expected float32, .*, got int32 \[3, 5, 7\]"),
    (
        "x0-scalar",
        0,
        lambda x: x.sum(),
        r"x0: expected at least one dimension .*, got float32 \[\]",
    ),
    ("neither", 1, lambda n: None, "noise: expected either noise or seeds, got neither"),
    ("both", 2, lambda s: torch.arange(3), "noise: expected either noise or seeds, got both"),
    ("noise-shape", 1, lambda n: n[:2], r"noise: expected x0's shape .*, got float32 \[2, 5, 7\]"),
    ("noise-dtype", 1, lambda n: n.half(), "noise: expected x0's dtype torch.float32, got float16"),
    ("t-dtype", 3, lambda t: t.int(), r"t: expected int64 \[3\], got int32 \[3\]"),
    ("t-shape", 3, lambda t: t[:1], r"t: expected int64 \[3\], got int64 \[1\]"),
    ("t-large", 3, lambda t: t * 0 + ROWS, "t: expected rows of the table, 0 to 9, got 10"),
    ("t-negative", 3, lambda t: t * 0 - 1, "t: expected rows of the table, 0 to 9, got -1"),
    (
        "table-shape",
        4,
        lambda t: t[:, :3],
        r"table: expected \[steps, 4\] .*, got float32 \[10, 3\]",
    ),
    ("table-empty", 4, lambda t: t[:0], r"table: expected .* steps >= 1, got float32 \[0, 4\]"),
    ("table-dtype", 4, lambda t: t.double(), "table: expected torch.float32, got float64"),
]


@pytest.mark.parametrize(
    ("position", "change", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input(position, change, message):
    args = arguments()
    args[position] = change(args[position])
    with pytest.raises(ValueError, match=f"^add_noise: {message}"):
        ops.add_noise(*args)


@pytest.mark.parametrize("seeds", [torch.zeros(3), torch.zeros(2, dtype=torch.int64)], ids=str)
def test_bad_seeds(seeds):
    x0, _, _, t, table = arguments()
    with pytest.raises(ValueError, match=r"^add_noise: seeds: expected int64 \[3\], got"):
        ops.add_noise(x0, None, seeds, t, table)


@pytest.mark.parametrize(("position", "name"), [(0, "x0"), (1, "noise"), (3, "t"), (4, "table")])
def test_not_a_tensor(position, name):
    args = arguments()
    args[position] = [1.0]
    with pytest.raises(TypeError, match=f"^add_noise: {name}: expected a tensor.*, got list"):
        ops.add_noise(*args)
