"""`Sampler`: the same samples as `sample`, from buffers that stay; captured loops follow what
changes between replays. CUDA graphs are stood in for by recorded operators (tests/gpu has real
ones)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import Sampler, Schedule, ddim, sample
from fastlora.samplers import noise
from tests.adapters.oracles import randomise

B, SHAPE = 3, (3, 6)
COND = torch.tensor([[1.0] * 6, [0.5] * 6, [-1.0] * 6])
UNCOND, OTHER = torch.zeros(B, 6), COND.flip(0) * 0.3
SEEDS = [1, 2, 3]
TABLES = {"ddim": ddim(Schedule.cosine(), 6), "noisy": ddim(Schedule.cosine(), 6, eta=1.0)}
captures = pytest.mark.parametrize("per_step", [None, False, True], ids=["eager", "loop", "step"])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 6))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.inner(x + cond + 0.001 * t[:, None])


def network(reserve: int = 0) -> Network:
    torch.manual_seed(0)
    model = Network().eval()
    if reserve:
        fastlora.reserve(model, reserve)
    for name in "ab":
        fastlora.inject(model, fastlora.LoRA(2), name=name, seed=0)
    randomise(model, size=0.3)
    fastlora.set_scale(model, {"a": 0.5, "b": -1.0})
    return model


def made(model: Any, per_step: bool | None, table: str = "ddim", **options: Any) -> Sampler:
    options = {"cond": COND, "uncond": UNCOND, "guidance_scale": 2.0} | options
    sampler = Sampler(model, TABLES[table], SHAPE, **options)
    return sampler if per_step is None else sampler.capture(per_step)


def plain(model: Any, table: str = "ddim", seeds: Any = SEEDS, **options: Any) -> Tensor:
    """`sample` with the same."""
    options = {"cond": COND, "uncond": UNCOND, "guidance_scale": 2.0} | options
    x = noise(seeds, SHAPE[1:])
    return sample(model, TABLES[table], x, seeds=seeds, progress=False, **options)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@captures
@pytest.mark.parametrize("table", TABLES)
def test_it_samples_as_sample_does(recorded: None, per_step: bool | None, table: str) -> None:
    model = network()
    sampler = made(model, per_step, table)
    for seeds in (SEEDS, [4, 5, 6], SEEDS):
        close(sampler(seeds=seeds), plain(model, table, seeds))
    x = torch.randn(SHAPE)
    expected = sample(model, TABLES[table], x, COND, UNCOND, 2.0, SEEDS, progress=False)
    close(sampler(x, seeds=SEEDS), expected)
    assert sampler.captures == (per_step is not None)


@captures
def test_prompts_and_guidance_change(recorded: None, per_step: bool | None) -> None:
    model = network()
    sampler = made(model, per_step)
    by_step = torch.linspace(1, 4, 6)[:, None]
    close(sampler(seeds=SEEDS, cond=OTHER), plain(model, cond=OTHER))
    close(sampler(seeds=SEEDS), plain(model, cond=OTHER))  # as it was before
    close(sampler(seeds=SEEDS, cond=COND, uncond=OTHER), plain(model, uncond=OTHER))
    for scale in (5.0, torch.tensor([1.0, 2.0, 3.0]), by_step, by_step * torch.ones(B)):
        close(
            sampler(seeds=SEEDS, uncond=UNCOND, guidance_scale=scale),
            plain(model, guidance_scale=scale),
        )
    assert sampler.captures == (per_step is not None)


@captures
def test_strengths_switches_and_starts_change(recorded: None, per_step: bool | None) -> None:
    model = network()
    sampler = made(model, per_step)
    for change in (
        lambda: None,
        lambda: fastlora.set_scale(model, {"a": -2.0}),
        lambda: fastlora.set_scale(model, {"a": 0.0, "b": 0.7}),
        lambda: fastlora.disable(model, "b"),
        lambda: fastlora.enable(model),
        lambda: fastlora.set_scale(model, {"a": 1.0}),
    ):
        change()
        for start in (None, {"a": 500}, {"a": 300, "b": 700}, {"b": -1}, {}):
            before = fastlora.adapters(model)
            close(sampler(seeds=SEEDS, start=start), plain(model, start=start))
            assert fastlora.adapters(model) == before
    assert sampler.captures == (per_step is not None)


def test_a_start_matters() -> None:
    """What the test above compares is not the same for every start."""
    model = network()
    results = [plain(model, start=start) for start in (None, {"a": 500}, {"b": -1})]
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(results, results[1:], strict=False))


@captures
def test_strengths_per_sample(recorded: None, per_step: bool | None) -> None:
    model = network()
    fastlora.set_scale(model, {"a": torch.tensor([1.0, 0.0, -1.0])})
    sampler = made(model, per_step)
    for scale in (torch.tensor([1.0, 0.0, -1.0]), torch.tensor([-0.5, 2.0, 1.0])):
        fastlora.set_scale(model, {"a": scale})
        for start in (None, {"a": 500}):
            close(sampler(seeds=SEEDS, start=start), plain(model, start=start))
    assert sampler.captures == (per_step is not None)
    fastlora.set_scale(model, {"a": 0.5})  # another shape of gates
    close(sampler(seeds=SEEDS), plain(model))


@pytest.mark.parametrize("per_step", [False, True], ids=["loop", "step"])
def test_adapters_come_and_go_in_a_reserve(recorded: None, per_step: bool) -> None:
    model, other = network(reserve=8), network()
    sampler = made(model, per_step)
    changes: list[Callable[[Any], Any]] = [
        lambda m: None,
        lambda m: fastlora.remove(m, "a"),
        lambda m: fastlora.inject(m, fastlora.LoRA(4), name="c", seed=1),
        lambda m: randomise(m, seed=5, size=0.3),
        lambda m: fastlora.set_scale(m, {"c": -0.5}),
    ]
    for change in changes:
        change(model), change(other)
        close(sampler(seeds=SEEDS), plain(other))
    assert sampler.captures == 1


CHANGES: dict[str, Callable[[Any], Any]] = {
    "inject": lambda m: fastlora.inject(m, fastlora.LoRA(3), name="c", seed=1),
    "remove": lambda m: fastlora.remove(m, "a"),
    "fold": lambda m: fastlora.fold(m),
    "other_memory": lambda m: setattr(m.inner[0].weight, "data", m.inner[0].weight.data * 2),
    "per_sample": lambda m: fastlora.set_scale(m, {"a": torch.tensor([1.0, 0.0, 2.0])}),
    "reserve": lambda m: fastlora.reserve(m, 16),
    "dtype": lambda m: m.double().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("per_step", [False, True], ids=["loop", "step"])
def test_what_a_graph_cannot_follow_captures_again(
    recorded: None, per_step: bool, change: Callable[[Any], Any]
) -> None:
    model = network()
    sampler = made(model, per_step)
    sampler(seeds=SEEDS)
    change(model)
    if change is CHANGES["inject"]:
        randomise(model, size=0.3, seed=4)
    close(sampler(seeds=SEEDS), plain(model))
    close(sampler(seeds=SEEDS), plain(model))
    assert sampler.captures == 2


def test_a_folded_model_is_followed_and_has_no_starts(recorded: None) -> None:
    model = network()
    fastlora.fold(model)
    sampler = made(model, False)
    for scale in (1.0, -0.5):
        fastlora.set_scale(model, {"a": scale})
        close(sampler(seeds=SEEDS), plain(model))
    assert sampler.captures == 1
    with pytest.raises(fastlora.AdapterError, match="start: a captured .* folded .* unfold"):
        sampler(seeds=SEEDS, start={"a": 500})


@captures
def test_dora_under_new_weights(recorded: None, per_step: bool | None) -> None:
    """The norms are made in the graph, once a loop, and follow what is written into weights."""
    torch.manual_seed(0)
    model = Network().eval()
    fastlora.inject(model, fastlora.LoRA(2, dora=True), name="a", seed=0)
    randomise(model, size=0.3)
    sampler = made(model, per_step)
    for _ in range(2):
        close(sampler(seeds=SEEDS), plain(model))
        with torch.no_grad():
            model.inner[0].weight.mul_(1.5)
            model.inner[0].fastlora["a"].down.data.mul_(-1)


@captures
def test_inpainting_and_rescale(recorded: None, per_step: bool | None) -> None:
    model, known = network(), torch.randn(SHAPE)
    mask = torch.tensor([[1.0, 0, 1, 0, 1, 0]]).expand(B, 6).clone()
    options = {"mask": mask, "known": known, "guidance_rescale": 0.7}
    sampler = made(model, per_step, "noisy", **options)
    theirs = (mask.clone(), known.clone())
    close(sampler(seeds=SEEDS), plain(model, "noisy", **options))
    changed = {"mask": 1 - mask, "known": known * 2, "guidance_rescale": 0.0}
    close(sampler(seeds=SEEDS, **changed), plain(model, "noisy", **changed))
    assert torch.equal(mask, theirs[0]) and torch.equal(known, theirs[1])
    close(
        sampler(seeds=SEEDS, known=known, guidance_rescale=torch.tensor([0.0, 0.5, 1.0])),
        plain(
            model,
            "noisy",
            mask=1 - mask,
            known=known,
            guidance_rescale=torch.tensor([0.0, 0.5, 1.0]),
        ),
    )


@captures
def test_any_number_of_outputs(recorded: None, per_step: bool | None) -> None:
    model, conditions = network(), [COND, UNCOND, OTHER]
    options = {"cond": conditions, "weights": [2.0, -1.5, 0.5]}
    bare = {"uncond": None, "guidance_scale": 1.0}
    sampler = made(model, per_step, **options, **bare)
    close(sampler(seeds=SEEDS), plain(model, **options, **bare))
    options = {"cond": conditions[::-1], "weights": torch.randn(6, 3, B)}
    close(sampler(seeds=SEEDS, **options), plain(model, **options, **bare))


@captures
def test_steps(recorded: None, per_step: bool | None) -> None:
    model = network()
    sampler = made(model, per_step, "noisy")
    if per_step is False:
        with pytest.raises(RuntimeError, match=r"expected capture\(per_step=True\)"):
            sampler.steps(seeds=SEEDS)
        return
    x = noise(SEEDS, SHAPE[1:])
    theirs = list(fastlora.sample_steps(model, TABLES["noisy"], x, COND, UNCOND, 2.0, SEEDS))
    for _ in range(2):
        ours = list(sampler.steps(seeds=SEEDS))
        for a, b in zip(ours, theirs, strict=True):
            assert (a.index, a.timestep) == (b.index, b.timestep)
            close(a.x, b.x)
            close(a.x0(), b.x0())
        next(sampler.steps(seeds=[7, 8, 9]))  # left after a step
    first, second = (
        sampler.steps(seeds=[4, 5, 6], cond=OTHER),
        sampler.steps(seeds=SEEDS, cond=COND),
    )
    preview = next(second)
    seen = preview.x0().clone()
    if per_step is None:
        expected = plain(model, "noisy", [4, 5, 6], cond=OTHER)
        close(list(first)[-1].x, expected)
    else:
        with pytest.raises(
            RuntimeError, match="steps: expected no other call before the last step"
        ):
            next(first)
    sampler(seeds=[7, 8, 9], guidance_scale=9.0, cond=OTHER)
    assert torch.equal(preview.x0(), seen)
    sampler(seeds=SEEDS, guidance_scale=2.0, cond=COND)
    before = fastlora.adapters(model)
    steps = sampler.steps(seeds=SEEDS, start={"a": 500})
    next(steps)
    steps.close()
    assert fastlora.adapters(model) == before
    close(sampler(seeds=SEEDS), theirs[-1].x)


def test_the_previewed_sample_is_the_model_s() -> None:
    """x̂0 = (x - sigma e)/alpha of what the model saw and said, e guided."""
    model, table = network(), TABLES["ddim"]
    x = noise(SEEDS, SHAPE[1:])
    alpha, sigma = Schedule.cosine().alpha, Schedule.cosine().sigma
    for step in fastlora.sample_steps(model, table, x, COND, UNCOND, 2.0):
        t = torch.full((B,), int(step.timestep))
        with torch.no_grad():
            c, u = model(x, t, COND), model(x, t, UNCOND)
        i = int(step.timestep)
        expected = (x - sigma[i].float() * (u + 2 * (c - u))) / alpha[i].float()
        torch.testing.assert_close(step.x0(), expected, rtol=1e-4, atol=1e-4)
        x = step.x


@captures
def test_not_finite(recorded: None, per_step: bool | None) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            return torch.where(t[:, None] < 400, torch.nan, x + cond)

    sampler = Sampler(Failing(), TABLES["ddim"], SHAPE, COND, check_finite=True)
    if per_step is not None:
        sampler.capture(per_step)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="expected finite .* step 3, timestep 332"):
            sampler(seeds=SEEDS)
    if per_step is None:
        with pytest.raises(FloatingPointError, match="got nan .* in 18 of 18 .* step 3"):
            sample(Failing(), TABLES["ddim"], torch.zeros(SHAPE), COND, check_finite=True)


@pytest.mark.parametrize("inference", [False, True])
@captures
def test_inference_mode(recorded: None, per_step: bool | None, inference: bool) -> None:
    model = network()
    expected = plain(model)
    with torch.inference_mode(inference):
        sampler = made(model, per_step)
        close(sampler(seeds=SEEDS), expected)
    with torch.inference_mode(not inference):
        close(sampler(seeds=SEEDS), expected)


def test_functions_and_float64(recorded: None) -> None:
    def function(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return (x + cond).sin() * 0.5

    for per_step in (None, False, True):
        sampler = made(function, per_step, dtype=torch.float64, cond=COND.double(),
                       uncond=UNCOND.double())  # fmt: skip
        x = torch.randn(SHAPE, dtype=torch.float64)
        expected = sample(function, TABLES["ddim"], x, COND.double(), UNCOND.double(), 2.0,
                          progress=False)  # fmt: skip
        result = sampler(x)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, expected)
        if per_step is not None:
            with pytest.raises(TypeError, match="start: expected a module"):
                sampler(x, start={"a": 3})


def test_seeds_are_drawn_anew() -> None:
    sampler = made(network(), None)
    assert (sampler() - sampler()).abs().max() > 0.1
    torch.manual_seed(0)
    first = sampler()
    torch.manual_seed(0)
    assert torch.equal(first, sampler())


def test_capture_needs_a_gpu() -> None:
    sampler = made(network(), None)
    with pytest.raises(RuntimeError, match="capture: expected a CUDA device, got cpu"):
        sampler.capture()
    close(sampler(seeds=SEEDS), plain(sampler.model))


def test_strengths_with_gradients_are_refused(recorded: None) -> None:
    model = network()
    fastlora.set_scale(model, {"a": torch.ones(B, requires_grad=True)})
    with pytest.raises(fastlora.AdapterError, match="require a gradient cannot be captured"):
        made(model, False)


def test_a_capture_does_not_wait(recorded: None) -> None:
    class Reading(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            return x * t[0].item()

    with pytest.raises(RuntimeError, match="_local_scalar_dense waits"):
        Sampler(Reading(), TABLES["ddim"], SHAPE).capture()


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"x": torch.zeros(3, 5)},
        r"x: expected a floating-point tensor \[3, 6\], got float32 \[3, 5\]",
    ),
    ({"x": torch.zeros(3, 6).long()}, r"x: expected a floating-point tensor \[3, 6\], got int64"),
    ({"seeds": [1, 2]}, r"seeds: expected 3 int64 numbers"),
    ({"cond": COND[:2]}, r"cond: expected float32 \[3, 6\], .* got float32 \[2, 6\]"),
    ({"cond": COND.double()}, r"cond: expected float32 \[3, 6\], .* got float64"),
    ({"cond": {"a": COND}}, "cond: expected float32 .* got a dict of 'a'"),
    ({"uncond": OTHER[:, :2]}, r"uncond: expected float32 \[3, 6\], .* got float32 \[3, 2\]"),
    ({"guidance_scale": torch.ones(4)}, r"guidance_scale: expected .* got \[4\]"),
    ({"guidance_scale": float("nan")}, "guidance_scale: expected finite numbers, got"),
    ({"weights": [1.0, 0.0]}, "weights: expected them when the Sampler was made"),
    ({"guidance_rescale": 0.5}, "guidance_rescale: expected one .* when the Sampler was made"),
    ({"guidance_rescale": 1.5}, r"guidance_rescale: expected .* within \[0, 1\], got 1.5"),
    ({"mask": torch.ones(SHAPE)}, "mask: expected mask and known when the Sampler was made"),
]


@captures
@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda v: next(iter(v), "")[:12])
def test_bad_input_changes_nothing(
    recorded: None, per_step: bool | None, change: dict[str, Any], message: str
) -> None:
    model = network()
    sampler = made(model, per_step)
    with pytest.raises(ValueError, match=f"^Sampler: {message}"):
        sampler(**{"cond": OTHER, "guidance_scale": 9.0, "seeds": SEEDS} | change)
    with pytest.raises(TypeError, match="Sampler: guidance: no such argument; .* guidance_scale"):
        sampler(cond=OTHER, guidance=9.0)
    with pytest.raises(fastlora.AdapterError, match="no adapter named 'z'"):
        sampler(cond=OTHER, guidance_scale=9.0, seeds=SEEDS, start={"z": 1})
    close(sampler(seeds=SEEDS), plain(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": 3}, "Sampler: shape: expected sizes"),
        ({"shape": (3, 2.5)}, "Sampler: shape: expected sizes"),
        ({"cond": COND[:1]}, r"Sampler: uncond: expected the shape of cond"),
        ({"weights": [1.0]}, "Sampler: weights: expected neither uncond nor guidance_scale"),
        ({"mask": torch.ones(SHAPE)}, "Sampler: known: expected both mask and known"),
        (
            {"mask": torch.ones(2, 6), "known": COND},
            r"Sampler: mask: expected a tensor \[3, 6\]",
        ),
        (
            {"mask": torch.full(SHAPE, 2.0), "known": COND},
            "Sampler: mask: expected 1 where .* got 2 to 2",
        ),
        ({"mask": torch.ones(SHAPE), "known": COND[:, :2]}, "Sampler: known: expected the clean"),
        ({"guidance_rescale": "a"}, "Sampler: guidance_rescale: expected .* got a str"),
    ],
)
def test_bad_input_of_the_constructor(change: dict[str, Any], message: str) -> None:
    options = {"shape": SHAPE, "cond": COND, "uncond": UNCOND} | change
    with pytest.raises(ValueError, match=message):
        Sampler(network(), TABLES["ddim"], **options)


def test_other_conditions(recorded: None) -> None:
    """Dicts of tensors follow; what is no tensor is fixed."""

    def model(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return (x + cond["a"] * (2 if cond["b"] == "two" else 1)).sin()

    cond = {"a": COND, "b": "two"}
    sampler = Sampler(model, TABLES["ddim"], SHAPE, cond).capture()
    for a in (COND, OTHER):
        expected = sample(model, TABLES["ddim"], noise(SEEDS, (6,)), {"a": a, "b": "two"},
                          progress=False)  # fmt: skip
        close(sampler(seeds=SEEDS, cond={"a": a, "b": "two"}), expected)
    with pytest.raises(ValueError, match=r"cond\['b'\]: expected 'two', which cannot change"):
        sampler(cond={"a": COND, "b": "one"})
    with pytest.raises(ValueError, match="uncond: expected one when the Sampler was made"):
        sampler(uncond=cond)


def test_a_copy_of_the_model_does_not_disturb(recorded: None) -> None:
    model = network()
    sampler = made(model, False)
    other = copy.deepcopy(model)
    fastlora.set_scale(other, {"a": 3.0})
    other(torch.zeros(SHAPE), torch.zeros(B), COND)
    close(sampler(seeds=SEEDS), plain(model))
    assert sampler.captures == 1


@pytest.mark.parametrize("per_step", [False, True], ids=["loop", "step"])
def test_a_capture_that_fails_is_tried_again(recorded: None, per_step: bool) -> None:
    """Not steps one by one, of which nobody was told."""
    model = network()
    sampler = made(model, per_step)
    fastlora.set_scale(model, {"a": torch.ones(B, requires_grad=True)})
    for _ in range(2):
        with pytest.raises(fastlora.AdapterError, match="require a gradient cannot be captured"):
            sampler(seeds=SEEDS)
    fastlora.set_scale(model, {"a": 0.5})
    close(sampler(seeds=SEEDS), plain(model))
    assert sampler.captures == 2
