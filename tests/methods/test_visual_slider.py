"""Visual sliders on a model small enough to know everything about."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from fastlora.methods import train_visual_slider
from fastlora.methods.visual_slider import noxattn
from fastlora.models.unet import UNet
from tests.training.toys import SCHEDULE, Toy


def pairs(count: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """low, high, cond: points, the same moved along one direction, and what they have in common."""
    generator = torch.Generator().manual_seed(1)
    middle = torch.randn(count, 6, generator=generator)
    cond = torch.randn(count, 4, generator=generator)
    direction = torch.tensor([2.0, -1.0, 0.0, 1.0, 0.0, 0.5])
    return middle - direction, middle + direction, cond


def slide(model: nn.Module, steps: int = 200, **options):
    options = {"lr": 1e-2, "prediction": "x0", "progress": False, "where": None, **options}
    return train_visual_slider(model, *pairs(), SCHEDULE, name="slider", steps=steps, **options)


def test_loss_falls() -> None:
    losses = slide(Toy(), steps=300, batch=8).metrics["loss"]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("strength", [1, 2.0], ids=["strength=1", "strength=2"])
def test_plus_goes_to_high_and_minus_to_low(strength: float) -> None:
    model = Toy()
    slide(model, batch=8, strength=strength)
    low, high, cond = pairs()
    along = (high - low)[0] / (high - low)[0].norm()  # the same for all pairs
    x, t = torch.randn(64, 4, 6), torch.full((256,), 60)
    moved = {}
    for s in (-strength, 0.0, strength):
        with torch.no_grad(), fastlora.scaled(model, {"slider": s}):
            predicted = model(x.flatten(0, 1), t, cond.repeat(64, 1)).view(64, 4, 6)
        moved[s] = (predicted @ along).mean(0)  # [4], of every pair
    assert (moved[strength] > moved[0.0] + 0.5).all()
    assert (moved[-strength] < moved[0.0] - 0.5).all()


def test_one_pass_a_step_with_both_signs_in_it() -> None:
    model, seen = Toy(), []

    def look(module: nn.Module, args: tuple) -> None:
        scale = fastlora.adapters(module)["slider"].scale
        seen.append((len(args[0]), scale.tolist(), torch.equal(*args[2].chunk(2))))

    model.register_forward_pre_hook(look)
    slide(model, steps=3, batch=5, strength=2)
    assert seen == [(10, [2.0] * 5 + [-2.0] * 5, True)] * 3


def test_leaves_the_base_alone_and_the_adapter_at_scale_one() -> None:
    model, before = Toy(), {k: v.clone() for k, v in Toy().state_dict().items()}
    slide(model, steps=5)
    info = fastlora.adapters(model)["slider"]
    assert (info.rank, info.scale, info.kind) == (4, 1.0, "lora")
    fastlora.remove(model, "slider")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_seed_decides_everything() -> None:
    def trained(seed: int) -> torch.Tensor:
        model = Toy()
        slide(model, steps=5, seed=seed)
        return torch.cat([p.detach().flatten() for p in fastlora.parameters(model, "slider")])

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))


def test_noxattn_takes_all_but_cross_attention_and_time() -> None:
    unet = UNet()
    taken = {p for p, m in unet.named_modules() if noxattn(p, m)}
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q" in taken
    assert "down_blocks.0.resnets.0.conv1" in taken
    left = {p for p, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)} - taken
    assert left and all("attn2" in p or "time_emb" in p for p in left)
    assert not any("attn2" in p or "time_emb" in p for p in taken)
    assert not noxattn("text_encoder.encoder.layers.0.mlp.fc1", nn.Linear(2, 2))


@pytest.mark.parametrize("counts", [(4, 3, 4), (4, 4, 3), (0, 0, 0)], ids=str)
def test_pairs_that_do_not_match_are_refused_and_nothing_is_added(counts) -> None:
    low, high, cond = pairs()
    model = Toy()
    with pytest.raises(ValueError, match=r"got {}, {}, {}".format(*counts)):
        train_visual_slider(
            model, low[: counts[0]], high[: counts[1]], cond[: counts[2]], SCHEDULE, steps=1
        )
    assert fastlora.adapters(model) == {}
