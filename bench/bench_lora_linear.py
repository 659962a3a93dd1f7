"""`lora_linear` unmerged, in every form, beside the plain layer, torch's own expression and PEFT.

The layers are those of SD 1.5, SDXL and FLUX, each kind once; no gradients.
"""

import functools

import pytest
import torch

from bench.contenders import CONTENDERS, RANKS, case, forced, wanted
from bench.shapes import NAMES, counts
from bench.timing import DEVICE, Turns, copies_for, replay, take_turns

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
NAME = str(DTYPE).removeprefix("torch.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each layer, rank and contender that takes part."""
    if "contender" not in metafunc.fixturenames:
        return
    models = [NAMES[m.strip()] for m in metafunc.config.getoption("--models").split(",")]
    cases = []
    for rank in map(int, metafunc.config.getoption("--ranks").split(",")):
        for shape, weights in counts(models).items():
            size = "x".join(map(str, shape))
            cases += [
                pytest.param((*shape, weights), rank, name, id=f"{size}-r{rank}-{name}")
                for name in CONTENDERS
                if wanted(name, *shape, rank, DEVICE == "cuda")
            ]
    metafunc.parametrize(("shape", "rank", "contender"), cases)


@pytest.mark.benchmark(timer=replay)
def test_lora_linear(benchmark, shape, rank, contender):
    """All contenders of a layer take turns; `over_floor` compares with F.linear."""
    tokens, features, out, weights = shape
    benchmark.group = f"lora_linear {tokens}x{features}x{out} r={rank} {NAME}"
    benchmark.extra_info |= {
        "layer": [tokens, features, out], "rank": rank, "dtype": NAME, "counts": weights,
    }  # fmt: skip
    found = turns(tokens, features, out, rank)[contender]
    if isinstance(found, str):
        pytest.skip(found)
    replay.show(benchmark, found)


@functools.lru_cache(maxsize=1)  # tests of one layer follow one another
def turns(tokens: int, features: int, out: int, rank: int) -> dict[str, Turns | str]:
    """What every contender took, or why it is not there."""
    torch.manual_seed(0)
    copies = copies_for(out * features * DTYPE.itemsize)
    layers = [case(features, out, RANKS[rank], DTYPE, DEVICE) for _ in range(copies)]
    x = torch.randn(tokens, features, device=DEVICE, dtype=DTYPE)
    contenders, missing = {}, {}
    for name, make in CONTENDERS.items():
        if wanted(name, tokens, features, out, rank, DEVICE == "cuda"):
            try:
                contenders[name] = [make(layer, x) for layer in layers]
            except pytest.skip.Exception as reason:
                missing[name] = str(reason)
    return {**take_turns(contenders, context=forced), **missing}
