"""The main loop on tensor cores by itself, beside the library's product of the same matrices."""

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.contenders import gemm
from bench.timing import DEVICE, Turns, copies_for, replay, take_turns

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
# Square, where the rate of the loop shows; a layer of SDXL; one of SD 1.5, of a few tiles.
SIZES = [(4096, 4096, 4096), (2048, 1280, 10240), (512, 1280, 1280)]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("contender", ["floor", "fastlora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_gemm(benchmark, size, dtype, contender):
    tokens, features, out = size
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"gemm {tokens}x{features}x{out} {name}"
    operations = 2 * tokens * features * out
    benchmark.extra_info |= {"gemm": list(size), "dtype": name, "operations": operations}
    replay.show(benchmark, turns(*size, dtype)[contender])


@functools.lru_cache(maxsize=1)
def turns(tokens: int, features: int, out: int, dtype: torch.dtype) -> dict[str, Turns]:
    torch.manual_seed(0)
    at = {"device": DEVICE, "dtype": dtype}
    x, y = torch.randn(tokens, features, **at), torch.empty(tokens, out, **at)
    copies = range(copies_for(out * features * dtype.itemsize))
    weights = [torch.randn(out, features, **at) / features**0.5 for _ in copies]
    return take_turns(
        {
            "floor": [functools.partial(F.linear, x, weight) for weight in weights],
            "fastlora": [gemm(x, weight, y) for weight in weights],
        }
    )
