"""What the recipes claim, on the shipped model, with settings of the demo cut short."""

import pytest
import torch

import fastlora
from fastlora.methods.svdiff import personalise
from fastlora.methods.visual_slider import train_visual_slider
from fastlora.models import digits, digits_data, judge
from fastlora.samplers import noise

SCHEDULE = fastlora.Schedule.cosine(1000)
WORDS = ("zero", "two", "three", "seven", "nine")


def sampled(model, captions, seed):
    table = fastlora.ddim(SCHEDULE, 12, prediction="v", spacing="trailing")
    x = noise(list(range(seed, seed + len(captions))), model.shape)
    cond, uncond = model.encode(captions), model.encode([""] * len(captions))
    return fastlora.sample(model, table, x, cond, uncond, 2.0, progress=False)


@pytest.mark.parametrize("seed", [0, 1])
def test_visual_slider_thickens_strokes_and_keeps_the_digit(seed):
    """In one batch with a strength for every sample; mean stroke width rises at every step."""
    model = digits.load()
    pairs = digits_data.pairs(6, seed=seed)
    train_visual_slider(
        model,
        pairs.low,
        pairs.high,
        model.encode(pairs.captions),
        SCHEDULE,
        prediction="v",
        steps=60,
        batch=6,
        seed=seed,
        progress=False,
    )
    strengths = torch.tensor([-1.0, 0.0, 1.0])
    captions = [f"a bright {word}" for word in WORDS]
    fastlora.set_scale(model, {"slider": strengths.repeat_interleave(len(WORDS))})
    table = fastlora.ddim(SCHEDULE, 12, prediction="v", spacing="trailing")
    x = noise(list(range(50, 50 + len(WORDS))), model.shape).repeat(3, 1, 1, 1)
    cond, uncond = model.encode(captions * 3), model.encode([""] * len(x))
    images = fastlora.sample(model, table, x, cond, uncond, 2.0, progress=False)
    scores = judge.load().score(images)
    thin, middle, thick = scores["thickness"].view(3, -1).mean(1).tolist()
    assert thin < middle < thick
    asked = torch.tensor([0, 2, 3, 7, 9]).repeat(3)
    assert (scores["digit"] == asked).float().mean() >= 0.85


def test_svdiff_learns_the_subject_and_keeps_the_rest():
    model = digits.load()
    subject = digits_data.subject("mirrored", 3, count=5)
    captions = [subject.class_caption] * 6
    prior = sampled(model, captions, 900)
    before = sampled(model, [subject.caption] * 8, 100)
    result = personalise(
        model,
        subject.images,
        model.encode(subject.caption),
        SCHEDULE,
        prior_images=prior,
        prior_cond=model.encode(captions),
        where=lambda path, module: path.startswith("unet"),
        prediction="v",
        steps=50,
        batch=6,
        lr=2e-2,
        norm_lr=3e-3,
        progress=False,
    )
    history = result.metrics["subject"]
    assert sum(history[-2:]) < sum(history[:2])
    after = sampled(model, [subject.caption] * 8, 100)

    def distance(images):
        return torch.cdist(images.flatten(1), subject.held_out.flatten(1)).min(1).values.mean()

    assert distance(after) < 0.97 * distance(before)  # 0.91 measured at these few steps
    captions = [f"a {word}" for word in WORDS] * 2
    read = judge.load().score(sampled(model, captions, 300))["digit"]
    assert (read == torch.tensor([0, 2, 3, 7, 9]).repeat(2)).float().mean() >= 0.7
