import os
import subprocess
import sys

import pytest
import torch

from fastlora import ops
from fastlora.ops import _philox
from fastlora.ops.sampler_step import COLUMNS
from tests.devices import on_devices
from tests.ops.sampler_cases import LOW, SHAPES, STEPS, Case, alone, check, name_of, same_bits

EVERYTHING = Case((3, 4, 20, 20), n=3, rescale=3, mask=(3, 1, 20, 20), quantile=0.9)


@on_devices
@pytest.mark.parametrize("input_dtype", LOW, ids=name_of)
@pytest.mark.parametrize("output_dtype", LOW, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, output_dtype, input_dtype):
    case = Case(shape, output_dtype=output_dtype, input_dtype=input_dtype)
    check(ops.sampler_step, case.arguments())


@on_devices
@pytest.mark.parametrize("output_dtype", [*LOW, torch.float64], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(shape, output_dtype):
    """Nothing is more exact here: two orders of the same roundings are held against each other."""
    mask = shape if len(shape) > 1 else None
    case = Case(shape, 2, torch.float64, output_dtype, torch.float64, mask=mask, quantile=0.3)
    arguments = case.arguments()
    pairs = zip(ops.sampler_step(**arguments), ops.sampler_step.reference(**arguments), strict=True)
    for ours, theirs in pairs:
        scale = theirs.abs().max().item() if theirs.numel() else 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * scale * 2**-52)


@on_devices
@pytest.mark.parametrize("x_dtype", LOW[1:], ids=name_of)
@pytest.mark.parametrize("output_dtype", LOW, ids=name_of)
@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (2, 4, 64, 65)], ids=str)
def test_x_in_16_bits_is_rounded_once(shape, history, output_dtype, x_dtype):
    """x' is the exact one rounded, up to what float32 arithmetic is off; so is the model input,
    which is not made of the rounded x'."""
    case = Case(shape, 2, x_dtype, output_dtype, x_dtype, history, quantile=0.5)
    arguments = case.arguments()
    results = check(ops.sampler_step, arguments)
    wide = mapped_to_float32(arguments)
    for result, float32 in zip(results[::2], ops.sampler_step.reference(**wide)[::2], strict=True):
        assert result.dtype == x_dtype
        half_ulp = torch.finfo(x_dtype).eps / 2 * float32.abs()
        off = (result.float() - float32).abs()
        assert (off <= half_ulp + 1e-5).all()


def mapped_to_float32(arguments):
    return arguments | {"x": arguments["x"].float(), "input_dtype": torch.float32}


@on_devices
@pytest.mark.parametrize("n", [1, 2, 3, 16])
@pytest.mark.parametrize("history", [0, 1, 2])
@pytest.mark.parametrize("noise", ["seeds", "tensor", "none"])
@pytest.mark.parametrize("copies", [0, 1, 3])
def test_options(n, history, noise, copies):
    case = Case((3, 1030), n=n, history=history, noise=noise, copies=copies)
    _, history_next, model_input = check(ops.sampler_step, case.arguments())
    assert model_input.shape == (copies * 3, 1030)
    assert history_next.shape == ((history, 3, 1030) if history else (0,))


@on_devices
@pytest.mark.parametrize("shape", [(1,), (2, 0), (3, 1030), (2, 4, 64, 65)], ids=str)
@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("history", [0, 1])
@pytest.mark.parametrize("n", [1, 2])
def test_rows_without_x0(n, history, copies, shape):
    """What most solvers' rows are: sums of x, e and h, and no noise."""
    columns = {"c_0": 0.0, "g_0": 0.0, "c_n": 0.0}
    case = Case(shape, n=n, history=history, copies=copies, clip=float("inf"), columns=columns)
    arguments = case.arguments()
    x_next, history_next, model_input = check(ops.sampler_step, arguments)
    assert torch.equal(model_input, model_input[: shape[0]].repeat(copies, *[1] * (len(shape) - 1)))
    for b in range(shape[0]):
        one = slice(b, b + 1)
        expected = (
            x_next[one],
            history_next[:, one] if history else history_next,
            model_input[one],
        )
        assert same_bits(ops.sampler_step(**alone(arguments, b)), expected)


