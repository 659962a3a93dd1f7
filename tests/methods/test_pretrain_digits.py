"""The script behind the shipped weights, for a few steps."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn", reason="the drawings come from scikit-learn's digits")

from fastlora.methods.pretrain_digits import pretrain_digits, train_judge
from fastlora.models.digits import DigitsModel
from fastlora.models.digits_data import draw_random, lines


def test_loss_falls_and_a_seed_decides_the_weights() -> None:
    data = draw_random(64, 0, lines(0, 60))
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = DigitsModel()
        losses = pretrain_digits(model, data, steps=30, batch=8, progress=False)
        states.append(model.state_dict())
        assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(p.is_contiguous() for p in model.parameters())


def test_judge_learns() -> None:
    source = lines(0, 60)
    judge = train_judge(source, steps=60, batch=64, drawings=1024, progress=False)
    drawn = draw_random(200, 3, source)
    assert (judge.score(drawn.images)["digit"] == drawn.digit).float().mean() > 0.6
    assert not judge.training
