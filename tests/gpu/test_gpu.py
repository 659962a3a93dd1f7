"""What only a GPU can show: streams, graphs, devices, and the package's jobs as a whole."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import ops
from tests.cases import fold_layer, linear_arguments
from tests.devices import no_gpu

pytestmark = [pytest.mark.gpu, no_gpu]


def adapted(rank: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.SiLU(), nn.Linear(64, 32)).cuda()
    fastlora.inject(model, fastlora.LoRA(rank), name="a", seed=0)
    with torch.no_grad():
        for p in fastlora.parameters(model, "a"):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    return model


def busy(seconds: float = 0.05) -> None:
    """Keeps the current stream busy for a while."""
    torch.cuda._sleep(int(seconds * 1.5e9))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-4)


def test_kernels_queue_on_the_current_stream():
    args = [a.cuda() if isinstance(a, Tensor) else a for a in linear_arguments((2, 3), 8, 8, 4)]
    expected = ops.lora_linear.reference(*args)
    x, late = args[0].clone(), torch.zeros_like(args[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        busy()
        late.copy_(x)  # not there before the stream has come so far
        y = ops.lora_linear(late, *args[1:])
    stream.synchronize()
    close(y, expected)


def test_fold_follows_the_stream():
    layer = [t.cuda() for t in fold_layer(64, 48, 4)]
    expected = [t.clone() for t in layer]
    ops.fold.reference(*([t] for t in expected))
    gate = torch.zeros_like(layer[3])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        busy()
        gate.copy_(layer[3])
        ops.fold([layer[0]], [layer[1]], [layer[2]], [gate], [layer[4]])
    stream.synchronize()
    close(layer[4], expected[4])


def test_a_captured_model_follows_its_strengths():
    """One graph, many strengths: gates are written in place, outside of it."""
    model, x = adapted(), torch.randn(5, 48, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for scale in (0.3, 1.0, -2.0):
            fastlora.set_scale(model, {"a": scale})
            graph.replay()
            close(y, model(x))
            other = copy.deepcopy(model).cpu()
            close(y, other(x.cpu()))


def test_new_strengths_wait_for_nothing():
    """Also while the device is busy; from then on they count."""
    model, x = adapted(), torch.randn(5, 48, device="cuda")
    fastlora.inject(model, fastlora.LoRA(4), name="b", seed=1)
    fastlora.set_scale(model, {"a": 0.5, "b": 1.0})  # memory that is made once is there
    with torch.no_grad():
        model(x)
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            busy()
            fastlora.set_scale(model, {"a": 0.25, "b": -1.5})
            waited = torch.cuda.current_stream().query()  # True: the device has nothing to do
            y = model(x)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert not waited
        other = copy.deepcopy(model).cpu()
        close(y, other(x.cpu()))


def test_a_captured_sampling_loop():
    """Every step of it in one graph: nothing waits for the host."""
    table = fastlora.ddim(fastlora.Schedule.cosine(100), steps=5, prediction="v", eta=1.0)
    coefficients = table.coefficients.to("cuda", torch.float32)
    rows = torch.arange(5, device="cuda").unbind()
    weights = torch.ones(1, 1, 1, device="cuda")
    seeds, phi = torch.tensor([1, 2], device="cuda"), torch.tensor([0.5], device="cuda")
    start = torch.randn(2, 3, 8, 8, device="cuda")

    def loop(x: Tensor) -> Tensor:
        for row in rows:
            e = torch.tanh(x)
            x, _, _ = ops.sampler_step(
                x, [e], weights, coefficients, row, seeds=seeds, rescale=phi, quantile=0.9
            )
        return x

    expected = loop(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = loop(start)
    graph.replay()
    assert torch.equal(x, expected)


def test_gradients_are_those_of_the_cpu():
    model, x = adapted(), torch.randn(7, 48, device="cuda")
    other = copy.deepcopy(model).cpu()
    model(x).square().sum().backward()
    other(x.cpu()).square().sum().backward()
    for ours, cpu in zip(fastlora.parameters(model), fastlora.parameters(other), strict=True):
        assert ours.grad is not None and cpu.grad is not None
        torch.testing.assert_close(ours.grad.cpu(), cpu.grad, rtol=1e-3, atol=1e-3)


def test_fold_and_unfold_a_hundred_times():
    model, x = adapted(), torch.randn(7, 48, device="cuda")
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        unmerged = model(x)
        for _ in range(100):
            fastlora.fold(model)
            close(model(x), unmerged)
            fastlora.unfold(model)
        assert torch.equal(model(x), unmerged)
    assert all(map(torch.equal, model.parameters(), before))


def test_strengths_per_sample():
    model, x = adapted(), torch.randn(3, 48, device="cuda")
    with torch.no_grad():
        fastlora.set_scale(model, {"a": torch.tensor([0.0, 0.5, 2.0], device="cuda")})
        together = model(x)
        for i, scale in enumerate((0.0, 0.5, 2.0)):
            fastlora.set_scale(model, {"a": scale})
            close(model(x)[i], together[i])


@pytest.mark.parametrize("kind", ["lora", "dora", "spectral"])
def test_the_digits_model(kind):
    """All layers of a real model, on both devices, and verified on the GPU."""
    pytest.importorskip("transformers")
    from fastlora.models import digits

    spec = fastlora.Spectral() if kind == "spectral" else fastlora.LoRA(4, dora=kind == "dora")
    model = digits.load(device="cuda")
    # verify calls the UNet, not the text encoder
    where = r"unet\..*" if kind == "spectral" else r".*to_[qkv]"
    fastlora.inject(model, spec, where=where, seed=0)
    with torch.no_grad():
        for p in fastlora.parameters(model):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            p.add_(0.05 * noise.to(p.device))
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([300, 700])
    with torch.no_grad():
        ours = model(x.cuda(), t.cuda(), model.encode(["a three", "a thin one"]))
        report = fastlora.verify(model, x.cuda(), t.cuda(), model.encode(["a three", "a one"]))
        model.cpu()
        cpu = model(x, t, model.encode(["a three", "a thin one"]))
    assert report.passed, str(report)
    torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-2, atol=1e-3)


def test_samples_of_both_devices_are_the_same_pictures():
    pytest.importorskip("transformers")
    from fastlora.models import digits

    table = fastlora.ddim(fastlora.Schedule.cosine(1000), steps=8, prediction="v", eta=0.5)
    pictures = []
    for device in ("cuda", "cpu"):
        model = digits.load(device=device)
        cond, uncond = model.encode(["a seven"] * 2), model.encode([""] * 2)
        x = fastlora.samplers.noise([1, 2], model.shape, device=device)
        images = fastlora.sample(
            model, table, x, cond, uncond, guidance_scale=2.0, seeds=[1, 2], progress=False
        )
        pictures.append(images.cpu())
    assert (pictures[0] - pictures[1]).abs().mean() < 0.02


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one():
    args = linear_arguments((2, 3), 8, 8, 4)
    there = [a.to("cuda:1") if isinstance(a, Tensor) else a for a in args]
    assert torch.cuda.current_device() == 0
    y = ops.lora_linear(*there)
    assert y.device.index == 1 and torch.cuda.current_device() == 0
    close(y, ops.lora_linear.reference(*args))


def test_tensors_of_two_devices_are_refused():
    args = linear_arguments((2, 3), 8, 8, 4)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        ops.lora_linear(args[0].cuda(), *args[1:])


def test_cuda_tensors_stay_on_the_gpu_under_emulated():
    pytest.importorskip("fastlora._emulator")
    args = [a.cuda() if isinstance(a, Tensor) else a for a in linear_arguments((2,), 8, 8, 4)]
    with ops.emulated():  # CUDA tensors go on to the GPU
        y = ops.lora_linear(*args)
    close(y, ops.lora_linear.reference(*args))
