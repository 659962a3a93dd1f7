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


@pytest.mark.parametrize(
    "start", [{"a": 500}, {"a": torch.tensor(700), "b": 250}, {"a": 0}, {"b": 5000}, {}]
)
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
        monkeypatch.setattr(module, "worth_folding", lambda m, calls, seen, w=worth: w)
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
        ({"a": True}, refused, "start of 'a'"),
        ({"a": None}, refused, "start of 'a'"),
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


def test_the_cost_model_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: folding pays from the number of calls on in which the adapters cost as much."""
    module = sys.modules["fastlora.adapters.phases"]
    model, _ = network()
    layers = [model.inner[0], model.inner[2]]
    size = sum(2 * m.weight.nbytes for m in layers)
    size += 2 * sum(4 * 2 * (m.in_features + m.out_features) for m in layers)  # two adapters, r=2
    asked: list[tuple[int, ...]] = []

    def extra(like: Tensor, *numbers: int) -> float:
        asked.append(numbers)
        return 1e-3

    monkeypatch.setattr(module, "extra_seconds", extra)
    monkeypatch.setattr(module, "fold_seconds", lambda like, n: 7e-3 if n == size else 1e9)
    seen = {layers[0]: 96, layers[1]: 96}
    worth = [module.worth_folding(model, calls, seen) for calls in range(1, 7)]
    assert worth == [False, False, False, True, True, True]  # 2 layers x 1 ms x calls > 7 ms
    assert asked[:2] == [(96, 6, 32, 4), (96, 32, 6, 4)]
    assert module.worth_folding(model, 1, {})  # nobody knows yet
    fastlora.set_scale(model, {"a": 0.0, "b": 0.0})
    assert not module.worth_folding(model, 1000, seen)


def test_calls_are_seen_in_their_size() -> None:
    model, x = network()
    fastlora.fold(model)
    counts: list[dict[nn.Module, int]] = []
    module = sys.modules["fastlora.adapters.phases"]
    real = module.worth_folding
    module.worth_folding = lambda m, calls, seen: counts.append(dict(seen)) or real(m, calls, seen)
    try:
        sample(model, TABLE, x, progress=False, start={"a": 500})
    finally:
        module.worth_folding = real
    assert counts == [{}, {model.inner[0]: 3, model.inner[2]: 3}]
    assert not any(m._forward_hooks for m in model.modules())


def test_predictions_of_real_sizes() -> None:
    """FLUX's largest layer on the CPU: its fold takes less than what an adapter adds to a call of
    4608 tokens, and more than to one of 2."""
    from fastlora.ops._routes import extra_seconds, fold_seconds

    weight = torch.empty(1).expand(12288, 3072)
    size = 2 * 4 * 12288 * 3072
    assert extra_seconds(weight, 2, 3072, 12288, 64) < fold_seconds(weight, size)
    assert fold_seconds(weight, size) < extra_seconds(weight, 4608, 3072, 12288, 64)
