"""The contenders of `lora_linear`'s benchmark compute the same layer, and what their names say."""

import contextlib
import types

import pytest
import torch
from torch import nn

from bench import bench_spectral, bench_spectral_linear, bench_strengths, timing
from bench.contenders import CONTENDERS, FORMS, RANKS, case, forced, gemm, wanted
from fastlora import emulated, ops
from fastlora.ops import _routes
from tests.cases import assert_twofold

SIZE = (66, 72, 40)  # tokens, in, out


def results(name: str, rank: int, dtype: torch.dtype):
    """What a contender computes, the exact result, and the reference in the same dtype."""
    tokens, features, out = SIZE
    c = case(features, out, RANKS[rank], dtype)
    x = torch.randn(tokens, features).to(dtype)
    down, up, gate = torch.cat(c.downs), torch.cat(c.ups, 1), torch.ones(rank)
    arguments = [x, c.layer.weight, c.layer.bias, down, up, gate]
    exact = ops.lora_linear.reference(*(a.double() for a in arguments))
    low = ops.lora_linear.reference(*arguments)
    with forced(name), torch.no_grad():
        ours = CONTENDERS[name](c, x)()
    if name == "floor":
        exact = nn.functional.linear(x.double(), c.layer.weight.double(), c.layer.bias.double())
        low = nn.functional.linear(x, c.layer.weight, c.layer.bias)
    return ours, exact, low


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["floor", "fastlora", "addmm", "peft", "accelerated"])
def test_contenders_of_the_cpu(name, rank):
    if name in ("peft", "accelerated"):
        pytest.importorskip("peft")
    assert_twofold(*results(name, rank, torch.float32))


@pytest.mark.slow
def test_peft_under_compile():
    pytest.importorskip("peft")
    assert_twofold(*results("peft + compile", 16, torch.float32))


@pytest.mark.emulated
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["fastlora", *FORMS])
def test_contenders_of_a_gpu(name, rank):
    if not wanted(name, *SIZE, rank, gpu=True):
        pytest.skip("this form does not take the rank")
    with emulated(runs=1):
        assert_twofold(*results(name, rank, torch.bfloat16))


@pytest.mark.emulated
@pytest.mark.parametrize("name", FORMS)
def test_a_forced_form_is_the_one_that_runs(name, monkeypatch):
    launched = []
    module = _routes
    entry = module.kernels_of

    def recording(t):
        return types.SimpleNamespace(
            lora_linear=lambda *a: (launched.append(a[-1]), entry(t).lora_linear(*a))
        )

    monkeypatch.setattr(module, "kernels_of", recording)
    with emulated(runs=1):
        results(name, 16, torch.bfloat16)
    assert launched == ([] if FORMS[name] is None else [FORMS[name]])


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_main_loop_alone(dtype):
    x, weight = torch.randn(130, 72).to(dtype), torch.randn(200, 72).to(dtype)
    with emulated(runs=1):
        y = gemm(x, weight, torch.empty(130, 200, dtype=dtype))()
    assert_twofold(y, x.double() @ weight.double().t(), x @ weight.t())


def test_sdxl_has_its_layers_and_strengths_arrive():
    model = bench_strengths.sdxl()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 743
    bench_strengths.by_fastlora()()  # names and layers fit


