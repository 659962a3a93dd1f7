"""Transposed convolutions: what they share with the others is in test_spectral.py."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fastlora
from tests.adapters.oracles import assert_unchanged, same_bits, snapshot, spectral_weight


def layer(**kwargs: object) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, **kwargs)


@pytest.mark.parametrize("size", [[9, 11], [10, 12], [2, 6, 10, 11]], ids=str)
def test_the_output_size_is_that_of_the_base(size: list[int]) -> None:
    base, x = layer(), torch.randn(2, 4, 5, 6)
    plain = copy.deepcopy(base)
    fastlora.inject(base, fastlora.Spectral(), name="s")
    assert same_bits(base(x, size), plain(x, size))
    with torch.no_grad():
        base.fastlora["s"].shift.copy_(torch.randn(6))
    exact = copy.deepcopy(plain).double()
    exact.weight.data = spectral_weight(plain, base.fastlora["s"].shift, 1.0)
    expected = exact(x.double(), size)
    torch.testing.assert_close(base(x, output_size=size).double(), expected, atol=1e-5, rtol=1e-5)
    fastlora.fold(base)
    torch.testing.assert_close(base(x, output_size=size).double(), expected, atol=1e-5, rtol=1e-5)
    fastlora.unfold(base)
    fastlora.disable(base)
    assert same_bits(base(x, size), plain(x, size))
    with pytest.raises(ValueError, match="requested an output size"):
        base(x, [8, 12])


def test_lora_is_refused_with_words_where_somebody_asks_for_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer())
    before = snapshot(model)
    with pytest.raises(fastlora.AdapterError, match=r"1 \(ConvTranspose2d\): LoRA of transposed"):
        fastlora.inject(model, fastlora.LoRA(rank=2), where=r"\d")
    assert_unchanged(model, before)
    assert fastlora.inject(model, fastlora.LoRA(rank=2)).modules == ("0",)
    assert fastlora.inject(model, fastlora.Spectral(), name="s").modules == ("0", "1")


def test_copies_pickles_files_folds_and_verify(tmp_path) -> None:
    model, x = nn.Sequential(layer(groups=2), nn.GroupNorm(2, 6)), torch.randn(2, 4, 5, 6)
    other = copy.deepcopy(model)
    before = snapshot(model)
    info = fastlora.inject(model, fastlora.Spectral(), name="s")
    assert info.parameters == 6 + 6
    with torch.no_grad():
        for p in fastlora.parameters(model):
            p.copy_(0.3 * torch.randn(p.shape))
    y = model(x).detach()
    assert fastlora.verify(model, x).passed
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert same_bits(twin(x), y)
    fastlora.save(model, tmp_path / "a")
    fastlora.load(other, tmp_path / "a")
    assert same_bits(other(x), y)
    fastlora.fold(other, permanent=True)
    assert type(other[0]) is nn.ConvTranspose2d
    torch.testing.assert_close(other(x), y)
    fastlora.remove(model, "s")
    assert_unchanged(model, before)
