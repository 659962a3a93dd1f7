"""The contenders of the pipelines' benchmark make the pictures that their names say."""

from __future__ import annotations

import pytest
import torch

import fastlora
from bench import bench_pipelines as bench


@torch.no_grad()
def test_contenders_of_the_cpu(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    bench.write(bench.pipeline(bench.SMALL), str(tmp_path))
    made = {
        name: bench.call(bench.with_lora(bench.pipeline(bench.SMALL), name, str(tmp_path)), 2)()
        for name in bench.EAGER
    }
    floor = made.pop("floor")
    for name, images in made.items():  # the adapter's pictures are one another's, not the plain
        torch.testing.assert_close(images, made["peft"], rtol=1e-3, atol=1e-4, msg=name)
        assert (images - floor).abs().max() > 0.01, name


def test_layers_that_have_the_adapter():
    pytest.importorskip("diffusers")
    unet = bench.pipeline(bench.SMALL).unet
    names = [n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear)]
    wanted = [n for n in names if ".attn" in n or ".ff." in n]
    fastlora.inject(unet, fastlora.LoRA(2), bench.TARGETS, name="a")
    assert list(fastlora.adapters(unet)["a"].modules) == wanted
