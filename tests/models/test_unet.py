"""The UNet against diffusers' blocks, by name and by number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlora.models.unet import (
    BasicTransformerBlock,
    ResnetBlock2D,
    Transformer2DModel,
    UNet,
    UNetConfig,
)

CONFIG = UNetConfig(block_out_channels=(16, 32), attention=(False, True), head_dim=16)


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights without the zeros of initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module.eval()


def arguments(batch: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, 32, 32, generator=generator).to(dtype)
    cond = torch.randn(batch, 12, 64, generator=generator).to(dtype)
    return [x, torch.tensor([0, 500, 999])[:batch], cond]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_output_has_the_shape_and_dtype_of_x(dtype: torch.dtype) -> None:
    unet = shaken(UNet(CONFIG)).to(dtype)
    out = unet(*arguments(dtype=dtype))
    assert out.shape == (3, 1, 32, 32) and out.dtype == dtype
    assert out.isfinite().all()


def test_samples_of_a_batch_do_not_meet() -> None:
    unet = shaken(UNet(CONFIG)).double()
    x, t, cond = arguments(dtype=torch.float64)
    out = unet(x, t, cond)
    for i in range(3):
        torch.testing.assert_close(
            unet(x[i : i + 1], t[i : i + 1], cond[i : i + 1]), out[i : i + 1]
        )


def test_time_and_text_reach_every_pixel() -> None:
    unet = shaken(UNet(CONFIG)).double()
    x, t, cond = arguments(dtype=torch.float64)
    out = unet(x, t, cond)
    for other in (unet(x, t + 1, cond), unet(x, t, cond.flip(0))):
        assert ((other - out)[0].abs() > 0).all()


def test_every_parameter_gets_a_gradient() -> None:
    unet = shaken(UNet(UNetConfig(layers_per_block=2)))
    unet(*arguments()).square().sum().backward()
    without = [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_fresh_network_predicts_zero() -> None:
    """The last layer starts at zero but for its bias."""
    unet = UNet(CONFIG)
    nn.init.zeros_(unet.conv_out.bias)
    assert not unet(*arguments()).any()


def test_parameters_are_called_as_in_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="its UNet is the model for the names")
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    theirs = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        cross_attention_dim=64,
        attention_head_dim=32,
        norm_num_groups=8,
        use_linear_projection=True,
    )
    names = {name for name, _ in theirs.named_parameters()}
    ours = {name for name, _ in UNet().named_parameters()}
    assert ours - names == set()
    assert not any(".resnets.1." in name for name in ours if not name.startswith("mid_block"))


def test_time_features_are_diffusers() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="the other half")
    t = torch.tensor([0, 1, 250, 999])
    expected = embeddings.get_timestep_embedding(
        t, 32, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(UNet().time_proj(t), expected)


def test_residual_block_computes_what_diffusers_does() -> None:
    resnet = pytest.importorskip("diffusers.models.resnet", reason="the other half")
    ours = shaken(ResnetBlock2D(16, 32, 24, 8)).double()
    theirs = resnet.ResnetBlock2D(
        in_channels=16, out_channels=32, temb_channels=24, groups=8, eps=1e-5
    ).double()
    theirs.load_state_dict(ours.state_dict())
    x, temb = torch.randn(2, 16, 8, 8).double(), torch.randn(2, 24).double()
    torch.testing.assert_close(ours(x, temb), theirs(x, temb))


def test_transformer_computes_what_diffusers_does() -> None:
    attention = pytest.importorskip("diffusers.models.attention", reason="the other half")
    ours = shaken(BasicTransformerBlock(32, 24, 16)).double()
    theirs = attention.BasicTransformerBlock(
        dim=32, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=24
    ).double()
    # theirs has a feed-forward of four times the width and no setting for it
    theirs.ff = attention.FeedForward(32, mult=2).double()
    theirs.load_state_dict(ours.state_dict())
    x, cond = torch.randn(2, 9, 32).double(), torch.randn(2, 5, 24).double()
    torch.testing.assert_close(ours(x, cond), theirs(x, encoder_hidden_states=cond))


def test_transformer_over_pixels_treats_each_pixel_as_a_token() -> None:
    """Moving the pixels moves the result, and nothing else: there are no positions in it."""
    block = shaken(Transformer2DModel(16, 24, 16, groups=1)).double()
    x, cond = torch.randn(2, 16, 4, 4).double(), torch.randn(2, 5, 24).double()
    order = torch.randperm(16)

    def moved(y: torch.Tensor) -> torch.Tensor:
        return y.flatten(2)[:, :, order].view_as(y)

    torch.testing.assert_close(block(moved(x), cond), moved(block(x, cond)))
