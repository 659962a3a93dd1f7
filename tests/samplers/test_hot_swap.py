"""A captured sampling follows files that come and go in a reserve, without another capture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import Sampler, Schedule, ddim, sample
from fastlora.samplers import noise

SEEDS = [1, 2, 3]
COND = torch.linspace(-1, 1, 18).view(3, 6)
TABLE = ddim(Schedule.cosine(), 5)
# Of each file: rank and alpha by layer.
FILES = {
    "one": {"inner.0": (2, 1.0), "inner.2": (2, 4.0)},
    "same": {"inner.0": (2, 6.0), "inner.2": (2, 0.5)},
    "other": {"inner.1": (5, 2.5), "inner.2": (3, 3.0)},
}
Layers = Mapping[str, tuple[Tensor, Tensor, float]]  # D, U and α/r


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 6))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.inner(x + cond + 0.001 * t[:, None]).tanh()


def write(model: nn.Module, folder: Path) -> dict[str, Layers]:
    """The files, as fastlora saves them, and what is in them."""
    found: dict[str, Layers] = {}
    for name, layers in FILES.items():
        donor = copy.deepcopy(model)
        ranks, alphas = ({p: pair[i] for p, pair in layers.items()} for i in (0, 1))
        spec = fastlora.LoRA(ranks=ranks, alphas=alphas)  # type: ignore[arg-type]
        fastlora.inject(donor, spec, list(layers), name)
        own = {}
        for path, (rank, alpha) in layers.items():
            slot = donor.get_submodule(path).fastlora[name]  # type: ignore[index]
            nn.init.normal_(slot.up, std=0.3)
            own[path] = (slot.down.detach(), slot.up.detach(), alpha / rank)
        fastlora.save(donor, folder / f"{name}.safetensors", name)
        found[name] = own
    return found


def merged(model: nn.Module, *parts: tuple[Layers, float]) -> Tensor:
    """Samples of the model with `W + s α/r U D`, in float64."""
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        for layers, strength in parts:
            for path, (down, up, ratio) in layers.items():
                double.get_submodule(path).weight += strength * ratio * (up @ down).double()
    x = noise(SEEDS, (6,)).double()
    return sample(double, TABLE, x, COND.double(), seeds=SEEDS, progress=False)


@pytest.mark.parametrize("per_step", [False, True], ids=["loop", "step"])
@pytest.mark.parametrize("before", [[], ["same"]], ids=["empty", "with_an_adapter"])
def test_files_come_and_go(
    recorded: None, tmp_path: Path, per_step: bool, before: list[str]
) -> None:
    plain = Network().eval()
    files = write(plain, tmp_path)
    model = copy.deepcopy(plain)
    fastlora.reserve(model, 10)

    def load(name: str, scale: float = 1.0) -> None:
        fastlora.load(model, tmp_path / f"{name}.safetensors", name, scale)

    for name in before:
        load(name)
    sampler = Sampler(model, TABLE, (3, 6), COND).capture(per_step)

    def check(*parts: tuple[Layers, float]) -> None:
        # Coordinates of the sampling are float32, as are weights.
        close = torch.testing.assert_close
        close(sampler(seeds=SEEDS).double(), merged(plain, *parts), rtol=1e-4, atol=1e-4)

    check(*((files[name], 1.0) for name in before))
    for name in before:
        fastlora.remove(model, name)
    load("one", 0.5)
    check((files["one"], 0.5))
    load("other", -1.0)
    check((files["one"], 0.5), (files["other"], -1.0))
    ready = {name: fastlora.prepare(model, tmp_path / f"{name}.safetensors") for name in FILES}
    for name in ("same", "one", "other", "same"):
        fastlora.swap(model, "one", ready[name])
        check((files[name], 0.5), (files["other"], -1.0))
    for name in ("one", "other"):
        fastlora.remove(model, name)
    check()
    assert sampler.captures == 1