@on_devices
@pytest.mark.parametrize("history", [0, 1, 2])
@pytest.mark.parametrize("weight_steps", [1, STEPS])
@pytest.mark.parametrize("weight_batch", [True, False], ids=["per-sample", "shared"])
def test_weights(weight_steps, weight_batch, history):
    case = Case(weight_steps=weight_steps, weight_batch=weight_batch, history=history)
    check(ops.sampler_step, case.arguments())


@on_devices
@pytest.mark.parametrize("zero", COLUMNS[:-1])
@pytest.mark.parametrize("others", ["random", "zero"])
def test_columns_of_zero(zero, others):
    """Sums leave them out, and tensors and passes that nobody wants."""
    columns = dict.fromkeys(COLUMNS[:-1], 0.0) if others == "zero" else {}
    columns[zero] = 0.75 if others == "zero" else 0.0
    if others == "zero" and zero not in ("m", "k_x", "k_e"):
        columns |= {"m": 1.0, "k_x": 1.0}
    check(ops.sampler_step, Case(columns=columns, mask=(1, 5, 7)).arguments())


@on_devices
@pytest.mark.parametrize("output_dtype", LOW, ids=name_of)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_in_one_tensor(shape, n, output_dtype):
    """As a model that was called on n times the batch returns them."""
    arguments = Case(shape, n, output_dtype=output_dtype).arguments()
    stacked = arguments | {"outputs": [torch.cat(arguments["outputs"])]}
    results = check(ops.sampler_step, stacked)
    assert same_bits(results, ops.sampler_step(**arguments))


@on_devices
def test_defaults_and_positions():
    arguments = Case(copies=1).arguments()
    x, outputs, weights, table, step, *_ = arguments.values()
    short = ops.sampler_step(x, outputs, weights, table=table, step=step)
    full = ops.sampler_step(
        x, outputs, weights, table, step, *[None] * 6, 0.0, 1.0, 1, torch.float32
    )
    assert same_bits(short, full)
    assert same_bits(ops.sampler_step(*arguments.values()), ops.sampler_step(**arguments))


@on_devices
@pytest.mark.parametrize("mask", [0.0, 0.25, 1.0])
def test_by_hand(mask):
    """One element with Python's floats, from the formula."""
    arguments = Case((1,), noise="tensor", clip=0.25).arguments()
    t = dict(zip(COLUMNS, arguments["table"][3].tolist(), strict=True))
    x, z = arguments["x"].item(), arguments["noise"].item()
    h, r = arguments["history"].flatten().tolist()
    w = arguments["weights"][3, :, 0].tolist()
    e = sum(w_j * e_j.item() for w_j, e_j in zip(w, arguments["outputs"], strict=True))
    x0 = min(max(t["k_x"] * x + t["k_e"] * e, -0.25), 0.25)

    def combined(c: str) -> float:
        names = zip(("x", "0", "e", "h", "r"), (x, x0, e, h, r), strict=True)
        return sum(t[f"{c}_{name}"] * value for name, value in names)

    x_next = combined("c") + t["c_n"] * z
    if mask < 1:
        seeds, known = torch.tensor([5]), torch.tensor([0.5])
        z, z0 = (_philox.normal(seeds, s, 1, torch.float64).item() for s in (3, -1))
        x_next = combined("c") + t["c_n"] * z
        x_next = mask * x_next + (1 - mask) * (t["p_0"] * 0.5 + t["p_e"] * z0)
        arguments |= {"noise": None, "seeds": seeds, "known": known, "mask": torch.tensor([mask])}
    results = ops.sampler_step(**arguments)
    expected = [[x_next], [[combined("g")], [combined("r")]], [t["m"] * x_next] * 2]
    for result, values in zip(results, expected, strict=True):
        torch.testing.assert_close(result, torch.tensor(values))


