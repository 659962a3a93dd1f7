"""`steady`: DoRA's products with W and D are made once, and what must be followed is followed."""

import copy
import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastlora
from tests.adapters.oracles import adapted_weight, randomise, with_weight

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def adapted(rank: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    fastlora.inject(layer, fastlora.LoRA(rank=rank, dora=True), name="a")
    randomise(layer)
    return layer


def check(layer: nn.Linear, scale: float = 1.0) -> None:
    """Against `m (W + s U D) / ‖W + s U D‖` in float64, from what the parameters are now."""
    plain = nn.Linear(6, 5)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    name = next(iter(layer.fastlora))
    exact = with_weight(plain, adapted_weight(plain, [(layer.fastlora[name], scale)]), X)
    with torch.no_grad():
        torch.testing.assert_close(layer(X).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """An entry for each time that the products were made: only they square a grouped weight."""
    squares: list[int] = []
    square = Tensor.square

    def counted(self: Tensor) -> Tensor:
        if self.dim() == 3:
            squares.append(self.dim())
        return square(self)

    monkeypatch.setattr(Tensor, "square", counted)
    yield squares


def test_made_once_in_a_block_and_anew_after_it(made: list[int]) -> None:
    layer = adapted()
    with fastlora.steady(layer), torch.no_grad():
        for _ in range(3):
            layer(X)
        with fastlora.steady(layer):
            layer(X)
        layer(X)
    assert len(made) == 1
    layer.weight.data.mul_(2)
    check(layer)


def test_the_device_s_cache_is_not_asked_in_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted()
    monkeypatch.setattr(type(layer), "cached", lambda *_: pytest.fail("compares values"))
    with fastlora.steady(layer):
        check(layer)


def test_strengths_and_adapters_are_followed_in_a_block() -> None:
    layer = adapted()
    with fastlora.steady(layer):
        check(layer)
        fastlora.set_scale(layer, {"a": -0.5})
        check(layer, -0.5)
        state = {k: torch.randn(v.shape) for k, v in layer.state_dict().items()}
        layer.load_state_dict(state)
        check(layer, -0.5)
        fastlora.remove(layer, "a")
        fastlora.inject(layer, fastlora.LoRA(rank=2, dora=True), name="b")
        randomise(layer)
        check(layer)
        layer.double()
        with torch.no_grad():
            assert layer(X.double()).dtype == torch.float64
        layer.float()
        check(layer)


def test_the_weight_that_spectral_shifts_have_changed_is_not_the_kept_one() -> None:
    layer = adapted()
    fastlora.inject(layer, fastlora.Spectral(), name="s")
    randomise(layer)
    expected = copy.deepcopy(layer)
    with fastlora.steady(layer), torch.no_grad():
        fastlora.disable(layer, "s")
        layer(X)
        fastlora.enable(layer, "s")
        assert torch.equal(layer(X), expected(X))


def test_what_a_capture_made_and_what_is_from_outside_stay_apart(
    made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = adapted()
    capturing = False
    for module in ("dora", "adapted", "state", "steady"):
        module = importlib.import_module(f"fastlora.adapters.{module}")
        monkeypatch.setattr(module, "is_capturing", lambda: capturing)
    with torch.no_grad(), fastlora.steady(layer):
        layer(X)
        capturing = True
        layer(X)  # nothing from outside
        assert len(made) == 2
        with fastlora.steady(layer):
            layer(X)
            layer(X)
        assert len(made) == 3
        capturing = False
        layer(X)
    assert len(made) == 3
    assert layer._state.kept == ({}, {})


def test_an_error_and_a_copy_leave_nothing_behind() -> None:
    layer = adapted()
    with pytest.raises(KeyError), fastlora.steady(layer):
        check(layer)
        other = copy.deepcopy(layer)
        raise KeyError
    for one in (layer, other):
        one.weight.data.mul_(2)
        check(one)


def test_sampling_is_steady(made: list[int]) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = adapted()

        def forward(self, x: Tensor, t: Tensor, cond: object) -> Tensor:
            y = self.layer(x)
            return torch.cat((y, y[:, :1]), 1)

    model = Network()
    table = fastlora.ddim(fastlora.Schedule.cosine(), 6)
    fastlora.sample(model, table, X, progress=False)
    assert len(made) == 1
