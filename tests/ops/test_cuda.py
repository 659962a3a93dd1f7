"""Every operator's CUDA kernels against float64 on the CPU."""

import pytest
import torch

from fastlora import ops
from fastlora.ops._define import kernels
from tests.cases import (
    FOLD_SHAPES,
    LINEAR_SHAPES,
    assert_twofold,
    fold_layer,
    identify,
    linear_arguments,
    randn,
    strided,
    widened,
)

LOW = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA kernels did not run"),
    pytest.mark.skipif(not kernels.build_info()["cuda"], reason="built without CUDA kernels"),
]


def on_gpu(args):
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("rows", [False, True], ids=["gate", "gate-rows"])
@pytest.mark.parametrize("dtype", LOW, ids=identify)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=identify)
def test_lora_linear(shape, dtype, rows, layout):
    args = linear_arguments(*shape, dtype=dtype, rows=rows, scale=True)
    gpu = on_gpu(args)
    if layout == "strided":
        gpu = [strided(a) for a in gpu]
    exact = ops.lora_linear.reference(*widened(args))
    assert_twofold(ops.lora_linear(*gpu).cpu(), exact, ops.lora_linear.reference(*args))


@pytest.mark.parametrize("down", [True, False], ids=["down", "activation"])
@pytest.mark.parametrize("dtype", LOW, ids=identify)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=identify)
def test_lora_add(shape, dtype, down):
    lead, _, out, rank = shape
    x, _, _, d, up, gate, _ = linear_arguments(*shape, dtype=dtype, rows=True)
    if not down:
        x, d = randn(*lead, rank, dtype=dtype, seed=9), None
    y = randn(*lead, out, dtype=dtype, seed=8)
    exact, low, ours = y.double(), y.clone(), y.cuda()
    ops.lora_add_.reference(exact, *widened([x, d, up, gate]))
    ops.lora_add_.reference(low, x, d, up, gate)
    ops.lora_add_(ours, *on_gpu([x, d, up, gate]))
    assert_twofold(ours.cpu(), exact, low)


@pytest.mark.parametrize("factors", ["same", "float32"])
@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_fold(dtype, factors):
    """More layers than one launch takes, of all shapes; some in place, some turned, some off."""
    layers = []
    for i, shape in enumerate(FOLD_SHAPES * 8):
        layer = fold_layer(*shape, dtype, torch.float32 if factors == "float32" else dtype)
        if i % 3 == 1:
            layer[3].zero_()
        layers.append(layer)
    gpu = [on_gpu(layer) for layer in layers]
    for i, layer in enumerate(gpu):
        if i % 4 == 1:
            layer[4] = layer[0]
        if i % 4 == 2:
            layer[:3] = [t.t().contiguous().t() for t in layer[:3]]
        if i % 4 == 3:
            layer[4] = strided(layer[4])
    ops.fold(*([layer[i] for layer in gpu] for i in range(5)))
    for layer, result in zip(layers, gpu, strict=True):
        exact, low = widened(layer), [*layer[:4], layer[4].clone()]
        for a in (exact, low):
            ops.fold.reference(*([t] for t in a))
        assert_twofold(result[4].cpu(), exact[4], low[4])
        if not layer[3].any():
            assert torch.equal(result[4].cpu(), layer[0])


@pytest.mark.parametrize("dtype", LOW, ids=identify)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (33, 17), (129, 70), (600, 500)], ids=identify)
def test_spectral_weight(shape, dtype):
    weight = randn(*shape, dtype=dtype, seed=1)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    shift = randn(len(s), seed=2)
    shift[::5] = -1e9
    args = [weight, u.to(dtype), s.float(), vh.to(dtype), shift, torch.tensor(0.7)]
    gpu = on_gpu(args)
    exact = ops.spectral_weight.reference(*widened(args))
    assert_twofold(ops.spectral_weight(*gpu).cpu(), exact, ops.spectral_weight.reference(*args))
    assert torch.equal(ops.spectral_weight(*gpu[:4], gpu[4] * 0, gpu[5]).cpu(), weight)
    trained = gpu[4].requires_grad_()
    probe = randn(*shape, dtype=dtype, seed=7)
    (ours,) = torch.autograd.grad(ops.spectral_weight(*gpu), trained, probe.cuda())
    args[4] = shift.clone().requires_grad_()
    (cpu,) = torch.autograd.grad(ops.spectral_weight(*args), args[4], probe)
    torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-2, atol=torch.finfo(dtype).eps * 100)


def test_float64_is_refused_in_words():
    args = on_gpu(fold_layer(4, 5, 2, torch.float64))
    with pytest.raises(ops.ContractError, match="float32, float16 or bfloat16 on CUDA"):
        ops.fold(*([a] for a in args))
