"""On a GPU too the contenders of a benchmark compute the same, and graphs of them can be timed."""

import pytest
import torch
import torch.nn.functional as F

from bench import timing
from bench.contenders import CONTENDERS, RANKS, case, forced, gemm, wanted
from fastlora import ops
from tests.cases import assert_twofold
from tests.devices import no_gpu

pytestmark = [pytest.mark.gpu, no_gpu]
SIZE = (130, 72, 200)  # tokens, in, out


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", [n for n in CONTENDERS if n not in ("floor", "peft + compile")])
def test_contenders(name, rank):
    tokens, features, out = SIZE
    if not wanted(name, *SIZE, rank, gpu=True):
        pytest.skip("this form does not take the rank")
    c = case(features, out, RANKS[rank], torch.bfloat16, "cuda")
    x = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
    gate = torch.ones(rank, device="cuda")
    arguments = [x, c.layer.weight, c.layer.bias, torch.cat(c.downs), torch.cat(c.ups, 1), gate]
    with forced(name), torch.no_grad():
        y = CONTENDERS[name](c, x)()
    exact = ops.lora_linear.reference(*(a.double() for a in arguments))
    assert_twofold(y, exact, ops.lora_linear.reference(*arguments))


def test_the_main_loop_alone():
    x, weight = (torch.randn(n, 72, device="cuda", dtype=torch.bfloat16) for n in (130, 200))
    y = gemm(x, weight, x.new_empty(130, 200))()
    assert_twofold(y, x.double() @ weight.double().t(), x @ weight.t())


def test_graphs_of_layers_are_timed():
    c = [case(64, 64, (16,), torch.bfloat16, "cuda") for _ in range(3)]
    x = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    names = ("floor", "fastlora", "extended", "addmm")
    contenders = {n: [CONTENDERS[n](layer, x) for layer in c] for n in names}
    contenders["waits"] = [lambda: F.linear(x, c[0].layer.weight).sum().item()]
    found = timing.take_turns(contenders, context=forced)
    for name in names:
        assert 0 < found[name].info["captured"] < 1e4 and found[name].info["over_floor"] > 0
    assert found["waits"].info["captured"] is None and found["waits"].info["why"]
