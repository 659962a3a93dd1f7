"""What the demo claims, over several seeds: the slider moves the stroke and the digit stays, the
subject is learnt and the classes stay.

The gates lie below what was measured with these settings over five seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("PIL", reason="the demo needs fastlora[demo]")
pytest.importorskip("sklearn", reason="the demo needs fastlora[demo]")
pytest.importorskip("transformers", reason="the demo needs fastlora[demo]")

import fastlora
from fastlora.demo import Settings
from fastlora.demo.slider import make_slider
from fastlora.demo.subject import distances, judged, prepare, shows, train
from fastlora.demo.world import World
from fastlora.models import digits_data

# A part of the demo's samples, in fewer steps; the slider's training is the demo's.
SETTINGS = replace(
    Settings(),
    noises=1,
    strengths=(-2.0, -1.0, 0.0, 1.0, 2.0),
    steps=12,
    subject_steps=100,
    judged=12,
    judged_classes=3,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers: threads would mostly wait for each other on a busy machine."""
    torch.set_num_threads(1)
    yield


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stroke_rises_with_strength_and_the_digit_stays(seed: int) -> None:
    found = make_slider(World.make(SETTINGS, seed, progress=False))
    mean = found.thickness.mean(0)  # [5]
    assert found.mean_rises
    assert mean[1] - mean[0] > 0.15 and mean[4] - mean[3] > 0.1  # also where nothing was trained
    assert mean[3] - mean[1] > 1.2 and mean[4] - mean[0] > 2.0  # pixels
    assert found.rows_rising >= 9  # of 10
    assert min(found.accuracy) >= 0.9 and found.kept.float().mean() >= 0.96


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_subject_is_learnt_and_the_classes_stay(seed: int) -> None:
    world = World.make(SETTINGS, seed, progress=False)
    model = world.load_model()
    task = prepare(world, model)
    before = judged(world, model, task.subject)
    after = train(world, model, task, fastlora.Spectral()).scores
    assert before.shown <= 0.1 and before.classes >= 0.9
    assert after.shown >= 0.7
    assert after.distance < 0.5 * before.distance
    assert after.leaked <= 0.2
    assert after.classes >= 0.9


def test_an_untrained_slider_fails_the_claim() -> None:
    found = make_slider(World.make(replace(SETTINGS, slider_steps=1), 0, progress=False))
    assert found.thickness[:, 4].mean() - found.thickness[:, 0].mean() < 0.5


def test_the_subject_and_its_mirror_image_are_told_apart() -> None:
    world = World.make(SETTINGS, 0, progress=False)
    subject = digits_data.subject("mirrored", 3, count=5, seed=0)
    assert shows(world, subject.images, subject).float().mean() >= 0.8
    assert not shows(world, subject.images.flip(3), subject).any()
    assert not shows(world, torch.rand(4, 1, 32, 32) * 2 - 1, subject).any()


def test_distances() -> None:
    a = torch.zeros(1, 1, 8, 8)
    b = torch.zeros(2, 1, 8, 8)
    b[0, 0, 4, 4] = 9.0  # one over 3x3 pixels after blurring: distance 3
    b[1] += 5
    assert distances(a, b).item() == pytest.approx(3.0)
    assert distances(b, b).max().item() < 1e-3
