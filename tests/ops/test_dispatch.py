"""What must not reach the kernels: DLPack gives memory for things that have none."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlora import ops
from tests.cases import linear_arguments

op = ops.lora_linear


@pytest.fixture
def args():
    return linear_arguments((2, 3), 8, 8, 4)


class Subclass(torch.Tensor):
    pass


def test_fake_tensors_get_shapes_and_no_memory(args):
    with FakeTensorMode() as mode:
        fakes = [a if a is None else mode.from_tensor(a) for a in args]
        y = op(*fakes)
    assert type(y).__name__ == "FakeTensor" and y.shape == (2, 3, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(op(*args)).__name__ == "FakeTensor"


def test_meta_tensors(args):
    y = op(*[a if a is None else a.to("meta") for a in args])
    assert y.is_meta and y.shape == (2, 3, 8)


def test_vmap(args):
    xs = torch.stack([args[0], 2 * args[0]])
    one_by_one = torch.stack([op(x, *args[1:]) for x in xs])
    torch.testing.assert_close(torch.func.vmap(lambda x: op(x, *args[1:]))(xs), one_by_one)


def test_functional_grad_is_refused_not_wrong(args):
    """torch.library's autograd formulas do not serve torch.func.grad."""
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: op(x, *args[1:]).sum())(args[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_forward_mode_tangents_are_not_lost(args):
    direction = torch.randn_like(args[0])
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(args[0], direction)
        tangent = torch.autograd.forward_ad.unpack_dual(op(x, *args[1:])).tangent
    expected = op(direction, args[1], None, *args[3:])  # the layer is affine in x
    torch.testing.assert_close(tangent, expected)


def test_negative_bit_is_refused(args):
    x = torch.complex(args[0], args[0]).conj().imag
    assert x.is_neg()
    with pytest.raises(ValueError, match="resolve_neg"):
        op(x, *args[1:])
    torch.testing.assert_close(op(x.resolve_neg(), *args[1:]), op(-args[0], *args[1:]))


def test_subclasses_are_not_read_as_plain_memory(args):
    y = op(args[0].as_subclass(Subclass), *args[1:])
    torch.testing.assert_close(torch.Tensor(y), op(*args))


def test_dispatch_modes_see_the_operator(args):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Log():
        op(*args)
    assert "fastlora.lora_linear.default" in seen


def test_inference_mode_then_training(args):
    with torch.inference_mode():
        first = op(*args)
        op_ = ops.lora_add_
        op_(first, args[0], args[3], args[4], args[5])
    args[3].requires_grad_()
    op(*args).sum().backward()
    assert args[3].grad is not None


def test_gradients_are_recorded_only_when_asked(args):
    args[3].requires_grad_()
    assert op(*args).requires_grad
    with torch.no_grad():
        assert not op(*args).requires_grad


def test_plans_do_not_grow_without_bound():
    ops.lora_add_.clear()
    for n in range(1, 5001):
        ops.lora_add_(torch.zeros(n, 1), torch.zeros(n, 1), None, torch.zeros(1, 1), torch.zeros(1))
    assert 0 < ops.lora_add_.plan_count() <= 4096
    ops.lora_add_.clear()
    assert ops.lora_add_.plan_count() == 0


def test_values_do_not_cost_a_plan(args):
    op.clear()
    for scale in (0.0, 0.5, 2.0):
        op(*args[:5], args[5] * scale, args[6])
    assert op.plan_count() == 1


def test_export(args):
    class Module(torch.nn.Module):
        def forward(self, x):
            return op(x, *args[1:])

    program = torch.export.export(Module(), (args[0],))
    assert "fastlora.lora_linear" in program.graph_module.code.replace("torch.ops.", "")
    torch.testing.assert_close(program.module()(args[0]), op(*args))


def test_kernels_refuse_a_foreign_device_or_dtype(args):
    from fastlora.ops._define import kernels

    y = torch.empty(2, 3, 8)
    with pytest.raises(ValueError, match="lora_linear: .* expected float32, got float64"):
        kernels.lora_linear(
            y, *[a if a is None or i == 5 else a.double() for i, a in enumerate(args)], None, 0
        )
    with pytest.raises(ValueError, match="lora_linear: x: expected a matrix, or contig"):
        kernels.lora_linear(y, args[0].mT.contiguous().mT, *args[1:], None, 0)
    with pytest.raises(TypeError, match="expected a plain torch.Tensor"):
        kernels.lora_linear(y, "x", *args[1:], None, 0)


def test_emulated_blocks_nest_and_interleave():
    """Their settings come back, whoever ends first; afterwards nothing is emulated."""
    from fastlora.ops import _device

    configured = []
    with ops.emulated():
        pass
    original = _device._emulator.configure

    class Recorder:
        def __getattr__(self, name):
            return getattr(emulator, name)

        def configure(self, runs, seed):
            original(runs, seed)
            configured.append((runs, seed))

    emulator, _device._emulator = _device._emulator, Recorder()
    try:
        with ops.emulated(runs=9, seed=5), ops.emulated(runs=1):
            assert configured[-1] == (1, 0)
        assert configured == [(9, 5), (1, 0), (9, 5)]
        first, second = ops.emulated(), ops.emulated()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert _device.device_type(torch.zeros(1)) == "cuda"
        second.__exit__(None, None, None)
        assert _device.device_type(torch.zeros(1)) == "cpu"
        with pytest.raises(ValueError, match="runs: expected at least 1, got 0"), ops.emulated(0):
            pass
        assert _device.device_type(torch.zeros(1)) == "cpu"
    finally:
        _device._emulator = emulator


@pytest.mark.parametrize("name", sorted(ops.operators))
def test_emulated_operators_run_on_the_emulator(name, monkeypatch):
    """And nowhere else: the compiled CPU loops are not asked."""
    from fastlora import _selfcheck
    from fastlora.ops import _device

    def data(*shape):
        return torch.randn(shape)

    operator, called = ops.operators[name], []
    with ops.emulated():
        emulator = _device._emulator

        class Recorder:
            def __getattr__(self, entry):
                called.append(entry)
                return getattr(emulator, entry)

        monkeypatch.setattr(_device, "_emulator", Recorder())
        operator.clear()  # plans hold the entries that they found
        try:
            operator(*_selfcheck.EXAMPLES[name](data, data, "cpu"))
        finally:
            operator.clear()
    # what has no kernel of its own goes through another's
    shared = {"spectral_linear": "lora_add_", "spectral_weight": "spectral_weights"}
    assert shared.get(name, name) in called
    called.clear()
    operator(*_selfcheck.EXAMPLES[name](data, data, "cpu"))
    assert called == []


@pytest.mark.parametrize(
    ("value", "words"), [("emulated", "cuda"), ("", "cpu"), ("tpu", "expected")]
)
def test_the_environment_variable_chooses_the_emulator(value, words):
    program = "import torch; from fastlora.ops import _device; "
    program += "print(_device.device_type(torch.zeros(1)))"
    environment = {**os.environ, "FASTLORA_DEVICE": value}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert words in (done.stderr if value == "tpu" else done.stdout)
    assert done.returncode == (1 if value == "tpu" else 0)
