"""The loop: it minimises, resumes bit for bit, and loses nothing to bad input."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastlora
from fastlora.training import (
    EMA,
    CheckpointError,
    adamw,
    epsilon_loss,
    load_checkpoint,
    save_checkpoint,
    train,
    v_loss,
)
from tests.training.toys import SCHEDULE, Toy, toy_batches


def run(model: nn.Module, steps: int = 30, **options):
    options = {"lr": 1e-2, "seed": 7, "progress": False, **options}
    return train(model, v_loss, toy_batches, SCHEDULE, steps=steps, **options)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_loss_falls() -> None:
    losses = run(Toy(), steps=300).metrics["loss"]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_run_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    models = [Toy(dropout=0.3) for _ in range(3)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for model, seed in zip(models, (7, 7, 8), strict=True):
        run(model, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        before = torch.get_rng_state()
    assert_same_bits(weights(models[0]), weights(models[1]))
    assert not torch.equal(models[0].first.weight, models[2].first.weight)


@pytest.mark.parametrize("stopped_at", [5, 20, 27])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, stopped_at: int
) -> None:
    options = {"steps": 40, "ema_decay": 0.9, "warmup": 10, "decay": lambda done: 1 - done}
    options["checkpoint_every"] = 5
    whole, part, resumed = (Toy(dropout=0.2) for _ in range(3))
    expected = run(whole, **options)

    calls = 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls > stopped_at:
            raise KeyboardInterrupt
        return v_loss(*args)

    options["checkpoint"] = tmp_path / "run" / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train(part, interrupted, toy_batches, SCHEDULE, lr=1e-2, seed=7, progress=False, **options)
    assert os.listdir(tmp_path / "run") == ["state.pt"]
    got = run(resumed, **options)
    assert_same_bits(weights(whole), weights(resumed))
    assert got.metrics == expected.metrics
    assert got.ema is not None and expected.ema is not None
    assert_same_bits(got.ema.shadow, expected.ema.shadow)


def test_only_the_given_parameters_move() -> None:
    model = Toy()
    before = weights(model)
    fastlora.inject(model, fastlora.LoRA(rank=2), where=["first"], name="a", seed=0)
    result = run(model, parameters=fastlora.parameters(model, "a"), steps=20)
    assert result.steps == 20
    fastlora.remove(model, "a")
    assert_same_bits(before, weights(model))


def test_warmup_decay_and_optimizer_give_the_learning_rate_of_each_step() -> None:
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])

    run(Toy(), steps=4, warmup=2, decay=lambda d: 1 - d, optimizer=lambda p: Recorder(p, lr=8.0))
    assert seen == [4.0, 6.0, 4.0, 2.0]


def test_gradients_are_clipped_and_their_norm_reported() -> None:
    model = Toy()
    before = weights(model)
    norm = run(model, steps=1, clip=1e-3, optimizer=lambda p: torch.optim.SGD(p, lr=1.0)).metrics
    moved = sum((model.state_dict()[n] - before[n]).square().sum() for n in before) ** 0.5
    assert norm["grad_norm"][0] > 1e-2
    assert moved == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_training_mode_is_put_back(mode: bool) -> None:
    model = Toy().train(mode)
    seen = []

    def loss(model, *args):
        seen.append(model.training)
        return epsilon_loss(model, *args)

    train(model, loss, toy_batches, SCHEDULE, steps=1, progress=False)
    assert seen == [True] and model.training is mode


def test_ema_ramps_up_and_swaps_without_a_trace() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = EMA({"p": p}, decay=0.5)
    expected = torch.tensor([1.0, 2.0])
    for n in range(1, 7):
        with torch.no_grad():
            p += 1
        ema.update()
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * p.detach()
    torch.testing.assert_close(ema.shadow["p"], expected)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), ema.swapped():
        assert torch.equal(p, ema.shadow["p"])
        raise RuntimeError("inside")
    assert torch.equal(p, before)


def test_ema_of_half_precision_is_kept_in_float32() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = EMA({"p": p}, decay=0.999)
    assert ema.shadow["p"].dtype == torch.float32
    ema.copy_to_parameters()
    assert p.dtype == torch.bfloat16 and torch.equal(p, torch.ones(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_ema_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="0 <= decay < 1"):
        EMA({}, decay)


def test_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path: Path) -> None:
    model = Toy()
    path = tmp_path / "state.pt"
    run(model, steps=5, checkpoint=path)
    before, saved = weights(model), path.read_bytes()

    def poisoned(generator):
        return {"x0": torch.full((4, 6), float("nan")), "cond": torch.zeros(4, 4)}

    with pytest.raises(FloatingPointError, match="got nan at step 6"):
        train(model, v_loss, poisoned, SCHEDULE, steps=9, checkpoint=path, lr=1e-2, progress=False)
    assert_same_bits(before, weights(model))
    assert path.read_bytes() == saved


def test_directory_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    def never(*args):
        raise AssertionError("a step was made")

    with pytest.raises(OSError, match="output directory .*file/sub: expected a writable directory"):
        train(
            Toy(),
            never,
            toy_batches,
            SCHEDULE,
            steps=1,
            checkpoint=tmp_path / "file" / "sub" / "state.pt",
        )


class Runs:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("kind", ["truncated", "text", "pickle", "other tensors", "empty"])
def test_foreign_checkpoints_are_refused(tmp_path: Path, monkeypatch, kind: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "state.pt"
    model = Toy()
    run(model, steps=2, checkpoint=path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "pickle":
        torch.save({"format": "fastlora.training/1", "step": Runs()}, path)
    elif kind == "other tensors":
        torch.save({"weight": torch.ones(2)}, path)
    else:
        path.write_bytes(b"")
    content, before = path.read_bytes(), weights(model)
    with pytest.raises(CheckpointError, match=r"checkpoint .*state\.pt: expected"):
        run(model, steps=4, checkpoint=path)
    assert path.read_bytes() == content  # not overwritten
    assert_same_bits(before, weights(model))
    assert not (tmp_path / "executed").exists()


def test_checkpoint_of_other_parameters_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run(Toy(), steps=1, checkpoint=path)
    other = Toy()
    other.last = nn.Linear(8, 6, bias=False)
    with pytest.raises(CheckpointError, match=r"1 others: last\.bias \[6\] \(expected None\)"):
        run(other, steps=2, checkpoint=path)


def test_a_save_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_checkpoint(path, {"step": 1})
    with pytest.raises(Exception, match="pickle|Pickle|local"):
        save_checkpoint(path, {"step": lambda: 2})
    assert load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda m: [], "expected at least one"),
        (lambda m: [nn.Parameter(torch.ones(3))], r"parameters of the model, got 1 others"),
        (lambda m: [m.first.weight, m.first.weight], "expected each once, got 1 twice"),
        (lambda m: [m.first.weight.requires_grad_(False)], "frozen ones: first.weight"),
    ],
    ids=["none", "foreign", "twice", "frozen"],
)
def test_wrong_parameters_are_refused(choose, message: str) -> None:
    model = Toy()
    with pytest.raises(ValueError, match=message):
        run(model, parameters=choose(model))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *[("steps", v, "an int >= 0") for v in (-1, 2.5, None)],
        *[("warmup", v, "an int >= 0") for v in (-1, "a")],
        *[("checkpoint_every", v, "an int >= 1") for v in (0, 1.5)],
        *[("lr", v, "a finite number >= 0") for v in (-1e-3, NAN, INF, None, "a")],
        *[("clip", v, "a positive finite number or None") for v in (-1.0, 0.0, NAN, INF, "a")],
        *[("ema_decay", v, "a number from 0 to below 1 or None") for v in (-0.1, 1.0, NAN, "a")],
    ],
)
def test_wrong_numbers_are_refused_before_anything(
    tmp_path: Path, name: str, value: object, expected: str
) -> None:
    model, made = Toy(), tmp_path / "made"
    before = weights(model)
    with pytest.raises(ValueError, match=f"^train: {name}: expected {expected}, got {value!r}$"):
        run(model, **{"checkpoint": made / "state.pt", name: value})
    assert not made.exists()
    assert_same_bits(before, weights(model))


def test_numbers_of_numpy_are_numbers() -> None:
    models = Toy(), Toy()
    run(models[0], steps=3, clip=1.0, ema_decay=0.5, warmup=2)
    options = {"clip": np.float32(1), "ema_decay": np.float64(0.5), "warmup": np.int32(2)}
    run(models[1], steps=np.int64(3), **options)
    assert_same_bits(*map(weights, models))


def folded_toy() -> Toy:
    model = Toy()
    fastlora.inject(model, fastlora.LoRA(rank=2), where=["first"], name="a", seed=0)
    fastlora.fold(model)
    return model


@pytest.mark.parametrize("train_what", ["the adapter", "the base weight", "everything"])
def test_parameters_behind_a_folded_weight_are_refused(train_what: str) -> None:
    model = folded_toy()
    chosen = {
        "the adapter": fastlora.parameters(model, "a"),
        "the base weight": [model.first.weight.requires_grad_()],
        "everything": [p.requires_grad_() for p in model.parameters()],
    }[train_what]
    before = weights(model)
    with pytest.raises(fastlora.AdapterError, match=r"^train: parameters: .*first.*unfold\("):
        run(model, parameters=chosen)
    assert_same_bits(before, weights(model))
    fastlora.unfold(model)
    run(model, parameters=chosen, steps=5)
    after = model.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(chosen)


def test_other_layers_of_a_folded_model_train() -> None:
    model = folded_toy()
    before = weights(model)
    chosen = [p.requires_grad_() for p in (model.last.weight, model.first.bias)]
    run(model, parameters=chosen, steps=2)
    moved = {name for name, w in weights(model).items() if not torch.equal(w, before[name])}
    assert moved == {"last.weight", "first.bias"}


def test_the_default_optimizer_is_adamw_for_all_parameters_in_one_call() -> None:
    """Decoupled weight decay and bias-corrected moments (Loshchilov & Hutter 2019), by hand."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, generator=generator)) for _ in range(2)]
    groups = [{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.01}]
    optimizer = adamw(groups)
    assert all(group["fused"] and group["weight_decay"] == 1e-2 for group in optimizer.param_groups)
    for w, lr in zip(weights, (0.1, 0.01), strict=True):
        expected, m, v = w.detach().double(), 0.0, 0.0
        for step in (1, 2, 3):
            g = torch.full((3,), float(step), dtype=torch.float64)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            size = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            expected = expected * (1 - lr * 1e-2) - lr * size
            w.grad = g.float()
            optimizer.step()
            for other in weights:
                other.grad = None
        torch.testing.assert_close(w.detach(), expected.float())


def test_the_default_optimizer_takes_adapters_in_a_reserve() -> None:
    """Whose parameters are strided views."""
    model = nn.Sequential(nn.Linear(4, 6))
    fastlora.reserve(model, 4)
    fastlora.inject(model, fastlora.LoRA(rank=2), name="a", seed=0)
    up = model[0].fastlora["a"].up
    assert not up.is_contiguous()

    def loss(model: nn.Module, batch: Any, *_: Any) -> Any:
        value = model(batch["x0"]).square().mean()
        return value, {"loss": value.detach()}

    def batches(generator: torch.Generator) -> Any:
        return {"x0": torch.randn(3, 4, generator=generator)}

    train(model, loss, batches, fastlora.Schedule.cosine(10), steps=2, progress=False)
    assert up.abs().sum() > 0
