"""Cut-Mix-Unmix: collages, captions, what is drawn how often, and the unmix loss by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

import fastlora
from fastlora.methods import Concept, capture_attention, collage, cut_mix_unmix, unmix_loss
from fastlora.methods.collages import PROBABILITY, TEMPLATE, Draws, collage_captions
from fastlora.models.digits import DigitsModel
from fastlora.models.text import Tokenizer
from fastlora.models.unet import UNet, UNetConfig
from fastlora.samplers import Schedule

TOKENIZER = Tokenizer()
TEXTS = {"template": "a {left} on the left and a {right} on the right", "single": "a {name}"}


def tokenize(caption: str) -> torch.Tensor:
    return TOKENIZER(caption)[0]


def flat(value: float, count: int = 4) -> torch.Tensor:
    return torch.full((count, 1, 16, 16), value)


def concepts(count: int = 2, prior: bool = True) -> list[Concept]:
    words = ("three", "seven", "two")
    return [
        Concept(flat(i + 1.0), f"v{i + 1} {word}", word, flat(-i - 1.0) if prior else None)
        for i, word in enumerate(words[:count])
    ]


def changed(**fields) -> list[Concept]:
    """The first of two subjects with other fields."""
    first, second = concepts()
    return [dataclasses.replace(first, **fields), second]


def test_collage_takes_the_middle_of_each():
    left, right = torch.arange(8.0).expand(1, 2, 8), 10 + torch.arange(8.0).expand(1, 2, 8)
    assert collage(left, right)[0, 0].tolist() == [2, 3, 4, 5, 12, 13, 14, 15]
    assert collage(left, right, "squeeze")[0, 1].tolist() == [0.5, 2.5, 4.5, 6.5] + [
        10.5,
        12.5,
        14.5,
        16.5,
    ]


def test_collage_of_an_odd_width():
    left, right = torch.zeros(3, 2, 5), torch.ones(3, 2, 5)
    for fit in ("crop", "squeeze"):
        assert collage(left, right, fit)[2, 1].tolist() == [0, 0, 0, 1, 1]


def test_collage_refuses():
    with pytest.raises(ValueError, match="one size"):
        collage(torch.zeros(1, 2, 4), torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match="expected crop or squeeze, got 'fill'"):
        collage(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), "fill")


def test_the_papers_caption():
    dog, cup = Concept(flat(0), "[V1] dog", "dog"), Concept(flat(0), "[V2] cup", "cup")
    own, of_classes = collage_captions(dog, cup)
    assert own == "photo of a [V1] dog on the left and a [V2] cup on the right"
    assert of_classes == "photo of a dog on the left and a cup on the right"
    assert TEMPLATE.format(left="x", right="y") == "photo of a x on the left and a y on the right"


def test_unmix_loss_by_hand():
    """Two heads, a 2x2 feature map, four tokens; token 1 is the left subject, 2 and 3 the right."""
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 0, :, 1] = torch.tensor([0.1, 0.4, 0.3, 0.8])  # positions: left right left right
    maps[0, 1, :, 1] = torch.tensor([0.5, 0.2, 0.1, 0.0])
    maps[0, 0, :, 2] = torch.tensor([0.2, 0.9, 0.0, 0.7])
    maps[0, 1, :, 3] = torch.tensor([0.6, 0.0, 0.4, 0.3])
    left = torch.tensor([[False, True, False, False]])
    right = torch.tensor([[False, False, True, True]])
    of_left = (0.3**2 + 0.4**2) / 2  # mean head, right column
    of_right = (0.1**2 + 0.0 + 0.3**2 + 0.2**2) / 4  # both tokens, left column
    found = unmix_loss({"a": maps}, left, right, (8, 8))
    assert found.item() == pytest.approx((of_left + of_right) / 2)
    # a layer that is apart already halves it; a row without marks changes nothing
    assert unmix_loss({"a": maps, "b": torch.zeros(1, 1, 16, 4)}, left, right, (8, 8)).item() == (
        pytest.approx(found.item() / 2)
    )
    more = torch.cat([maps, torch.ones_like(maps)])
    left, right = (torch.cat([m, torch.zeros_like(m)]) for m in (left, right))
    assert unmix_loss({"a": more}, left, right, (8, 8)).item() == pytest.approx(found.item())


def test_unmix_loss_of_what_stays_on_its_side_is_zero():
    maps = torch.zeros(1, 1, 16, 3)
    column = torch.arange(16) % 4
    maps[0, 0, column < 2, 1], maps[0, 0, column >= 2, 2] = 1.0, 1.0
    left, right = torch.tensor([[False, True, False]]), torch.tensor([[False, False, True]])
    assert unmix_loss({"a": maps}, left, right, (32, 32)).item() == 0
    assert unmix_loss({"a": maps}, right, left, (32, 32)).item() == 1


def test_unmix_loss_without_collages_or_maps():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert unmix_loss({"a": torch.ones(2, 1, 4, 3)}, nothing, nothing, (8, 8)).item() == 0
    with pytest.raises(ValueError, match="at least one layer"):
        unmix_loss({}, nothing, nothing, (8, 8))


def test_how_often_what_is_drawn():
    draws = Draws(concepts(), tokenize, **TEXTS)
    generator = torch.Generator().manual_seed(0)
    drawn = [draws.draw(generator) for _ in range(4000)]
    mixed = [d for d in drawn if d.left.any()]
    # four standard deviations of a binomial's share
    assert len(mixed) / 4000 == pytest.approx(PROBABILITY, abs=4 * (0.24 / 4000) ** 0.5)
    first_left = sum("v1 three on the left" in d.caption for d in mixed) / len(mixed)
    assert first_left == pytest.approx(0.5, abs=4 * (0.25 / len(mixed)) ** 0.5)
    plain = [d for d in drawn if not d.left.any()]
    assert {d.caption for d in plain} == {"a v1 three", "a v2 seven"}
    assert all(not d.right.any() for d in plain)


def test_samples_captions_priors_and_marks_fit_together():
    draws = Draws(concepts(3), tokenize, **TEXTS)
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for _ in range(300):
        d = draws.draw(generator)
        one, other = d.image[0, 0, 0].item(), d.image[0, 0, -1].item()
        words = {1.0: "three", 2.0: "seven", 3.0: "two"}
        if d.left.any():
            seen.add((one, other))
            a, b = words[one], words[other]
            assert d.caption == f"a v{one:g} {a} on the left and a v{other:g} {b} on the right"
            assert d.prior_caption == f"a {a} on the left and a {b} on the right"
            marked = [TOKENIZER.decode(tokenize(d.caption)[m][None])[0] for m in (d.left, d.right)]
            assert marked == [f"v{one:g} {a}", f"v{other:g} {b}"]
        else:
            assert one == other and d.caption == f"a v{one:g} {words[one]}"
            assert d.prior_caption == f"a {words[one]}"
        assert torch.equal(d.prior_image, -d.image)
    assert seen == set(itertools.permutations((1.0, 2.0, 3.0), 2))  # of three, any pair


class Small(nn.Module):
    """The package's UNet with an embedding as its text encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = UNetConfig(
            block_out_channels=(8, 16),
            attention=(False, True),
            cross_attention_dim=12,
            head_dim=8,
            groups=4,
        )
        self.unet = UNet(config)
        nn.init.normal_(self.unet.conv_out.weight, std=0.1)
        self.words = nn.Embedding(len(TOKENIZER), 12)

    def encode(self, captions: list[str]) -> torch.Tensor:
        return self.words(TOKENIZER(captions))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, cond)


