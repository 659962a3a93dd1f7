import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from fastlora import ops
from fastlora.ops import _philox
from fastlora.ops.sampler_step import COLUMNS
from tests.devices import on_devices

SHAPES = [(1,), (0, 4), (3,), (2, 0, 5), (1, 1, 1), (3, 5), (2, 3, 5, 7), (3, 1030), (2, 4, 64, 65)]
LOW = [torch.float32, torch.float16, torch.bfloat16]
STEPS = 5


def dtype_id(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@dataclass
class Case:
    """Arguments of the operator, reproducible from what is said here."""

    shape: tuple[int, ...] = (3, 5, 7)
    n: int = 2
    x_dtype: torch.dtype = torch.float32
    output_dtype: torch.dtype = torch.float32
    input_dtype: torch.dtype = torch.float32
    history: bool = True
    seeds: bool = True
    copies: int = 2
    weight_steps: int = STEPS
    weight_batch: bool = True
    clip: float = 1.0
    changes: dict[str, float] = field(default_factory=dict)

    def arguments(self) -> list[Any]:
        g = torch.Generator().manual_seed(1)
        batch = self.shape[0]
        x = torch.randn(self.shape, generator=g, dtype=self.x_dtype)
        outputs = [
            torch.randn(self.shape, generator=g).to(self.output_dtype) for _ in range(self.n)
        ]
        rows = batch if self.weight_batch else 1
        weights = torch.randn(self.weight_steps, self.n, rows, generator=g, dtype=self.x_dtype)
        table = torch.randn(STEPS, len(COLUMNS), generator=g, dtype=self.x_dtype)
        for column, value in {"clip": self.clip, **self.changes}.items():
            table[:, COLUMNS.index(column)] = value
        history = torch.randn(self.shape, generator=g, dtype=self.x_dtype)
        seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g)
        return [
            x,
            outputs,
            weights,
            table,
            torch.tensor(3),
            history if self.history else None,
            seeds if self.seeds else None,
            self.copies,
            self.input_dtype,
        ]


def widened(arguments: list[Any]) -> list[Any]:
    """The same in float64: what the reference makes of it is the oracle."""

    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(v) for v in value]
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floating else value

    return [*(wide(a) for a in arguments[:-1]), torch.float64]


def magnitudes(arguments: list[Any]) -> list[Any]:
    """The same with every term positive: how large the sums are before their terms cancel."""

    def positive(value: Any) -> Any:
        if isinstance(value, list):
            return [positive(v) for v in value]
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.abs() if floating else value

    return [positive(a) for a in widened(arguments)]


def check(arguments: list[Any]) -> Any:
    """Error at most twice that of PyTorch's evaluation, or of one rounding (a single element's own
    error may happen to be 0)."""
    results = ops.sampler_step(*arguments)
    reference = ops.sampler_step.reference
    low, oracle = reference(*arguments), reference(*widened(arguments))
    sizes = reference(*magnitudes(arguments))
    for ours, theirs, exact, size in zip(results, low, oracle, sizes, strict=True):
        assert ours.shape == exact.shape and ours.dtype == theirs.dtype
        if exact.numel():
            error = (ours.double() - exact).abs().max()
            rounding = torch.finfo(ours.dtype).eps / 2 * exact.abs().max()
            rounding += torch.finfo(torch.float32).eps / 2 * size.abs().max()
            assert error <= 2 * max((theirs.double() - exact).abs().max(), rounding)
    return results


@on_devices
@pytest.mark.parametrize("input_dtype", LOW, ids=dtype_id)
@pytest.mark.parametrize("output_dtype", LOW, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, output_dtype, input_dtype):
    check(Case(shape, output_dtype=output_dtype, input_dtype=input_dtype).arguments())


