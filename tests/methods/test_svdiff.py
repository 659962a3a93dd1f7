"""SVDiff on a model small enough to know everything about."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

import fastlora
from fastlora.adapters import adapted_layers
from fastlora.methods import personalise
from tests.training.toys import SCHEDULE, Toy


class Normed(Toy):
    """The toy with a norm in it and a layer that makes its condition, as a text encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.encoder = nn.LayerNorm(6), nn.Linear(4, 4)
        nn.init.eye_(self.encoder.weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x), t, cond)


SUBJECT = torch.tensor([[2.0, -2.0, 1.0, -1.0, 2.0, 0.0]]).repeat(5, 1)
NAME, CLASS = torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0, 0.0]])


def prior() -> torch.Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(2))


def learn(model: nn.Module, steps: int = 200, with_prior: bool = True, **options):
    options = {"lr": 3e-2, "norm_lr": 3e-3, "batch": 8, "prediction": "x0", **options}
    if with_prior:
        options = {"prior_images": prior(), "prior_cond": CLASS, **options}
    cond = options.pop("cond", NAME)
    return personalise(model, SUBJECT, cond, SCHEDULE, steps=steps, progress=False, **options)


def test_loss_falls() -> None:
    losses = learn(Normed()).metrics["subject"]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_prior_preservation_holds_on_to_the_class() -> None:
    """Pictures of the class that the model itself made: with them it goes on making them."""
    t = torch.full((16,), 50)
    cond = CLASS.expand(16, -1)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
    drift = {}
    for with_prior in (True, False):
        model = Normed()
        with torch.no_grad():
            own = model(x, t, cond)
        options = {"prior_images": own, "prior_cond": CLASS} if with_prior else {}
        learn(model, with_prior=False, **options)
        with torch.no_grad():
            drift[with_prior] = (model(x, t, cond) - own).square().mean().item()
    assert drift[True] < 0.3 * drift[False]


def test_only_shifts_are_trained_and_the_base_keeps_its_bits() -> None:
    model, before = Normed(), {k: v.clone() for k, v in Normed().state_dict().items()}
    model.load_state_dict(before)
    learn(model, steps=5)
    info = fastlora.adapters(model)["subject"]
    assert info.kind == "spectral"
    # min(out, in) a matrix, one an element of the norm: first, cond, last, norm, encoder
    assert info.parameters == 6 + 4 + 6 + 6 + 4
    fastlora.remove(model, "subject")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_norms_have_a_rate_of_their_own() -> None:
    model = Normed()
    learn(model, steps=20, norm_lr=0.0)
    shifts = {p: dict(m.fastlora["subject"].named_parameters())["shift"] for p, m in adapted(model)}
    assert shifts.pop("norm").abs().max() == 0
    assert shifts.pop("encoder").abs().max() == 0  # it was not called
    assert all(shift.abs().max() > 1e-3 for shift in shifts.values())


def test_a_function_as_condition_trains_the_encoder_too() -> None:
    model, drawn = Normed(), []

    def cond(indices: torch.Tensor) -> torch.Tensor:
        drawn.append(indices)
        return model.encoder(NAME.expand(len(indices), -1))

    learn(model, steps=3, batch=7, cond=cond)
    assert [(d.dtype, len(d)) for d in drawn] == [(torch.int64, 7)] * 3
    assert all(0 <= d.min() and d.max() < 5 for d in drawn)
    encoder = dict(adapted(model))["encoder"]
    assert dict(encoder.fastlora["subject"].named_parameters())["shift"].abs().max() > 0


def test_conditions_of_each_prior_picture() -> None:
    seen = []
    model = Toy()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[2][8:]))
    conds = torch.arange(16.0)[:, None].expand(16, 4)
    learn(model, steps=4, prior_cond=conds)
    used = torch.cat(seen)[:, 0]
    assert set(used.tolist()) <= set(range(16)) and len(set(used.tolist())) > 8


