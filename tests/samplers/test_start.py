"""Adapters that start at a step of a sampling."""

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import Schedule, ddim, sample, sample_steps
from fastlora.adapters import phases as phases_function
from fastlora.adapters.folding import is_folded
from fastlora.samplers import noise
from tests.adapters.oracles import randomise

TABLE = ddim(Schedule.cosine(), 10)  # timesteps 900, 800, ..., 0


class Network(nn.Module):
    """Remembers what was on at which timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 6))
        self.seen: dict[int, tuple[bool, ...]] = {}

    def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
        on = fastlora.adapters(self)
        self.seen[int(t[0])] = tuple(on[n].enabled for n in sorted(on)) + (is_folded(self),)
        return self.inner(x + 0.001 * t[:, None])


def network() -> tuple[Network, Tensor]:
    torch.manual_seed(0)
    model = Network().eval()
    for name in "ab":
        fastlora.inject(model, fastlora.LoRA(2), name=name, seed=0)
    randomise(model, size=0.3)
    fastlora.set_scale(model, {"a": 0.5, "b": -1.0})
    return model, noise([1, 2, 3], (6,))


def by_hand(model: Network, x: Tensor, start: dict[str, int]) -> Tensor:
    """The same with a strength of zero as long as the timestep is above the start."""
    model = copy.deepcopy(model)
    scales = {name: info.scale for name, info in fastlora.adapters(model).items()}

    def gated(x: Tensor, t: Tensor, cond: object) -> Tensor:
        off = {name: 0.0 for name, first in start.items() if t[0] > first}
        fastlora.set_scale(model, {**scales, **off})
        return model(x, t, cond)

    return sample(gated, TABLE, x, progress=False)


@pytest.mark.parametrize("start", [{"a": 500}, {"a": 700, "b": 250}, {"a": 0}, {"b": 5000}, {}])
def test_off_above_the_start(start: dict[str, int]) -> None:
    model, x = network()
    images = sample(model, TABLE, x, progress=False, start=start)
    torch.testing.assert_close(images, by_hand(model, x, start), rtol=1e-4, atol=1e-5)
    for timestep, (a, b, folded) in model.seen.items():
        assert (a, b) == (timestep <= start.get("a", 1000), timestep <= start.get("b", 1000))
        assert not folded
    after = fastlora.adapters(model)
    assert [(i.scale, i.enabled) for i in after.values()] == [(0.5, True), (-1.0, True)]
    if 0 < len(start) and max(start.values()) < 900:
        assert not torch.allclose(images, sample(model, TABLE, x, progress=False))


def test_steps_leave_the_model_as_it_was_between_them() -> None:
    model, x = network()
    for step in sample_steps(model, TABLE, x, start={"a": 500}):
        images = step.x
        assert fastlora.adapters(model)["a"].enabled
    assert {t: on[0] for t, on in model.seen.items()} == {t: t <= 500 for t in model.seen}
    torch.testing.assert_close(images, by_hand(model, x, {"a": 500}), rtol=1e-4, atol=1e-5)


def test_one_that_was_off_stays_off_and_strengths_per_sample_work() -> None:
    model, x = network()
    fastlora.disable(model, "b")
    fastlora.set_scale(model, {"a": torch.tensor([0.0, 0.5, 1.0])})
    images = sample(model, TABLE, x, progress=False, start={"a": 500, "b": 500})
    assert not any(on[1] for on in model.seen.values())
    assert not fastlora.adapters(model)["b"].enabled
    for i, scale in enumerate((0.0, 0.5, 1.0)):
        fastlora.set_scale(model, {"a": scale})
        alone = sample(model, TABLE, x[i : i + 1], progress=False, start={"a": 500})
        torch.testing.assert_close(images[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [{"a": 500}, {"a": 700, "b": 250}, {"a": 500, "b": 500}, {}])
def test_a_folded_model_is_folded_between_steps(
    start: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network()
    expected = by_hand(model, x, start)
    fastlora.fold(model)
    folded = [m.fastlora.folded_weight.clone() for m in (model.inner[0], model.inner[2])]
    module = sys.modules["fastlora.adapters.phases"]
    folds: list[int] = []
    monkeypatch.setattr(module, "fold", lambda m, f=module.fold: folds.append(1) or f(m))
    for worth in (True, False):
        monkeypatch.setattr(module, "worth_folding", lambda m, calls, w=worth: w)
        folds.clear(), model.seen.clear()
        images = sample(model, TABLE, x, progress=False, start=start)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
        runs = len({on[:2] for on in model.seen.values()})
        # the last run has the strengths of before and stays folded; else it is folded at the end
        assert len(folds) == (0 if not start else runs if worth else 1)
        assert is_folded(model)
        for layer, weight in zip((model.inner[0], model.inner[2]), folded, strict=True):
            assert torch.equal(layer.fastlora.folded_weight, weight)


def test_what_does_not_fit_is_refused_at_once() -> None:
    model, x = network()
    refused = fastlora.AdapterError
    for start, error, message in (
        ({"c": 500}, refused, "no adapter named 'c'"),
        ({"a": "500"}, refused, "start of 'a': expected a timestep, got '500'"),
        ({"a": float("nan")}, refused, "start of 'a'"),
        ([500], refused, "start: expected timesteps by adapter name"),
    ):
        for run in (sample, sample_steps):
            with pytest.raises(error, match=message):
                run(model, TABLE, x, start=start)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="start: expected a module with adapters"):
        sample(lambda x, t, cond: x, TABLE, x, start={"a": 500})
    assert model.seen == {}


def test_an_exception_puts_everything_back() -> None:
    for folded in (False, True):
        model, x = network()
        if folded:
            fastlora.fold(model)
        with pytest.raises(ZeroDivisionError), phases_function(model, {"a": 10}, []) as switch:
            switch(500)
            assert not fastlora.adapters(model)["a"].enabled
            raise ZeroDivisionError
        assert fastlora.adapters(model)["a"].enabled and is_folded(model) == folded