@pytest.mark.parametrize("contender", ["by_peft", "by_diffusers"])
def test_peft_gets_the_strengths(contender, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(bench_strengths, "sdxl", lambda: bench_strengths.level(1, (1,)))
    kept = []
    made = bench_strengths.peft_model
    monkeypatch.setattr(bench_strengths, "peft_model", lambda: kept.append(made()) or kept[-1])
    getattr(bench_strengths, contender)()()
    layers = bench_strengths.peft_layers(kept[0])
    assert len(layers) == 13
    for layer in layers.values():
        assert layer.scaling == dict(zip("abc", bench_strengths.SCALES[0], strict=True))
        assert list(layer.active_adapters) == list("abc")


# --- taking turns ---------------------------------------------------------------------------------


def test_ratios_are_of_the_same_round():
    """A machine that becomes ten times slower changes no ratio."""
    found = timing.quartiles([2.0, 2.2, 20.0, 22.0], [1.0, 1.0, 10.0, 10.0])
    assert found["over_floor"] == pytest.approx(2.1) and found["fastest"] == 2.0
    assert found["low"] == pytest.approx(2.0) and found["high"] == pytest.approx(2.2)
    assert timing.quartiles([3.0], [2.0])["over_floor"] == 1.5


@pytest.mark.skipif(timing.DEVICE == "cuda", reason="times by CUDA graphs there")
def test_contenders_take_turns():
    order = []
    contenders = {n: [lambda n=n: order.append(n)] for n in ("floor", "a", "b")}
    found = timing.take_turns(contenders, seconds=0.0)
    rounds = [set(order[i : i + 3]) for i in range(9, len(order), 3)]
    assert len(rounds) == timing.LEAST_ROUNDS
    assert all(r == {"floor", "a", "b"} for r in rounds)
    assert order[9:12] != order[12:15]  # another one begins
    assert {len(t.times) for t in found.values()} == {timing.LEAST_ROUNDS}
    assert found["floor"].info["over_floor"] == 1.0


def test_graphs_take_turns(monkeypatch):
    """What happens on a GPU, with made-up graphs: every contender's replay once a round, a time of
    its own calls, and no ratio where a graph was refused."""
    replayed, active = [], []

    @contextlib.contextmanager
    def context(name):
        active.append(name)
        yield

    def captured(function):
        function()
        name = active[-1]
        if name == "waits":
            return None, "waits for the host"
        return types.SimpleNamespace(replay=lambda: replayed.append(name)), ""

    def timed(functions, cold=False):
        for function in functions:
            function()
        took = {"floor": 160.0, "a": 640.0}  # microseconds of a graph: 16 calls and 32
        return [took[name] for name in replayed]

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(timing, "timed", timed)
    monkeypatch.setattr(timing, "median", lambda function, **_: 1e5)
    monkeypatch.setattr(timing, "DEVICE", "cuda")
    nothing = [lambda: None]
    found = timing.take_turns({"floor": nothing, "waits": nothing, "a": nothing * 32}, 1.0, context)
    assert active == ["floor", "waits", "a"] and replayed == ["floor", "a"] * 8
    assert found["a"].times == pytest.approx([20e-6] * 8)
    assert found["a"].info["captured"] == pytest.approx(20.0)
    assert found["a"].info["over_floor"] == pytest.approx(2.0)
    assert found["floor"].info["over_floor"] == 1.0
    assert found["waits"].info["why"] == "waits for the host"
    assert "over_floor" not in found["waits"].info


def test_pytest_benchmark_is_told_what_was_taken():
    clock = timing.Replay()
    told = []

    def pedantic(function, rounds):
        for _ in range(rounds):
            begin = clock()
            function()
            told.append(clock() - begin)

    benchmark = types.SimpleNamespace(extra_info={}, pedantic=pedantic)
    clock.show(benchmark, timing.Turns([0.25, 0.5], {"device": "cpu"}))
    assert told == [0.25, 0.5] and benchmark.extra_info == {"device": "cpu"}


def test_forcing_ends_with_its_block():
    with contextlib.suppress(RuntimeError), forced("extended"):
        assert _routes._forced == ["extended"]
        raise RuntimeError
    assert _routes._forced == []


def test_contenders_of_spectral_weights():
    """Of a weight that is its decomposition: then the literal product is right as well."""
    layers = bench_spectral.random_layers([(24, 40), (40, 24)], torch.float32)
    factors = list(zip(layers.us, layers.ss, layers.vhs, strict=True))
    layers.weights[:] = [(u * s) @ vh for u, s, vh in factors]
    assert layers.operations() == 2 * 2 * 24 * 40 * 24
    exact = [
        (u.double() * (s.double() + 0.5 * shift.double()).relu()) @ vh.double()
        for (u, s, vh), shift in zip(factors, layers.shifts, strict=True)
    ]
    for name, run in bench_spectral.reconstructions(layers).items():
        run()
        if name == "floor":
            continue
        for out, right in zip(layers.outs, exact, strict=True):
            torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-4, msg=name)
    runs = bench_spectral.gradients(layers)
    for ours, theirs in zip(runs["fastlora"](), runs["torch"](), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_contenders_of_spectral_linear():
    """Results and gradients in float64 by hand, with one singular value that the relu cuts."""
    (args,) = bench_spectral_linear.arguments(5, [(24, 40)], torch.float32)
    s, shift, strength = args[4], args[6], args[7]
    shift[3] = -3 * s[3] / strength
    runs = bench_spectral_linear.forward_and_backward(args)
    dy = bench_spectral_linear.gradient_of_y(*args[:2]).double()
    x, weight, bias, u, s, vh, shift, strength = (t.double() for t in args)
    shifted = weight + (u * ((s + strength * shift).relu() - s)) @ vh
    dots = torch.einsum("oi,to,tk,ik->i", u, dy, x, vh) * strength
    dots[3] = 0
    for name, layer in bench_spectral_linear.forward(args).items():
        got = layer()
        if name == "floor":
            assert [len(t) for t in got] == [5, 5]
            continue
        torch.testing.assert_close(got.double(), x @ shifted.t() + bias, rtol=1e-5, atol=1e-3)
        dx, d_shift = (g.double() for g in runs[name]())
        torch.testing.assert_close(dx, dy @ shifted, rtol=1e-5, atol=1e-3, msg=name)
        torch.testing.assert_close(d_shift, dots, rtol=1e-5, atol=1e-3, msg=name)