@on_devices
@pytest.mark.parametrize("output_dtype", [*LOW, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(shape, output_dtype):
    """Nothing is more exact here: two orders of the same roundings are held against each other."""
    case = Case(shape, x_dtype=torch.float64, output_dtype=output_dtype, input_dtype=torch.float64)
    arguments = case.arguments()
    pairs = zip(ops.sampler_step(*arguments), ops.sampler_step.reference(*arguments), strict=True)
    for ours, theirs in pairs:
        scale = theirs.abs().max().item() if theirs.numel() else 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * scale * 2**-52)


@on_devices
@pytest.mark.parametrize("n", [1, 2, 3, 16])
@pytest.mark.parametrize("history", [True, False], ids=["history", "no-history"])
@pytest.mark.parametrize("seeds", [True, False], ids=["seeds", "no-seeds"])
@pytest.mark.parametrize("copies", [0, 1, 3])
def test_options(n, history, seeds, copies):
    x_next, h_next, model_input = check(
        Case((3, 1030), n=n, history=history, seeds=seeds, copies=copies).arguments()
    )
    assert model_input.shape == (copies * 3, 1030)
    assert h_next.shape == (x_next.shape if history else (0,))


@on_devices
@pytest.mark.parametrize("weight_steps", [1, STEPS])
@pytest.mark.parametrize("weight_batch", [True, False], ids=["per-sample", "shared"])
def test_weights(weight_steps, weight_batch):
    check(Case(weight_steps=weight_steps, weight_batch=weight_batch).arguments())


@on_devices
@pytest.mark.parametrize("output_dtype", LOW, ids=dtype_id)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_in_one_tensor(shape, n, output_dtype):
    """As a model that was called on n times the batch returns them."""
    x, outputs, *rest = Case(shape, n, output_dtype=output_dtype).arguments()
    stacked = check([x, [torch.cat(outputs)], *rest])
    pairs = zip(stacked, ops.sampler_step(x, outputs, *rest), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@on_devices
def test_defaults_and_keywords():
    x, outputs, weights, table, step, *_ = Case().arguments()
    short = ops.sampler_step(x, outputs, weights, table=table, step=step)
    full = ops.sampler_step(x, outputs, weights, table, step, None, None, 1, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(short, full, strict=True))


@on_devices
def test_by_hand():
    """One element with Python's floats, from the formula in samplers.md."""
    case = Case((1,), changes={"c_n": 0.0}, clip=0.25)
    x, (e0, e1), weights, table, step, h, *_ = arguments = case.arguments()
    t = dict(zip(COLUMNS, table[3].tolist(), strict=True))
    w = weights[3, :, 0].tolist()
    e = w[0] * e0.item() + w[1] * e1.item()
    x0 = min(max(t["k_x"] * x.item() + t["k_e"] * e, -0.25), 0.25)
    x_next = t["c_x"] * x.item() + t["c_0"] * x0 + t["c_e"] * e + t["c_h"] * h.item()
    h_next = t["g_x"] * x.item() + t["g_0"] * x0 + t["g_e"] * e
    results = ops.sampler_step(*arguments)
    expected = [[x_next], [h_next], [t["m"] * x_next] * 2]
    for result, values in zip(results, expected, strict=True):
        torch.testing.assert_close(result, torch.tensor(values))


@on_devices
def test_noise_is_the_reference_stream():
    others = dict.fromkeys(COLUMNS, 0.0) | {"c_n": 1.0, "m": 1.0}
    arguments = Case((4, 3000), n=1, history=False, changes=others, clip=1.0).arguments()
    z = ops.sampler_step(*arguments)[0]
    exact = _philox.normal(arguments[6], 3, 3000, torch.float64)
    low = _philox.normal(arguments[6], 3, 3000, torch.float32)
    assert (z - exact).abs().max() <= 2 * (low - exact).abs().max()


@on_devices
@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 65, 67)], ids=str)
def test_a_sample_does_not_depend_on_its_batch(shape):
    x, outputs, weights, table, step, history, seeds, *_ = Case(shape).arguments()
    batch = ops.sampler_step(x, outputs, weights, table, step, history, seeds, 1, torch.float32)
    for b in range(shape[0]):
        one = slice(b, b + 1)
        alone = ops.sampler_step(
            x[one],
            [output[one] for output in outputs],
            weights[:, :, one],
            table,
            step,
            history[one],
            seeds[one],
            1,
            torch.float32,
        )
        assert all(torch.equal(a, row[one]) for a, row in zip(alone, batch, strict=True))


