"""The warpgroup kernels of `spectral_weights` and `spectral_dots`, as an emulated 9.0 runs them."""

import importlib
from contextlib import contextmanager

import pytest
import torch

from fastlora import ops
from tests.cases import assert_twofold, identify, widened
from tests.ops.test_spectral_groups import (
    LOW,
    by_hand,
    exact_dots,
    layer,
    low_dots,
    run,
)

pytestmark = pytest.mark.emulated

# (out, in, rank): less than a tile, whole tiles of 128 x 256 in steps of 64, more of each. An
# emulated GPU has two multiprocessors: a block of the first kernel has several of these tiles.
SHAPES = [(8, 8, 8), (128, 256, 64), (1, 512, 200), (136, 264, 72), (264, 16, 136)]


@contextmanager
def gpu(capability: int, runs: int = 3):
    emulator = importlib.import_module("fastlora._emulator")
    before = emulator.capability()
    emulator.set_capability(capability)
    try:
        with ops.emulated(runs=runs):
            yield emulator.launches
    finally:
        emulator.set_capability(before)


def factors_of(layers):
    return [[args[i] for args in layers] for i in (0, 1, 3)]


@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_weights_of_several_layers_against_float64(dtype):
    layers = [layer(*shape, dtype) for shape in SHAPES]
    with gpu(90) as launches:
        found = run(layers)
        assert launches() == ["spectral_weight_sm90"]
    for args, result in zip(layers, found, strict=True):
        exact = by_hand(*widened(args[:-1]))
        assert_twofold(result, exact, ops.spectral_weight.reference(*args[:-1]))


@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_weights_are_rounded_once(dtype):
    """W + (U c, rounded) Vᵀ in float64, to the nearest: but for ties of what float32 summed."""
    args = layer(136, 264, 72, dtype)
    with gpu(90, runs=1):
        (found,) = run([args])
    weight, u, s, vh, shift, strength = args[:-1]
    change = torch.maximum(strength * shift, -s)
    exact = weight.double() + (u.float() * change).to(dtype).double() @ vh.double()
    half = torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() <= exact.abs() * half * 1.01 + 1e-6).all()


@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_components_that_are_off(dtype):
    args = layer(136, 264, 72, dtype)
    off = torch.arange(72) % 3 == 0
    args[4][off] = 0.0
    with gpu(90, runs=2):
        plain = run([args])[0].clone()
        args[1][:, off], args[3][off] = float("nan"), float("inf")
        assert torch.equal(run([args])[0], plain)
        args[0][0, 0] = -0.0
        args[4].zero_()
        (still,) = run([args])
    assert torch.equal(still, args[0]) and still[0, 0].signbit()


def test_weights_in_place():
    args = layer(136, 264, 72, torch.bfloat16)
    with gpu(90, runs=2):
        apart = run([args])[0].clone()
        args[-1] = args[0]
        assert torch.equal(run([args])[0], apart)


@pytest.mark.parametrize("dtype", LOW, ids=identify)
def test_dots_of_several_layers_against_float64(dtype):
    layers = [layer(*shape, dtype) for shape in [*SHAPES[:4], (264, 72, 264)]]
    lists = factors_of(layers)
    with gpu(90) as launches:
        found = ops.spectral_dots(*lists)
        assert launches() == ["spectral_dots_sm90", "spectral_sums"]
    for grad, u, vh, dot in zip(*lists, found, strict=True):
        assert_twofold(dot, exact_dots(grad, u, vh), low_dots(grad, u, vh))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_who_computes_what(capability):
    """Rows in groups of eight are for warpgroups, on a 9.0 and nowhere else."""
    aligned, odd = layer(16, 24, 16, torch.bfloat16), layer(16, 20, 12, torch.bfloat16)
    padded = layer(16, 24, 16, torch.bfloat16)
    padded[0] = torch.cat([padded[0]] * 2, 1)[:, :24]
    layers = [aligned, odd, padded]
    ours = ["spectral_weight_sm90"] if capability == 90 else []
    with gpu(capability, runs=1) as launches:
        found = run(layers)
        assert launches() == [*ours, "spectral_weight_sm80"]
        ops.spectral_dots(*factors_of([aligned, padded]))
        assert launches()[0] == f"spectral_dots_sm{'90' if capability == 90 else '80'}"
    for args, result in zip(layers, found, strict=True):
        exact = by_hand(*widened(args[:-1]))
        assert_twofold(result, exact, ops.spectral_weight.reference(*args[:-1]))
