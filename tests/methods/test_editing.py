"""Slerp by its closed form, inversion and back, and an edit of a model that is known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastlora
from fastlora.methods import edit, invert, slerp
from fastlora.samplers import Schedule, ddim, noise, sample

SCHEDULE = Schedule.cosine()


class Gaussian(nn.Module):
    """The exact eps for data N(cond, 0.5^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(1, 1, bias=False)  # something that an adapter can change
        nn.init.ones_(self.shift.weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        a, s = (v[t].view(-1, 1, 1).to(x) for v in (SCHEDULE.alpha, SCHEDULE.sigma))
        mean = self.shift(cond[:, :, None])
        return s * (x - a * mean) / (a**2 * 0.25 + s**2)


def test_slerp_of_right_angles():
    z = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    e = torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    found = slerp(z, e, 1 / 3)  # 30 degrees of 90
    expected = [[3 * math.cos(math.pi / 6), 1.5], [1.0, 2 * math.cos(math.pi / 6)]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_slerp_has_its_ends_and_keeps_lengths():
    z, e = noise([1, 2], (3, 4)), noise([3, 4], (3, 4))
    torch.testing.assert_close(slerp(z, e, 0.0), z)
    torch.testing.assert_close(slerp(z, e, 1.0), e)
    e = e * (z.flatten(1).norm(dim=1) / e.flatten(1).norm(dim=1)).view(2, 1, 1)
    lengths = slerp(z, e, 0.3).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, z.flatten(1).norm(dim=1))


@pytest.mark.parametrize("angle", [0.0, 1e-7, 3e-6, math.pi - 1e-8])
def test_slerp_of_nearly_one_direction(angle):
    """Below sin 1e-6 it is the straight line, and the two agree where they meet."""
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    e = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    torch.testing.assert_close(slerp(z, e, 0.25), 0.75 * z + 0.25 * e, rtol=0, atol=1e-6)


def test_slerp_of_nothing_and_of_other_shapes():
    zero = torch.zeros(1, 4)
    torch.testing.assert_close(slerp(zero, torch.ones(1, 4), 0.5), torch.full((1, 4), 0.5))
    with pytest.raises(ValueError, match=r"expected z's shape \[1, 4\], got \[1, 3\]"):
        slerp(zero, torch.ones(1, 3), 0.5)


def test_inversion_and_back():
    model, cond = Gaussian(), torch.tensor([[2.0], [-1.0]])
    images = cond[:, :, None] + 0.5 * noise([5, 6], (1, 8))
    z = invert(model, images, cond, SCHEDULE, steps=200)
    back = sample(model, ddim(SCHEDULE, 200), z, cond, progress=False)
    assert (back - images).abs().max() < 0.1 * (images - cond[:, :, None]).abs().max()
    # of data N(c, s^2) the noise is (x - c) / s, for small steps
    assert (z - 2 * (images - cond[:, :, None])).abs().max() < 0.15


def test_an_edit_moves_what_the_caption_says_and_keeps_the_rest():
    """Under the target's own inversion x - c is what stays, so eta 0 and guidance 1 give x back."""
    model, target = Gaussian(), torch.tensor([[2.0]])
    images = 2.0 + 0.5 * noise([5], (1, 8))
    same = edit(model, images, target, None, SCHEDULE, steps=200, guidance_scale=1.0, eta=0.0)
    assert (same - images).abs().max() < 0.1
    moved = edit(model, images, target, torch.zeros(1, 1), SCHEDULE, steps=50, eta=0.0)
    assert (moved.mean() - images.mean()).item() > 1.0  # guidance 3 away from the mean 0
    pattern = torch.corrcoef(torch.stack([moved.flatten(), images.flatten()]))[0, 1]
    assert pattern > 0.99


def test_eta_and_perturb_loosen_the_edit():
    model, target = Gaussian(), torch.tensor([[2.0]])
    images = 2.0 + 0.5 * noise([5], (1, 256))

    def kept(**options) -> float:
        options = {"guidance_scale": 1.0, "steps": 100, "eta": 0.0, **options}
        out = edit(model, images, target, None, SCHEDULE, seeds=[7], **options)
        return torch.corrcoef(torch.stack([out.flatten(), images.flatten()]))[0, 1].item()

    assert kept() > 0.99
    assert kept() > kept(perturb=0.3) > kept(perturb=0.7) > kept(perturb=1.0)
    assert abs(kept(perturb=1.0)) < 0.3 and kept(eta=1.0) < kept(eta=0.5) < 0.99
    # independent noise of the same length at a right angle, nearly: cos(a pi / 2)
    assert kept(perturb=0.5) == pytest.approx(math.cos(math.pi / 4), abs=0.08)


def test_strengths_hold_for_the_edit_alone():
    model, target = Gaussian(), torch.tensor([[2.0]])
    fastlora.inject(model, fastlora.Spectral(), name="edit")
    with torch.no_grad():
        model.shift.fastlora["edit"].shift.fill_(0.5)  # means are 1.5 times as large
    images = 3.0 + 0.5 * noise([5], (1, 8))

    def mean(strength: float) -> float:
        out = edit(
            *(model, images, target, torch.zeros(1, 1), SCHEDULE),
            strengths={"edit": strength},
            eta=0.0,
        )
        return out.mean().item()

    assert mean(0.8) < mean(1.0) < mean(1.2)
    assert fastlora.adapters(model)["edit"].scale == 1.0


def test_perturb_out_of_range():
    with pytest.raises(ValueError, match="perturb: expected a number from 0 to 1, got 1.5"):
        edit(Gaussian(), torch.zeros(1, 1, 1), torch.zeros(1, 1), None, SCHEDULE, perturb=1.5)
