"""What a call costs where there is nothing to compute: the host's time.

On a GPU nobody waits for the device: few calls with little work, so that the queue never fills.
"""

import pytest
import torch

from bench.contenders import CONTENDERS, FORMS, case, forced
from bench.timing import DEVICE

ROUNDS = 60


def microseconds_a_call(benchmark, run, calls):
    """`run` many times a round, with an empty queue at its beginning."""

    def many() -> None:
        for _ in range(calls):
            run()

    setup = torch.cuda.synchronize if DEVICE == "cuda" else None
    with torch.no_grad():
        run()
        benchmark.pedantic(many, setup=setup, rounds=ROUNDS, warmup_rounds=4)
    benchmark.extra_info |= {"device": DEVICE, "calls": calls}
    if benchmark.stats is not None:
        benchmark.extra_info["host"] = benchmark.stats.stats.median / calls * 1e6


@pytest.mark.parametrize("contender", ["nn.Linear", "fastlora", "peft", "accelerated"])
def test_tiny_call(benchmark, contender):
    """8x8 through modules in float32."""
    benchmark.group = "lora_linear tiny call 8x8 r=4"
    torch.manual_seed(0)
    c, x = case(8, 8, (4,), device=DEVICE), torch.randn(8, 8, device=DEVICE)
    run = (lambda: c.layer(x)) if contender == "nn.Linear" else CONTENDERS[contender](c, x)
    microseconds_a_call(benchmark, run, 2000 if DEVICE == "cpu" else 200)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("contender", ["nn.Linear", *FORMS, "addmm", "peft", "accelerated"])
def test_call(benchmark, contender):
    """Every form of the operator, on a layer that its kernels finish sooner than the host."""
    benchmark.group = "lora_linear call 16x64x64 r=16 bfloat16"
    torch.manual_seed(0)
    c = case(64, 64, (16,), torch.bfloat16, DEVICE)
    x = torch.randn(16, 64, device=DEVICE, dtype=torch.bfloat16)
    with forced(contender):
        run = (lambda: c.layer(x)) if contender == "nn.Linear" else CONTENDERS[contender](c, x)
        microseconds_a_call(benchmark, run, 200)
