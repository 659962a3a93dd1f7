"""Decompositions on a GPU: of weights that are there, and of weights that only visit."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlora
from fastlora.adapters import decomposition
from tests.devices import no_gpu

pytestmark = [pytest.mark.gpu, no_gpu]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 200), nn.Conv2d(16, 40, 3), nn.ConvTranspose2d(16, 40, 3))


@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_are_those_of_the_weights(where, dtype, tmp_path: Path, monkeypatch):
    devices = []
    original = decomposition.svd
    monkeypatch.setattr(
        decomposition, "svd", lambda m: [devices.append(m.device.type), original(m)][1]
    )
    layers = model().to(where, dtype)
    report = fastlora.decompose(layers, cache=tmp_path)
    assert devices == ["cuda"] * 3
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    assert all(row.error < allowed for row in report.rows)
    twin = model().to(where, dtype)
    assert fastlora.decompose(twin, cache=tmp_path).hits == 3
    for m in (layers, twin):
        fastlora.inject(m, fastlora.Spectral())
    for a, b in zip(layers, twin, strict=True):
        assert a.fastlora.svd_u.device == a.weight.device == b.fastlora.svd_u.device
        assert a.fastlora.svd_u.dtype == dtype and torch.equal(a.fastlora.svd_u, b.fastlora.svd_u)
        exact = torch.linalg.svdvals(a.matrix().detach().cpu().double())
        torch.testing.assert_close(a.fastlora.svd_s.cpu().double(), exact, rtol=1e-4, atol=1e-5)


def test_the_cpu_can_be_asked_for(tmp_path: Path):
    layers = model().cuda()
    twin = copy.deepcopy(layers).cpu()
    fastlora.decompose(layers, cache=tmp_path, device="cpu")
    fastlora.decompose(twin, cache=None, device="cpu")
    for m in (layers, twin):
        fastlora.inject(m, fastlora.Spectral())
    assert layers[0].fastlora.svd_u.is_cuda
    torch.testing.assert_close(layers[0].fastlora.svd_s.cpu(), twin[0].fastlora.svd_s)
    x = torch.randn(3, 300, device="cuda")
    assert torch.equal(layers[0](x), nn.functional.linear(x, layers[0].weight, layers[0].bias))
