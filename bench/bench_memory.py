"""Peak memory of one training step on an SD 1.5-shaped UNet: spectral shifts, LoRA, all weights.

On a GPU the UNet of Stable Diffusion 1.5 in bfloat16 and what torch has allocated at most; on the
CPU a narrower one in float32, and parameters, buffers and optimiser state before the step plus the
largest running sum of the profiler's allocations and releases within it. Weights and singular
factors are random numbers: memory does not depend on their values.
"""

import gc
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastlora
from bench.timing import DEVICE
from fastlora.adapters import adapted_layers

GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
WIDTHS, SIZE = ((320, 640, 1280, 1280), 64) if GPU else ((32, 64, 128, 128), 16)
CONTENDERS = ["spectral, forward", "spectral, step", "LoRA r=16", "all weights"]


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        made = diffusers.UNet2DConditionModel(
            sample_size=SIZE, block_out_channels=WIDTHS, cross_attention_dim=768
        )
    return made.to(DTYPE).train()


def some_factors(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
    """In the shapes of a decomposition, which takes minutes for all layers."""
    rank = min(matrix.shape)
    u, vh = matrix.new_empty(matrix.shape[0], rank), matrix.new_empty(rank, matrix.shape[1])
    return u.normal_(), matrix.new_ones(rank), vh.normal_()


def adapted(contender: str) -> tuple[nn.Module, list[nn.Parameter], Any]:
    """(model, what is trained, the block to train in)"""
    model, block = unet(), nullcontext()
    if contender == "all weights":
        return model, list(model.parameters()), block
    if contender.startswith("LoRA"):
        fastlora.inject(model, fastlora.LoRA(rank=16))
    else:
        with mock.patch("torch.linalg.svd", some_factors):
            fastlora.inject(model, fastlora.Spectral())
        block = fastlora.materialize(model, contender.removeprefix("spectral, "))
    return model, fastlora.parameters(model), block


@pytest.mark.parametrize("contender", CONTENDERS)
def test_training_step(benchmark: Any, contender: str) -> None:
    benchmark.group = f"memory of a training step, widths {WIDTHS}, {str(DTYPE)[6:]}"
    model, trained, block = adapted(contender)
    optimiser = torch.optim.AdamW(trained, lr=1e-6)
    x = torch.randn(1, 4, SIZE, SIZE, device=DEVICE, dtype=DTYPE)
    text = torch.randn(1, 77, 768, device=DEVICE, dtype=DTYPE)
    t = torch.tensor([500], device=DEVICE)

    def step() -> None:
        model(x, t, text).sample.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if GPU:
            torch.cuda.synchronize()

    with block:
        step()  # from here on there is the optimiser's state
        gc.collect()
        held = sum(s.nbytes() for s in storages(model, optimiser).values())
        peak = peak_on_gpu(step) if GPU else held + peak_on_cpu(step)
        benchmark.extra_info |= {
            "device": DEVICE,
            "peak_bytes": peak,
            "held_bytes": held,
            "why": f"peak {peak / 2**20:.0f} MiB, of it {held / 2**20:.0f} before the step",
        }
        benchmark.pedantic(step, rounds=2, warmup_rounds=0)


def storages(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[int, Any]:
    """Those of parameters, buffers, kept weights and the optimiser's state, each once."""
    tensors = [*model.parameters(), *model.buffers()]
    for values in optimiser.state.values():
        tensors += [v for v in values.values() if isinstance(v, Tensor)]
    kept = [m._state.step for m in adapted_layers(model).values()]
    tensors += [entry[1] for entry in kept if entry is not None]
    found = [tensor.untyped_storage() for tensor in tensors]
    return {s.data_ptr(): s for s in found}


def peak_on_gpu(step: Any) -> int:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def peak_on_cpu(step: Any) -> int:
    """The largest running sum of what is allocated and given back in it."""
    with torch.profiler.profile(profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