@on_devices
def test_noise_is_the_reference_stream():
    columns = dict.fromkeys(COLUMNS, 0.0) | {"c_n": 1.0, "m": 1.0, "clip": 1.0}
    arguments = Case((4, 3000), n=1, history=0, columns=columns).arguments()
    z = ops.sampler_step(**arguments)[0]
    exact = _philox.normal(arguments["seeds"], 3, 3000, torch.float64)
    low = _philox.normal(arguments["seeds"], 3, 3000, torch.float32)
    assert (z - exact).abs().max() <= 2 * (low - exact).abs().max()


@on_devices
def test_noise_may_be_given():
    """The noise of the seeds as a tensor, beside the seeds."""
    arguments = Case((4, 3000)).arguments()
    columns = dict.fromkeys(COLUMNS, 0.0) | {"c_n": 1.0, "clip": 1.0}
    only = Case((4, 3000), history=0, columns=columns).arguments()
    z = ops.sampler_step(**only)[0]
    given = ops.sampler_step(**arguments | {"seeds": None, "noise": z})
    assert same_bits(given, ops.sampler_step(**arguments))


@on_devices
@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 65, 67)], ids=str)
@pytest.mark.parametrize("statistics", [False, True], ids=["plain", "statistics"])
def test_a_sample_does_not_depend_on_its_batch(shape, statistics):
    more = {"rescale": 5, "quantile": 0.99, "mask": shape} if statistics else {}
    arguments = Case(shape, copies=1, **more).arguments()
    x_next, history_next, model_input = ops.sampler_step(**arguments)
    for b in range(shape[0]):
        one = slice(b, b + 1)
        expected = (x_next[one], history_next[:, one], model_input[one])
        assert same_bits(ops.sampler_step(**alone(arguments, b)), expected)


def test_results_larger_than_the_caches():
    """They are written past them, at addresses that are no multiples of anything."""
    shape = (3, 4, 211, 199)  # 18 MB with 12 model inputs
    arguments = Case(
        shape, copies=12, input_dtype=torch.bfloat16, mask=(1, 1, *shape[2:])
    ).arguments()
    x_next, history_next, model_input = ops.sampler_step(**arguments)
    for b in range(3):
        one = ops.sampler_step(**alone(arguments, b))
        parts = (x_next[b : b + 1], history_next[:, b : b + 1], model_input[b : b + 1])
        assert same_bits(one, parts)
    assert torch.equal(model_input, model_input[:3].repeat(12, 1, 1, 1))


def test_threads_do_not_change_bits():
    threads = torch.get_num_threads()
    case = Case((3, 4, 128, 128), rescale=1, quantile=0.995, mask=(1, 1, 128, 128))
    arguments = case.arguments()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.sampler_step(**arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(results[0], other) for other in results[1:])


@on_devices
def test_no_noise_where_its_coefficient_is_zero():
    arguments = Case(columns={"c_n": 0.0}).arguments()
    without = ops.sampler_step(**arguments | {"seeds": None})
    assert same_bits(ops.sampler_step(**arguments), without)


@on_devices
def test_non_contiguous_inputs():
    plain = Case((6, 4, 10, 8), rescale=6, mask=(6, 1, 10, 8), quantile=0.7).arguments()

    def backwards(t: torch.Tensor) -> torch.Tensor:
        order = tuple(reversed(range(t.dim())))
        return t.permute(order).contiguous().permute(order)

    strided = plain | {
        name: backwards(plain[name]) for name in ("weights", "table", "mask", "known", "history")
    }
    strided["x"] = plain["x"].to(memory_format=torch.channels_last)
    strided["outputs"] = [backwards(plain["outputs"][0]), plain["outputs"][1]]
    strided["seeds"] = plain["seeds"].repeat_interleave(2)[::2]
    strided["rescale"] = plain["rescale"].repeat_interleave(2)[::2]
    changed = [strided[name] for name in strided if strided[name] is not plain[name]]
    assert not any(t.is_contiguous() for t in changed if isinstance(t, torch.Tensor))
    results = ops.sampler_step(**plain)
    assert same_bits(ops.sampler_step(**strided), results)
    noise = plain["known"]
    given = plain | {"seeds": None, "mask": None, "known": None, "noise": noise}
    turned = given | {"noise": backwards(noise)}
    assert same_bits(ops.sampler_step(**turned), ops.sampler_step(**given))