def learn(model: Small, subjects: list[Concept] | None = None, **options):
    options = {"steps": 30, "batch": 4, "lr": 3e-2, "progress": False, **TEXTS, **options}
    subjects = concepts() if subjects is None else subjects
    return cut_mix_unmix(model, subjects, model.encode, tokenize, Schedule.cosine(), **options)


def strayed(model: Small) -> float:
    """The unmix loss of a caption, without training."""
    caption = "a v1 three on the left and a v2 seven on the right"
    marks = Draws(concepts(), tokenize, **TEXTS).marks(0, 1)
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), capture_attention(model) as maps:
        model(x, torch.tensor([100, 300, 500, 700]), model.encode([caption] * 4))
    left, right = (m.expand(4, -1) for m in marks)
    return unmix_loss(maps, left, right, (16, 16)).item()


@pytest.mark.slow
def test_unmix_keeps_the_words_on_their_sides():
    loose, tight = Small(), Small()
    learn(loose, unmix_weight=0.0)
    learn(tight, unmix_weight=50.0)
    assert strayed(tight) < 0.6 * strayed(loose)


def test_both_losses_fall_and_are_reported():
    metrics = learn(Small(), unmix_weight=10.0).metrics
    assert set(metrics) == {"loss", "subject", "prior", "unmix", "grad_norm"}
    assert metrics["subject"][-1] < metrics["subject"][0]
    total = [
        s + p + 10 * u
        for s, p, u in zip(metrics["subject"], metrics["prior"], metrics["unmix"], strict=True)
    ]
    assert metrics["loss"] == pytest.approx(total, rel=1e-4)


