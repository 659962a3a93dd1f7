"""Captured maps against maps written out by hand, on three kinds of attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from fastlora.methods import capture_attention
from fastlora.methods.attention_maps import grid_shape, token_positions
from fastlora.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(8, 16),
    attention=(False, True),
    cross_attention_dim=12,
    head_dim=8,
    groups=4,
)


def explicit(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) head by head, in float64."""
    found = []
    d = q.shape[-1] // heads
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        scores = torch.einsum("bnd,bld->bnl", q[..., part].double(), k[..., part].double())
        e = (scores / d**0.5).exp()
        found.append(e / e.sum(-1, keepdim=True))
    return torch.stack(found, 1)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    nn.init.normal_(unet.conv_out.weight, std=0.1)  # it starts at zero, and gradients with it
    return unet


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, 16, 16, generator=generator)
    return x, torch.tensor([3, 700])[:batch], torch.randn(batch, 5, 12, generator=generator)


def test_maps_of_the_packages_unet(unet):
    seen = {}
    module = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    module.register_forward_pre_hook(lambda m, args: seen.update(x=args[0], cond=args[1]))
    with capture_attention(unet) as maps:
        unet(*inputs())
    assert set(maps) == {p for p, _ in unet.named_modules() if p.endswith("attn2")}
    found = maps["mid_block.attentions.0.transformer_blocks.0.attn2"]
    expected = explicit(module.to_q(seen["x"]), module.to_k(seen["cond"]), 2)
    assert found.dtype == torch.float32 and found.shape == (2, 2, 16, 5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_capture_changes_no_output_and_leaves_no_hook(unet):
    before = unet(*inputs())
    with capture_attention(unet) as maps:
        during = unet(*inputs())
        kept = dict(maps)
    assert torch.equal(before, during) and torch.equal(before, unet(*inputs()))
    hooks = [m for m in unet.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert all(maps[path] is kept[path] for path in kept)  # the call after the block is not in it


def test_hooks_go_when_the_block_fails(unet):
    with pytest.raises(RuntimeError, match="mine"), capture_attention(unet):
        raise RuntimeError("mine")
    assert not any(m._forward_hooks for m in unet.modules())


def test_the_latest_call_counts(unet):
    x, t, cond = inputs()
    with capture_attention(unet) as maps:
        unet(x, t, cond)
        first = dict(maps)
        unet(x, t, cond.flip(0))
    path = next(iter(maps))
    assert not torch.equal(maps[path], first[path])


def test_self_attention_on_request(unet):
    with capture_attention(unet, r".*mid_block.*attn1") as maps:
        unet(*inputs())
    assert [m.shape[2:] for m in maps.values()] == [(16, 16)]


def test_maps_are_differentiable(unet):
    """d(sum of map * w) / d(to_k's weight) against central differences in float64."""
    unet = unet.double()
    x, t, cond = inputs()
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    weight = unet.get_submodule(path).to_k.weight
    w = torch.randn(2, 2, 16, 5, generator=torch.Generator().manual_seed(4))

    def value() -> torch.Tensor:
        with capture_attention(unet, path) as maps:
            unet(x.double(), t, cond.double())
        return (maps[path] * w).sum()

    (gradient,) = torch.autograd.grad(value(), weight)
    step = 1e-2  # the map is float32
    for index in ((0, 0), (3, 7)):
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight[index] += sign * step
                values.append(value().item())
                weight[index] -= sign * step
        expected = (values[0] - values[1]) / (2 * step)
        assert gradient[index].item() == pytest.approx(expected, rel=2e-2, abs=2e-4)


def test_adapters_on_the_projections_are_in_the_map(unet):
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    fastlora.inject(unet, fastlora.LoRA(rank=2), r".*attn2\.to_[qk]", name="a", seed=0)
    module = unet.get_submodule(path)
    with torch.no_grad():
        for p in module.to_k.fastlora["a"].parameters():  # the up of to_q stays zero
            p.add_(0.3)
    seen = {}
    module.register_forward_pre_hook(lambda m, args: seen.update(x=args[0], cond=args[1]))
    with capture_attention(unet, path) as maps:
        unet(*inputs())
    with fastlora.scaled(unet, {"a": 0.0}), capture_attention(unet, path) as off:
        unet(*inputs())
    q, k = seen["x"] @ module.to_q.weight.T, seen["cond"] @ module.to_k.weight.T
    low = dict(module.to_k.fastlora["a"].named_parameters())
    added = seen["cond"] @ low["down"].T @ low["up"].T
    for found, expected in ((maps, explicit(q, k + added, 2)), (off, explicit(q, k, 2))):
        torch.testing.assert_close(found[path].double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(maps[path], off[path], atol=1e-3)


class Generic(nn.Module):
    """The other names, norms of single heads, and a mask by position."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(4), nn.RMSNorm(4)

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None):
        q, k, v = (
            p(y).unflatten(-1, (2, 4)).transpose(1, 2)
            for p, y in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        self.used = scores = self.q_norm(q) @ self.k_norm(k).transpose(-1, -2) / 4**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        self.map = scores.softmax(-1)
        return self.map @ v


@pytest.mark.parametrize("masked", [False, True])
def test_other_names_norms_and_masks(masked):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Generic()})
    mask = torch.tensor([[True, True, False], [True, False, True]]) if masked else None
    with capture_attention(model, "attn") as maps:
        model["attn"](torch.randn(2, 6, 8), torch.randn(2, 3, 8), mask)
    torch.testing.assert_close(maps["attn"], model["attn"].map)
    if masked:
        assert maps["attn"][0, :, :, 2].abs().max() == 0


def test_maps_of_diffusers():
    """Every processor that computes maps leaves them alone: against diffusers' own scores."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()
    theirs: dict[str, torch.Tensor] = {}

    class Recording(AttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **rest):
            path = paths[id(attn)]
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k = (
                attn.head_to_batch_dim(y) for y in (attn.to_q(hidden_states), attn.to_k(context))
            )
            theirs[path] = attn.get_attention_scores(q, k).unflatten(0, (-1, attn.heads))
            return super().__call__(attn, hidden_states, encoder_hidden_states, **rest)

    paths = {id(m): p for p, m in unet.named_modules()}
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 7, 12)
    ours = {}
    for processor in (AttnProcessor2_0(), Recording()):
        unet.set_attn_processor(processor)
        with torch.no_grad(), capture_attention(unet) as maps:
            unet(x, t, encoder_hidden_states=cond)
        ours[type(processor).__name__] = dict(maps)
    assert len(ours["Recording"]) == 4
    for found in ours.values():
        assert all(p.endswith("attn2") for p in found)
        for path, value in found.items():
            torch.testing.assert_close(value, theirs[path], rtol=1e-4, atol=1e-6)


def test_a_fused_attention_is_refused(unet):
    module = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    module.forward = lambda x, context=None: x
    with capture_attention(unet), pytest.raises(RuntimeError, match="projections of queries"):
        unet(*inputs())


def test_nothing_to_capture_is_refused(unet):
    with pytest.raises(ValueError, match="matches none; this model has for example"):
        with capture_attention(unet, "nowhere"):
            pass
    broken = nn.ModuleDict({"attn2": Generic()})
    broken["attn2"].num_heads = None
    with pytest.raises(ValueError, match="expected an int `heads`"), capture_attention(broken):
        pass


@pytest.mark.parametrize(
    ("positions", "size", "expected"),
    [
        (64, (32, 32), (8, 8)),
        (128, (32, 64), (8, 16)),
        (25, (33, 33), (5, 5)),  # odd sizes are rounded on the way down
        (96 * 72, (96, 72), (96, 72)),
        (15, (40, 24), (5, 3)),
        (1, (8, 8), (1, 1)),
    ],
)
def test_grid_shape(positions, size, expected):
    assert grid_shape(positions, *size) == expected


def test_grid_shape_of_another_picture():
    with pytest.raises(ValueError, match="expected those of a 32x32"):
        grid_shape(7, 32, 32)


def test_token_positions():
    empty = torch.tensor([0, 9, 9, 9, 9, 9, 9])
    ids = torch.tensor([0, 4, 5, 7, 5, 6, 9])
    found = token_positions(ids, torch.tensor([0, 5, 6, 9, 9, 9, 9]), empty)
    assert found.tolist() == [False, False, False, False, True, True, False]
    for phrase, count in (([0, 5, 9], 2), ([0, 8, 9], 0), ([0, 9, 9], 0)):
        with pytest.raises(ValueError, match=f"{count} times"):
            token_positions(ids, torch.tensor(phrase), empty)
