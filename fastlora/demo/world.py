"""What all parts of the demo share: the model, its judge, its sampler, a device and a voice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from fastlora.demo.settings import Settings
from fastlora.models import digits
from fastlora.models.digits import DigitsModel
from fastlora.models.judge import Judge
from fastlora.models.judge import load as load_judge
from fastlora.samplers import Schedule, Table, ddim, noise, sample_steps

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass
class World:
    """A run's model and habits; `say` prints a line above the progress bars."""

    settings: Settings
    seed: int
    device: torch.device
    load_model: Callable[[], DigitsModel]  # a fresh one, all parameters frozen
    judge: Judge
    progress: bool = True
    seconds: dict[str, float] = field(default_factory=dict)  # by part
    schedule: Schedule = field(default_factory=lambda: Schedule.cosine(1000))

    @classmethod
    def make(cls, settings: Settings, seed: int, progress: bool = True) -> World:
        device = choose_device()
        return cls(
            settings,
            seed,
            device,
            lambda: digits.load(device=device),
            load_judge(device=device),
            progress,
        )

    @property
    def table(self) -> Table:
        return ddim(
            self.schedule, self.settings.steps, prediction="v", spacing="trailing", clip=None
        )

    def sample(
        self,
        model: DigitsModel,
        captions: Sequence[str],
        seeds: Sequence[int],
        description: str = "sampling",
    ) -> torch.Tensor:
        """Pictures [N, 1, 32, 32], one for each caption and seed, on the CPU."""
        with torch.no_grad():
            cond, uncond = model.encode(list(captions)), model.encode([""] * len(captions))
        x = noise(list(seeds), model.shape, self.device)
        table = self.table
        bar = self.bar(len(table), description, "step")
        with bar:
            for step in sample_steps(model, table, x, cond, uncond, self.settings.guidance):
                x = step.x
                bar.update()
        return x.cpu()

    def seeds(self, stream: int, count: int) -> list[int]:
        """Seeds of the noise of `count` samples; another stream has others."""
        first = self.seed * 1_000_003 + stream * 10_007
        return [(first + i) % 2**62 for i in range(count)]

    def clock(self) -> float:
        """Seconds, after everything that was asked of the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def score(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: v.cpu() for name, v in self.judge.score(images.to(self.device)).items()}

    def bar(self, total: int, description: str, unit: str = "it") -> tqdm:
        return tqdm(
            total=total, desc=f"  {description}", unit=unit, disable=not self.progress, leave=False
        )

    def say(self, text: str = "") -> None:
        if self.progress:
            tqdm.write(text)

    @contextmanager
    def part(self, title: str) -> Iterator[None]:
        """Announces a part of the demo and notes how long it took."""
        self.say(f"\n{len(self.seconds) + 1}  {title}")
        start = self.clock()
        yield
        self.seconds[title] = self.clock() - start


@contextmanager
def fastest_threads(world: World) -> Iterator[None]:
    """One thread for the block where all of them are slower: on a machine whose cores are busy with
    other things, the small layers of this model wait for each other most of the time.
    """
    threads = torch.get_num_threads()
    try:
        if world.device.type == "cpu" and threads > 1:
            model = world.load_model()
            x, t = torch.zeros(16, *model.shape), torch.zeros(16, dtype=torch.long)
            cond = model.encode([""] * 16)

            def seconds() -> float:
                start = time.perf_counter()
                model(x, t, cond)
                return time.perf_counter() - start

            with torch.no_grad():
                torch.set_num_threads(1)
                alone = min(seconds() for _ in range(3))
                torch.set_num_threads(threads)
                together = min(seconds() for _ in range(3))
            if alone < together:
                torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def choose_device() -> torch.device:
    """The GPU, if there is one that fastlora was built for."""
    from fastlora.ops._define import kernels

    usable = torch.cuda.is_available() and bool(kernels.build_info()["cuda"])
    return torch.device("cuda" if usable else "cpu")