def test_a_lora_can_take_the_place_of_the_shifts() -> None:
    model = Toy()
    losses = learn(model, adapter=fastlora.LoRA(rank=2)).metrics["subject"]
    assert fastlora.adapters(model)["subject"].kind == "lora"
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def given(**change):
    """Good arguments of `personalise`, and a bad one."""
    arguments = {"images": SUBJECT, "cond": NAME, "schedule": SCHEDULE, "prediction": "x0"}
    arguments |= {"prior_images": prior(), "prior_cond": CLASS, "steps": 1, "progress": False}
    return {**arguments, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": SUBJECT[:0]}, "personalise: images: expected at least one"),
        ({"images": SUBJECT.byte()}, "personalise: images: expected torch.float32, in the range"),
        ({"images": SUBJECT.double()}, "personalise: images: expected torch.float32, in the range"),
        ({"images": SUBJECT.log()}, "personalise: images: expected finite values"),
        ({"images": "five"}, "personalise: images: expected at least one"),
        ({"cond": NAME.expand(7, 4)}, "personalise: cond: expected conditions [1, ...] for all"),
        ({"cond": NAME.expand(2, 4)}, "[5, ...] one for each, got float32 [2, 4]"),
        ({"cond": "a three"}, "personalise: cond: expected conditions"),
        ({"prior_images": prior()[:0]}, "personalise: prior_images: expected at least one"),
        (
            {"prior_images": prior()[:, :5]},
            "expected the size of images [6], got [5]",
        ),
        ({"prior_images": prior().half()}, "personalise: prior_images: expected torch.float32"),
        ({"prior_cond": CLASS.expand(3, 4)}, "personalise: prior_cond: expected conditions"),
        ({"prior_weight": -1}, "personalise: prior_weight: expected a finite number >= 0, got -1"),
        ({"prior_weight": math.nan}, "personalise: prior_weight: expected a finite number"),
        ({"prior_images": None, "prior_cond": None, "prior_weight": -1}, "prior_weight: expected"),
        ({"batch": 0}, "personalise: batch: expected an int from 1 to 2^63 - 1, got 0"),
        ({"batch": -1}, "personalise: batch: expected an int"),
        ({"batch": 1.5}, "personalise: batch: expected an int"),
        ({"prediction": "noise"}, "prediction: expected"),
        ({"lr": -1e-3}, "train_shifts: lr: expected a finite number >= 0, got -0.001"),
        ({"lr": math.nan}, "train_shifts: lr: expected a finite number >= 0, got nan"),
        ({"norm_lr": -1e-6}, "train_shifts: norm_lr: expected a finite number >= 0"),
        ({"norm_lr": math.inf}, "train_shifts: norm_lr: expected a finite number >= 0"),
        ({"steps": 1.5}, "train_shifts: steps: expected an int"),
        ({"seed": 2**70}, "train_shifts: seed: expected an int from 0 to 2^63 - 1"),
        ({"checkpoint_every": 0}, "train_shifts: checkpoint_every: expected an int"),
        ({"materialize": "later"}, "materialize: expected 'forward', 'step' or None, got 'later'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_leave_the_model_as_it_was(change, message) -> None:
    model = Normed()
    with pytest.raises(ValueError, match=re.escape(message)):
        personalise(model, **given(**change))
    assert fastlora.adapters(model) == {} and all(p.requires_grad for p in model.parameters())


def test_a_checkpoint_without_a_place_leaves_the_model_as_it_was(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    model = Normed()
    with pytest.raises(OSError, match="expected a writable directory"):
        personalise(model, **given(checkpoint=tmp_path / "file" / "checkpoint"))
    assert fastlora.adapters(model) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_pictures_in_the_models_dtype(dtype) -> None:
    model = Toy().to(dtype)
    change = {k: v.to(dtype) for k, v in given().items() if isinstance(v, torch.Tensor)}
    assert personalise(model, **given(**change)).steps == 1
    with pytest.raises(ValueError, match=f"expected .*{dtype}, in the range"):
        personalise(Toy().to(dtype), **given(images=SUBJECT.half()))


def test_a_prior_of_weight_0_is_never_drawn() -> None:
    def cond(drawn: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a condition of the prior")

    model, plain = Toy(), Toy()
    metrics = personalise(model, **given(prior_cond=cond, prior_weight=0.0)).metrics
    assert "prior" not in metrics
    personalise(plain, **given(prior_images=None, prior_cond=None))
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


@pytest.mark.parametrize("half", ["prior_images", "prior_cond"])
def test_half_a_prior_is_refused_and_nothing_is_added(half: str) -> None:
    model = Toy()
    given = {"prior_images": prior(), "prior_cond": CLASS}
    with pytest.raises(ValueError, match="expected both or neither"):
        learn(model, steps=1, with_prior=False, **{half: given[half]})
    assert fastlora.adapters(model) == {}


def adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(adapted_layers(model).items())
