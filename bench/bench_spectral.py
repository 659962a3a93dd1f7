"""`spectral_weight` of single layers beside torch's expression and the literal product."""

import pytest
import torch

from bench.timing import DEVICE, measure
from fastlora import ops


@pytest.mark.parametrize("contender", ["fastlora", "addmm", "u @ diag(s) @ vh"])
@pytest.mark.parametrize("shape", [(320, 320), (640, 2560), (1280, 1280)], ids=str)
def test_spectral_weight(benchmark, shape, contender):
    benchmark.group = f"spectral_weight {shape[0]}x{shape[1]}"
    torch.manual_seed(0)
    weight = torch.randn(shape, device=DEVICE)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    shift, strength = torch.randn_like(s), torch.tensor(0.5, device=DEVICE)
    runs = {
        "fastlora": lambda: ops.spectral_weight(weight, u, s, vh, shift, strength),
        "addmm": lambda: torch.addmm(weight, u * ((s + strength * shift).relu() - s), vh),
        "u @ diag(s) @ vh": lambda: u @ torch.diag((s + strength * shift).relu()) @ vh,
    }
    work = 2 * u.numel() * shape[1]
    measure(benchmark, runs[contender], rounds=10, iterations=3, work=work)