@on_devices
def test_expanded_inputs():
    plain = Case(weight_batch=False, mask=(1, 1, 7), rescale=1).arguments()
    plain["x"] = plain["x"][:1].repeat(3, 1, 1)
    wide = plain | {
        "x": plain["x"][:1].expand_as(plain["x"]),
        "weights": plain["weights"].expand(-1, -1, 3),
        "mask": plain["mask"].expand(3, 5, 7),
        "rescale": plain["rescale"].expand(3),
    }
    assert same_bits(ops.sampler_step(**wide), ops.sampler_step(**plain))


@on_devices
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("output_dtype", LOW, ids=name_of)
@pytest.mark.parametrize("shape", [(2, 64), (2, 3, 8), (2, 3, 4)], ids=str)
def test_any_alignment(shape, output_dtype, x_dtype):
    """Also of one tensor alone."""
    more = {"mask": (2, 1, *shape[2:]), "rescale": 2, "quantile": 0.5}
    plain = Case(shape, x_dtype=x_dtype, output_dtype=output_dtype, **more).arguments()
    expected = ops.sampler_step(**plain)

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    for name in ("x", "history", "weights", "table", "rescale", "mask", "known"):
        moved = plain | {name: shifted(plain[name])}
        assert moved[name].data_ptr() % 16 != 0
        assert same_bits(ops.sampler_step(**moved), expected)
    moved["outputs"] = [plain["outputs"][0], shifted(plain["outputs"][1])]
    assert same_bits(ops.sampler_step(**moved), expected)


@on_devices
def test_nan_and_infinity_pass_through_the_clip():
    arguments = Case((1, 8), clip=0.5, noise="none").arguments()
    nan = float("nan")
    arguments["x"][0, 0], arguments["outputs"][0][0, 1] = nan, nan
    arguments["x"][0, 2] = float("inf")
    results = ops.sampler_step(**arguments)
    expected = ops.sampler_step.reference(**arguments)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, equal_nan=True)
    assert results[0][0, :2].isnan().all() and not results[0][0, 3:].isnan().any()


@on_devices
@pytest.mark.parametrize("clip", [0.5, float("inf")])
def test_clip(clip):
    columns = dict.fromkeys(COLUMNS, 0.0) | {"k_x": 1.0, "c_0": 1.0, "m": 1.0, "clip": clip}
    arguments = Case((2, 50), noise="none", columns=columns).arguments()
    x_next = ops.sampler_step(**arguments)[0]
    assert torch.equal(x_next, arguments["x"].clamp(-clip, clip))


@on_devices
def test_inputs_are_left_alone():
    arguments = EVERYTHING.arguments()
    flat = [*arguments["outputs"], *arguments.values()]
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    before = [(t.clone(), t._version) for t in tensors]
    results = ops.sampler_step(**arguments)
    for t, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, value) and t._version == version
    assert not {t.data_ptr() for t in results} & {t.data_ptr() for t in tensors}


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(history=0, noise="none"), ["sampler_step"]),
        (Case(mask=(1, 1, 7)), ["sampler_step"]),
        (EVERYTHING, ["sampler_statistics", "sampler_step"]),
    ],
    ids=["plain", "options", "everything"],
)
def test_launches(case, expected):
    with ops.emulated():
        ops.sampler_step(**case.arguments())
    from fastlora import _emulator

    assert _emulator.launches() == expected


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa):
    """The loops that this machine would not choose; where it has only one, that one again."""
    program = (
        "from fastlora import ops\n"
        "from tests.ops.sampler_cases import Case, LOW, SHAPES, check\n"
        "for dtype in LOW:\n"
        "    for shape in SHAPES:\n"
        "        mask = (1, 1, *shape[2:]) if len(shape) > 1 else (1,)\n"
        "        some = {'rescale': 1} if len(shape) > 1 and shape[-1] > 1 else {}\n"
        "        case = Case(shape, 3, dtype, dtype, dtype, mask=mask, quantile=0.9, **some)\n"
        "        check(ops.sampler_step, case.arguments())\n"
    )
    environment = os.environ | {"FASTLORA_CPU_ISA": isa}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