def test_threads_do_not_change_bits():
    arguments = Case((3, 4, 128, 128)).arguments()
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.sampler_step(*arguments))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@on_devices
def test_no_noise_where_its_coefficient_is_zero():
    arguments = Case(changes={"c_n": 0.0}).arguments()
    without = [*arguments[:6], None, *arguments[7:]]
    pairs = zip(ops.sampler_step(*arguments), ops.sampler_step(*without), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@on_devices
def test_non_contiguous_inputs():
    plain = Case((6, 4, 10, 8)).arguments()
    x, outputs, weights, table, step, history, seeds, *rest = plain
    strided = [
        x.to(memory_format=torch.channels_last),
        [outputs[0].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), outputs[1]],
        weights.transpose(0, 2).contiguous().transpose(0, 2),
        table.t().contiguous().t(),
        step,
        torch.stack((history, history), dim=-1)[..., 0],
        seeds.repeat_interleave(2)[::2],
        *rest,
    ]
    assert not any(strided[i].is_contiguous() for i in (0, 2, 3, 5, 6))
    pairs = zip(ops.sampler_step(*strided), ops.sampler_step(*plain), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@on_devices
def test_expanded_inputs():
    plain = Case(weight_batch=False).arguments()
    wide = [*plain]
    wide[0] = plain[0][:1].expand_as(plain[0])
    plain[0] = wide[0].contiguous()
    wide[2] = plain[2].expand(-1, -1, 3)
    pairs = zip(ops.sampler_step(*wide), ops.sampler_step(*plain), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@on_devices
@pytest.mark.parametrize("output_dtype", LOW, ids=dtype_id)
def test_any_alignment(output_dtype):
    plain = Case((2, 64), output_dtype=output_dtype).arguments()

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    moved = [
        [shifted(o) for o in a] if isinstance(a, list) else shifted(a) if i in (0, 2, 3, 5) else a
        for i, a in enumerate(plain)
    ]
    assert moved[0].data_ptr() % 16 != 0
    pairs = zip(ops.sampler_step(*moved), ops.sampler_step(*plain), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@on_devices
def test_nan_and_infinity_pass_through_the_clip():
    x, outputs, *rest = Case((1, 8), clip=0.5, seeds=False).arguments()
    x[0, 0], outputs[0][0, 1], x[0, 2] = float("nan"), float("nan"), float("inf")
    results = ops.sampler_step(x, outputs, *rest)
    expected = ops.sampler_step.reference(x, outputs, *rest)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, equal_nan=True)
    assert results[0][0, :2].isnan().all() and not results[0][0, 3:].isnan().any()


@on_devices
@pytest.mark.parametrize("clip", [0.5, float("inf")])
def test_clip(clip):
    changes = dict.fromkeys(COLUMNS, 0.0) | {"k_x": 1.0, "c_0": 1.0, "m": 1.0}
    x, *rest = Case((2, 50), clip=clip, seeds=False, changes=changes | {"clip": clip}).arguments()
    assert torch.equal(ops.sampler_step(x, *rest)[0], x.clamp(-clip, clip))


@on_devices
def test_inputs_are_left_alone():
    arguments = Case().arguments()
    tensors = [arguments[0], *arguments[1], *(a for a in arguments[2:7] if a is not None)]
    before = [(t.clone(), t._version) for t in tensors]
    results = ops.sampler_step(*arguments)
    for t, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, value) and t._version == version
    assert not {t.data_ptr() for t in results} & {t.data_ptr() for t in tensors}


# --- torch's machinery ---------------------------------------------------------------------------


@pytest.mark.parametrize("history", [True, False], ids=["history", "no-history"])
@pytest.mark.parametrize("weight_batch", [True, False], ids=["per-sample", "shared"])
@pytest.mark.parametrize("weight_steps", [1, STEPS])
@pytest.mark.parametrize(("shape", "copies"), [((2, 3), 2), ((2,), 0)], ids=str)
def test_gradcheck(history, weight_batch, weight_steps, shape, copies):
    double = torch.float64
    case = Case(shape, 3, double, double, double, history, True, copies, weight_steps)
    x, outputs, weights, table, step, h, *rest = replace(
        case, weight_batch=weight_batch, clip=0.8
    ).arguments()
    inputs = [x, weights, *outputs, *([h] if history else [])]

    def f(x, weights, e0, e1, e2, h=None):
        results = ops.sampler_step(x, [e0, e1, e2], weights, table, step, h, *rest)
        return tuple(r for r in results if r.numel())

    def stacked(x, weights, e0, e1, e2, h=None):
        return ops.sampler_step(x, [torch.cat((e0, e1, e2))], weights, table, step, h, *rest)[0]

    inputs = tuple(t.requires_grad_() for t in inputs)
    torch.autograd.gradcheck(f, inputs)
    torch.autograd.gradgradcheck(f, inputs)
    torch.autograd.gradcheck(stacked, inputs)


@on_devices
@pytest.mark.parametrize("output_dtype", LOW, ids=dtype_id)
def test_gradients_are_those_of_the_reference(output_dtype):
    def gradients(f):
        x, outputs, weights, *rest, h, seeds, copies, dtype = Case(
            (2, 50), output_dtype=output_dtype, input_dtype=output_dtype
        ).arguments()
        leaves = [t.requires_grad_() for t in (x, *outputs, weights, h)]
        results = f(x, outputs, weights, *rest, h, seeds, copies, dtype)
        return torch.autograd.grad(sum((r.float() ** 2).sum() for r in results), leaves)

    ours, theirs = gradients(ops.sampler_step), gradients(ops.sampler_step.reference)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        tolerance = 8 * torch.finfo(b.dtype).eps * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_table_is_constant():
    arguments = Case().arguments()
    arguments[3].requires_grad_()
    with pytest.raises(ValueError, match="sampler_step: table: expected constants"):
        ops.sampler_step(*arguments)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(history=False, seeds=False, n=1, copies=1),
        Case(output_dtype=torch.bfloat16, input_dtype=torch.float16),
        Case((0, 3)),
    ],
    ids=["all", "least", "low", "empty"],
)
def test_opcheck(case):
    arguments = case.arguments()
    for t in (arguments[0], *arguments[1], arguments[2]):
        t.requires_grad_()
    torch.library.opcheck(ops.sampler_step.overload, arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_compile():
    @torch.compile(fullgraph=True)
    def loop(x, outputs, weights, table, steps, seeds):
        for i in range(2):
            x, _, model_input = ops.sampler_step(
                x, outputs, weights, table, steps[i], None, seeds, 2, torch.bfloat16
            )
            outputs = [half.float() * 0.5 for half in model_input.chunk(2)]
        return x, model_input

    x, outputs, weights, table, _, _, seeds, *_ = Case().arguments()
    arguments = (x, outputs, weights, table, torch.arange(STEPS), seeds)
    compiled = loop(*arguments)
    eager = loop._torchdynamo_orig_callable(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


def test_compiled_gradients():
    x, outputs, weights, *rest = Case().arguments()

    def loss(x):
        return sum(r.square().sum() for r in ops.sampler_step(x, outputs, weights, *rest))

    x.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (a,) = torch.autograd.grad(compiled(x), x)
    (b,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(a, b)


def test_modes():
    arguments = Case().arguments()
    expected = ops.sampler_step(*arguments)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            results = ops.sampler_step(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_meta_tensors():
    arguments = Case((2, 3), input_dtype=torch.bfloat16).arguments()

    def meta(a: Any) -> Any:
        if isinstance(a, list):
            return [meta(v) for v in a]
        return a.to("meta") if isinstance(a, torch.Tensor) else a

    x_next, h_next, model_input = ops.sampler_step(*map(meta, arguments))
    assert x_next.is_meta and x_next.shape == h_next.shape == (2, 3)
    assert model_input.shape == (4, 3) and model_input.dtype == torch.bfloat16


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa):
    """The loops that this machine would not choose; where it has only one, that one again."""
    program = (
        f"import runpy; tests = runpy.run_path({__file__!r})\n"
        "for dtype in tests['LOW']:\n"
        "    for shape in tests['SHAPES']:\n"
        "        tests['check'](tests['Case'](shape, 3, output_dtype=dtype, input_dtype=dtype)"
        ".arguments())\n"
    )
    environment = os.environ | {"FASTLORA_CPU_ISA": isa}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


# --- bad input -----------------------------------------------------------------------------------

BAD = [
    ("x-dtype", 0, lambda x: x.half(), r"x: expected float32 or float64, got float16 \[3, 5, 7\]"),
    ("x-scalar", 0, lambda x: x.sum(), r"x: expected at least one dimension .*, got float32 \[\]"),
    ("no-outputs", 1, lambda o: [], "outputs: expected 2 tensors, .* or all of them in one, got 0"),
    ("too-many", 1, lambda o: o * 9, "outputs: expected 2 tensors, as weights has, .*, got 18 ten"),
    ("stacked", 1, lambda o: o[:1], r"outputs\[0\]: expected \[6, 5, 7\], got float32 \[3, 5, 7\]"),
    (
        "output-shape",
        1,
        lambda o: [o[0], o[1][:2]],
        r"outputs\[1\]: expected \[3, 5, 7\], got float32 \[2, 5, 7\]",
    ),
    (
        "output-dtype",
        1,
        lambda o: [t.double() for t in o],
        r"outputs\[0\]: expected one of float32, float16, bfloat16, got float64 \[3, 5, 7\]",
    ),
    (
        "output-dtypes",
        1,
        lambda o: [o[0], o[1].half()],
        r"outputs\[1\]: expected torch.float32 as others, got float16 \[3, 5, 7\]",
    ),
    (
        "weights-shape",
        2,
        lambda w: w[:2],
        r"weights: expected \[5 or 1, n, 3 or 1\] with n from 1 to 16, got float32 \[2, 2, 3\]",
    ),
    (
        "weights-n",
        2,
        lambda w: w.repeat(1, 9, 1),
        r"weights: expected .*, got float32 \[5, 18, 3\]",
    ),
    ("weights-rank", 2, lambda w: w[0], r"weights: expected .*, got float32 \[2, 3\]"),
    (
        "weights-dtype",
        2,
        lambda w: w.double(),
        "weights: expected float32 or x's dtype, got float64",
    ),
    ("table-shape", 3, lambda t: t[:, :11], r"table: expected \[S, 12\] .*, got float32 \[5, 11\]"),
    ("table-empty", 3, lambda t: t[:0], r"table: expected \[S, 12\] with S >= 1, got .*\[0, 12\]"),
    (
        "table-dtype",
        3,
        lambda t: t.bfloat16(),
        "table: expected float32 or x's dtype, got bfloat16",
    ),
    ("step-dtype", 4, lambda s: s.int(), r"step: expected int64 \[\], got int32 \[\]"),
    ("step-shape", 4, lambda s: s[None], r"step: expected int64 \[\], got int64 \[1\]"),
    ("step-large", 4, lambda s: s + 2, "step: expected a row of the table, 0 to 4, got 5"),
    ("step-negative", 4, lambda s: s - 4, "step: expected a row of the table, 0 to 4, got -1"),
    ("history-shape", 5, lambda h: h[0], r"history: expected x's shape .*, got float32 \[5, 7\]"),
    (
        "history-dtype",
        5,
        lambda h: h.half(),
        "history: expected x's dtype torch.float32, got float16",
    ),
    ("seeds-dtype", 6, lambda s: s.float(), r"seeds: expected int64 \[3\], got float32 \[3\]"),
    ("seeds-shape", 6, lambda s: s[:2], r"seeds: expected int64 \[3\], got int64 \[2\]"),
    ("copies", 7, lambda c: -1, "copies: expected 0 or more, got -1"),
    (
        "input-dtype",
        8,
        lambda d: torch.float64,
        "input_dtype: expected one of float32, float16, bfloat16, got torch.float64",
    ),
]


@pytest.mark.parametrize(
    ("position", "change", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_input(position, change, message):
    arguments = Case().arguments()
    arguments[position] = change(arguments[position])
    with pytest.raises(ValueError, match=f"^sampler_step: {message}"):
        ops.sampler_step(*arguments)


@pytest.mark.parametrize("position", [0, 2, 3, 4, 5, 6])
def test_not_a_tensor(position):
    arguments = Case().arguments()
    name = ("x", "", "weights", "table", "step", "history", "seeds")[position]
    arguments[position] = 1.5
    with pytest.raises(TypeError, match=f"^sampler_step: {name}: expected a tensor.*, got float"):
        ops.sampler_step(*arguments)


def test_bad_input_under_compilation():
    arguments = Case().arguments()
    arguments[1] = arguments[1][:1]
    compiled = torch.compile(lambda: ops.sampler_step(*arguments), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"sampler_step: outputs\[0\]: expected \[6, 5, 7\], got"):
        compiled()