def test_without_a_prior_and_without_unmix():
    metrics = learn(Small(), concepts(prior=False), steps=10, unmix_weight=0.0).metrics
    assert "prior" not in metrics and metrics["unmix"] == [0.0]


def test_a_prior_of_weight_0_is_never_drawn():
    """And its captions may be anything."""
    with_prior, without = Small(), Small()
    learn(with_prior, changed(class_name="cow"), steps=1, prior_weight=0.0)
    learn(without, concepts(prior=False), steps=1)
    pairs = zip(with_prior.state_dict().values(), without.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_models_code_is_as_it_was():
    model = Small()
    learn(model, steps=2, unmix_weight=1.0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subjects": concepts(1)}, "expected two or more, got 1"),
        ({"subjects": [concepts()[0], concepts(prior=False)[1]]}, "for all subjects or none"),
        ({"probability": 1.2}, "probability: expected 0 to 1, got 1.2"),
        ({"unmix_weight": -0.1}, "unmix_weight: expected a finite number >= 0, got -0.1"),
        ({"template": "a {left} and a {left}"}, "expected its tokens once in the prompt"),
        ({"unmix_weight": math.nan}, "unmix_weight: expected a finite number >= 0, got nan"),
        ({"probability": math.nan}, "probability: expected 0 to 1, got nan"),
        ({"prior_weight": -1}, "prior_weight: expected a finite number >= 0, got -1"),
        (
            {"prior_weight": -1, "subjects": concepts(prior=False)},
            "prior_weight: expected a finite number >= 0, got -1",
        ),
        ({"batch": 0}, "batch: expected an int from 1"),
        ({"batch": 1.5}, "batch: expected an int from 1"),
        ({"subjects": changed(images=flat(1.0)[:0])}, "images of 'v1 three': expected at least"),
        ({"subjects": changed(images=flat(1.0).double())}, "images of 'v1 three': expected torch"),
        ({"subjects": changed(images=flat(1.0)[0])}, r"expected \[N, C, H, W\]"),
        ({"subjects": changed(images=flat(1.0)[..., :8])}, "of one size for all subjects"),
        ({"subjects": changed(prior_images=flat(1.0)[:0])}, "prior_images of 'v1 three': expected"),
        ({"template": "{foo}"}, r"template: expected a caption with \{left\} and \{right\}, got"),
        ({"template": "{"}, r"template: expected a caption with \{left\} and \{right\}, got"),
        ({"single": "{foo}"}, r"single: expected a caption with \{name\}, got '\{foo\}'"),
        ({"single": "a cow {name}"}, r"expected words of the vocabulary, got \['cow'\]"),
        (
            {"subjects": changed(class_name="cow")},
            r"expected words of the vocabulary, got \['cow'\]",
        ),
        ({"fit": "fill"}, "fit: expected crop or squeeze, got 'fill'"),
        ({"prediction": "noise"}, "prediction: expected"),
        ({"attention": "nothing"}, "capture_attention: where: expected to match a module"),
        ({"lr": -1.0}, "lr: expected a finite number >= 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals_before_anything_is_added(change, message):
    model = Small()
    with pytest.raises(ValueError, match=message):
        learn(model, **change)
    assert fastlora.adapters(model) == {}


def test_the_digits_models_captions_have_room_for_two_subjects():
    draws = Draws(concepts(), tokenize, **TEXTS)
    assert len(draws.captions(0, 1)[0].split()) <= DigitsModel().tokenizer.length - 2
