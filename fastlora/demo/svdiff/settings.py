"""What `fastlora demo svdiff` does and how much of it."""

from __future__ import annotations

from dataclasses import dataclass

from fastlora.demo.settings import Settings


@dataclass(frozen=True)
class ShiftSettings:
    """The defaults take about three minutes on two idle cores. Rates were chosen on this model,
    each method's for itself: the paper's 1e-3 is for a model 450 times as large and 500 steps."""

    seeds: int = 3  # each with five other pictures, other class pictures and other noise
    prior: tuple[int, int] = (10, 1)  # pictures of the subject's class; of each other digit
    weights: tuple[float, ...] = (0.0, 1.0)  # of the prior
    steps: int = 40
    batch: int = 4  # of the subject, and as many of the prior
    rates: tuple[tuple[str, float], ...] = (("SVDiff", 2e-2), ("LoRA", 2e-3), ("all", 3e-4))
    norm_rate: float = 3e-3
    rank: int = 4
    judged: int = 8  # samples of the subject, and of its class
    judged_classes: int = 1  # samples of each of the ten digits

    # two subjects on one canvas, twice as wide as the model's own pictures
    pair: tuple[int, int] = (3, 7)
    pair_prior: int = 8  # class pictures of each
    pair_steps: int = 150
    pair_batch: int = 4
    pair_rate: float = 4e-2
    pair_judged: int = 8  # samples of each of two captions
    unmix_weight: float = 0.1

    # one picture, edited
    edits: int = 3
    edit_steps: int = 40
    edit_batch: int = 4  # noises of the one picture
    edit_rate: float = 1e-2
    edit_sampling: int = 15  # steps of the inversion, and of the way back

    sampling: int = 10
    guidance: float = 2.0

    @property
    def world(self) -> Settings:
        """What the demo's other parts need to know of it."""
        return Settings(
            prior=self.prior,
            judged=self.judged,
            judged_classes=self.judged_classes,
            steps=self.sampling,
            guidance=self.guidance,
        )

    @classmethod
    def quick(cls) -> ShiftSettings:
        """Everything once, nothing well: for tests of the machinery."""
        return cls(
            seeds=1,
            prior=(2, 1),
            steps=2,
            batch=1,
            judged=2,
            pair_prior=2,
            pair_steps=2,
            pair_batch=2,
            pair_judged=1,
            edits=1,
            edit_steps=2,
            edit_batch=1,
            edit_sampling=2,
            sampling=2,
        )
