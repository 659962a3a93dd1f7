"""What the demo does and how much of it, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The defaults take about a minute and a half on two cores."""

    # the thickness slider: Concept Sliders' own rank, alpha and learning rate
    pairs: int = 6
    slider_rank: int = 4
    slider_alpha: float = 1.0
    slider_lr: float = 2e-4
    slider_steps: int = 100
    slider_batch: int = 6
    strengths: tuple[float, ...] = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
    noises: int = 2  # every digit from so many different noises

    # the subject. SVDiff's rates are for a model 450 times as large, whose singular values are
    # larger and whose training is longer; ours were chosen on this model.
    subject_digit: int = 3
    subject_images: int = 5
    subject_steps: int = 150
    subject_batch: int = 8
    subject_lr: float = 2e-2
    subject_norm_lr: float = 3e-3
    lora_rank: int = 4  # the same by a LoRA, for comparison
    lora_lr: float = 1e-3
    prior: tuple[int, int] = (16, 2)  # pictures of the subject's class; of each other digit
    judged: int = 24  # samples of the subject, and of its class
    judged_classes: int = 6  # samples of each of the ten digits
    together: int = 6  # noises for both adapters at once

    # sampling
    steps: int = 16
    guidance: float = 2.0

    # timing
    seconds: float = 1.2  # for each comparison

    @classmethod
    def quick(cls) -> Settings:
        """Everything once, nothing well: for tests of the machinery."""
        return cls(
            slider_steps=3,
            strengths=(-1.0, 0.0, 1.0),
            noises=1,
            subject_steps=3,
            prior=(2, 1),
            judged=4,
            judged_classes=1,
            together=1,
            steps=3,
            seconds=0.02,
        )
