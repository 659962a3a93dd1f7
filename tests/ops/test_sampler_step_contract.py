"""`sampler_step` in torch's machinery, and what it refuses."""

import pytest
import torch

from fastlora import ops
from tests.devices import on_devices
from tests.ops.sampler_cases import LOW, STEPS, Case, mapped, name_of, same_bits

EVERYTHING = Case((2, 3, 4), 3, rescale=2, mask=(2, 1, 4), quantile=0.7, threshold_max=3.0)


# --- gradients ------------------------------------------------------------------------------------


def differentiable(case: Case) -> tuple[dict, list[str]]:
    """Arguments in float64 and the names of those with a gradient."""
    arguments = mapped(torch.Tensor.double, case.arguments()) | {"input_dtype": torch.float64}
    names = ("x", "weights", "table", "history", "noise", "rescale", "mask", "known")
    return arguments, [name for name in names if arguments[name] is not None]


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 3), 3, clip=0.8),
        Case((2,), 3, history=1, noise="tensor", copies=0, weight_steps=1, weight_batch=False),
        Case((2, 3), 1, history=0, noise="none", weight_batch=False),
        EVERYTHING,
    ],
    ids=["clip", "noise", "least", "everything"],
)
def test_gradcheck(case):
    arguments, names = differentiable(case)
    outputs = arguments["outputs"]
    inputs = [*outputs, *(arguments[name] for name in names)]
    inputs = tuple(t.detach().requires_grad_() for t in inputs)

    def f(*tensors):
        given = dict(zip(names, tensors[len(outputs) :], strict=True))
        given["outputs"] = list(tensors[: len(outputs)])
        return tuple(r for r in ops.sampler_step(**arguments | given) if r.numel())

    torch.autograd.gradcheck(f, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_gradcheck_of_outputs_in_one_tensor():
    arguments, _ = differentiable(Case((2, 3), 3))
    stacked = torch.cat(arguments["outputs"]).requires_grad_()

    def f(stacked):
        return ops.sampler_step(**arguments | {"outputs": [stacked]})

    torch.autograd.gradcheck(f, stacked)
    torch.autograd.gradgradcheck(f, stacked)


@on_devices
@pytest.mark.parametrize("x_dtype", LOW[:2], ids=name_of)
@pytest.mark.parametrize("output_dtype", LOW, ids=name_of)
def test_gradients_are_those_of_the_reference(output_dtype, x_dtype):
    def gradients(f):
        case = Case((2, 50), 2, x_dtype, output_dtype, output_dtype, rescale=2, quantile=0.9)
        arguments = case.arguments()
        leaves = [*arguments["outputs"], *(arguments[k] for k in ("x", "weights", "history"))]
        for leaf in leaves:
            leaf.requires_grad_()
        return torch.autograd.grad(sum((r.float() ** 2).sum() for r in f(**arguments)), leaves)

    pairs = zip(gradients(ops.sampler_step), gradients(ops.sampler_step.reference), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype and b.abs().max() > 0
        tolerance = 8 * torch.finfo(b.dtype).eps * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_the_contract_holds_where_a_gradient_is_wanted():
    """Where torch alone would broadcast."""
    arguments = Case().arguments()
    arguments["x"].requires_grad_()
    arguments["noise"], arguments["seeds"] = torch.randn(1, 1, 7), None
    with pytest.raises(ValueError, match=r"^sampler_step: noise: expected float32 \[3, 5, 7\]"):
        ops.sampler_step(**arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.func's own
def test_forward_mode():
    arguments, _ = differentiable(Case((2, 3), history=0, noise="none"))
    tangent = torch.randn(2, 3, dtype=torch.float64)

    def f(x):
        return ops.sampler_step(**arguments | {"x": x})[0]

    _, ours = torch.func.jvp(f, (arguments["x"],), (tangent,))
    epsilon = 1e-6
    above, below = (f(arguments["x"] + sign * epsilon * tangent) for sign in (1, -1))
    torch.testing.assert_close(ours, (above - below) / (2 * epsilon), rtol=1e-6, atol=1e-8)


# --- tracing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(n=1, history=0, noise="none", copies=1),
        Case(x_dtype=torch.float16, output_dtype=torch.bfloat16, input_dtype=torch.float16),
        Case((0, 3)),
        EVERYTHING,
    ],
    ids=["noise", "least", "low", "empty", "everything"],
)
def test_opcheck(case, gradients):
    arguments = case.arguments()
    if gradients:
        for t in (arguments["x"], *arguments["outputs"], arguments["weights"]):
            t.requires_grad_()
    torch.library.opcheck(ops.sampler_step.overload, tuple(arguments.values()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def test_compile():
    @torch.compile(fullgraph=True)
    def loop(x, outputs, weights, table, steps, seeds, rescale):
        for i in range(2):
            x, _, model_input = ops.sampler_step(
                x,
                outputs,
                weights,
                table,
                steps[i],
                None,
                seeds,
                rescale=rescale,
                quantile=0.9,
                copies=2,
                input_dtype=torch.bfloat16,
            )
            outputs = [half.float() * 0.5 for half in model_input.chunk(2)]
        return x, model_input

    a = Case(rescale=3).arguments()
    tensors = [a[name] for name in ("x", "outputs", "weights", "table")]
    arguments = (*tensors, torch.arange(STEPS), a["seeds"], a["rescale"])
    eager = loop._torchdynamo_orig_callable(*arguments)
    assert same_bits(loop(*arguments), eager)


def test_compiled_gradients():
    arguments = EVERYTHING.arguments()
    x = arguments.pop("x").requires_grad_()

    def loss(x):
        return sum(r.square().sum() for r in ops.sampler_step(x, **arguments))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (a,) = torch.autograd.grad(compiled(x), x)
    (b,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(a, b)


@on_devices
@pytest.mark.parametrize("case", [Case(), EVERYTHING], ids=["noise", "everything"])
def test_modes(case):
    arguments = case.arguments()
    expected = ops.sampler_step(**arguments)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            results = ops.sampler_step(**arguments)
        assert same_bits(results, expected)


def test_meta_tensors():
    def meta(a):
        if isinstance(a, list):
            return [meta(v) for v in a]
        return a.to("meta") if isinstance(a, torch.Tensor) else a

    case = Case((2, 3), x_dtype=torch.float16, input_dtype=torch.bfloat16)
    arguments = {name: meta(value) for name, value in case.arguments().items()}
    x_next, history_next, model_input = ops.sampler_step(**arguments)
    assert x_next.is_meta and x_next.shape == (2, 3) and x_next.dtype == torch.float16
    assert history_next.shape == (2, 2, 3) and history_next.dtype == torch.float32
    assert model_input.shape == (4, 3) and model_input.dtype == torch.bfloat16


# --- bad input ------------------------------------------------------------------------------------

CASE = Case(rescale=3, mask=(3, 1, 7))
FLOAT_DTYPES = "one of float32, float16, bfloat16"
BAD = [
    ("x", lambda x: x.int(), r"expected a floating dtype, got int32 \[3, 5, 7\]"),
    ("x", lambda x: x.sum(), r"expected at least one dimension \[B, ...\], got float32 \[\]"),
    ("outputs", lambda o: [], "expected 2 tensors, as weights has, or all of them in one, got 0"),
    ("outputs", lambda o: o * 9, "expected 2 tensors, as weights has, .*, got 18 tensors"),
    ("outputs[0]", lambda o: o[:1], r"expected \[6, 5, 7\], got float32 \[3, 5, 7\]"),
    ("outputs[1]", lambda o: [o[0], o[1][:2]], r"expected \[3, 5, 7\], got float32 \[2, 5, 7\]"),
    ("outputs[0]", lambda o: [t.double() for t in o], f"expected {FLOAT_DTYPES}, got float64"),
    ("outputs[1]", lambda o: [o[0], o[1].half()], "expected torch.float32 as others, got float16"),
    (
        "weights",
        lambda w: w[:2],
        r"expected \[5 or 1, n, 3 or 1\] with n from 1 to 16, got float32 \[2, 2, 3\]",
    ),
    ("weights", lambda w: w.repeat(1, 9, 1), r"expected .*, got float32 \[5, 18, 3\]"),
    ("weights", lambda w: w[:, :0], r"expected .*, got float32 \[5, 0, 3\]"),
    ("weights", lambda w: w[0], r"expected .*, got float32 \[2, 3\]"),
    ("weights", lambda w: w.double(), "expected float32 or float32, got float64"),
    ("table", lambda t: t[:, :12], r"expected \[S, 22\] with S >= 1, got float32 \[5, 12\]"),
    ("table", lambda t: t[:0], r"expected \[S, 22\] with S >= 1, got float32 \[0, 22\]"),
    ("table", lambda t: t.bfloat16(), "expected float32 or float32, got bfloat16"),
    ("step", lambda s: s.int(), r"expected int64 \[\], got int32 \[\]"),
    ("step", lambda s: s[None], r"expected int64 \[\], got int64 \[1\]"),
    ("step", lambda s: s + 2, "expected a row of the table, 0 to 4, got 5"),
    ("step", lambda s: s - 4, "expected a row of the table, 0 to 4, got -1"),
    ("history", lambda h: h[0], r"expected float32 \[1 or 2, \*\[3, 5, 7\]\], got float32 \[3, 5"),
    ("history", lambda h: h.repeat(2, 1, 1, 1), r"expected .*, got float32 \[4, 3, 5, 7\]"),
    ("history", lambda h: h[:0], r"expected .*, got float32 \[0, 3, 5, 7\]"),
    ("history", lambda h: h.half(), r"expected .*, got float16 \[2, 3, 5, 7\]"),
    ("seeds", lambda s: s.float(), r"expected int64 \[3\], got float32 \[3\]"),
    ("seeds", lambda s: s[:2], r"expected int64 \[3\], got int64 \[2\]"),
    ("seeds", lambda s: None, r"expected int64 \[3\] beside mask, got None"),
    (
        "noise",
        lambda n: torch.zeros(3, 5, 7),
        r"expected none beside seeds, got float32 \[3, 5, 7\]",
    ),
    ("noise", lambda n: torch.zeros(5, 7), r"expected float32 \[3, 5, 7\], got float32 \[5, 7\]"),
    ("noise", lambda n: torch.zeros(3, 5, 7).half(), r"expected float32 \[3, 5, 7\], got float16"),
    ("rescale", lambda r: r[:2], r"expected float32 \[3 or 1\], got float32 \[2\]"),
    ("rescale", lambda r: r.double(), r"expected float32 \[3 or 1\], got float64 \[3\]"),
    ("mask", lambda m: m[:2], r"expected \[3 or 1, ...\] of \[3, 5, 7\], got float32 \[2, 1, 7\]"),
    ("mask", lambda m: m[..., :1], r"expected \[3 or 1, ...\] of .*, got float32 \[3, 1, 1\]"),
    ("mask", lambda m: m[:, 0], r"expected \[3 or 1, ...\] of .*, got float32 \[3, 7\]"),
    ("mask", lambda m: m > 0.5, r"expected float32, got bool \[3, 1, 7\]"),
    ("mask", lambda m: None, "expected both mask and known, got one of them"),
    ("known", lambda k: None, "expected both mask and known, got one of them"),
    ("known", lambda k: k[:1], r"expected float32 \[3, 5, 7\], got float32 \[1, 5, 7\]"),
    ("known", lambda k: k.half(), r"expected float32 \[3, 5, 7\], got float16"),
    ("quantile", lambda q: 1.5, "expected a number from 0 to 1, got 1.5"),
    ("threshold_max", lambda m: 0.9, "expected a number >= 1, got 0.9"),
    ("copies", lambda c: -1, "expected 0 or more, got -1"),
    ("input_dtype", lambda d: torch.float64, f"expected {FLOAT_DTYPES}, got torch.float64"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)]
)
def test_bad_input(name, change, message):
    argument = name.partition("[")[0]
    arguments = CASE.arguments()
    arguments[argument] = change(arguments[argument])
    before = [t.clone() for t in arguments.values() if isinstance(t, torch.Tensor)]
    message = f"^sampler_step: {name}: ".replace("[", r"\[").replace("]", r"\]") + message
    with pytest.raises(ValueError, match=message):
        ops.sampler_step(**arguments)
    after = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
    assert same_bits(before, after)


TENSORS = ("x", "weights", "table", "step", "history", "seeds", "noise", "rescale", "mask", "known")


@pytest.mark.parametrize("name", TENSORS)
def test_not_a_tensor(name):
    arguments = CASE.arguments() | {name: 1.5}
    with pytest.raises(TypeError, match=f"^sampler_step: {name}: expected a tensor.*, got float"):
        ops.sampler_step(**arguments)


def test_bad_input_under_compilation():
    arguments = Case().arguments()
    arguments["outputs"] = arguments["outputs"][:1]
    compiled = torch.compile(lambda: ops.sampler_step(**arguments), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"sampler_step: outputs\[0\]: expected \[6, 5, 7\], got"):
        compiled()


@pytest.mark.emulated
@pytest.mark.parametrize("step", [-1, STEPS])
@pytest.mark.parametrize("case", [Case(), EVERYTHING], ids=["noise", "everything"])
def test_a_step_outside_of_the_table_gives_nan_on_cuda(case, step):
    arguments = case.arguments() | {"step": torch.tensor(step)}
    with ops.emulated():
        results = ops.sampler_step(**arguments)
    assert all(r.isnan().all() for r in results)
