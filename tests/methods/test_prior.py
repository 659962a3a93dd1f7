"""Class pictures: the same as by the sampler, cached under everything that decides them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora.methods import sample_prior
from fastlora.samplers import ddim, noise, sample
from tests.training.toys import SCHEDULE, Toy

TABLE = ddim(SCHEDULE, 5, prediction="x0")
COND = torch.tensor([[0.0, 1.0, 0.0, 0.0]])


class Counting(Toy):
    calls = 0

    def forward(self, x, t, cond):
        Counting.calls += len(x)
        return super().forward(x, t, cond)


def make(model=None, **options):
    options = {"shape": (6,), "count": 10, "progress": False, **options}
    options = {"table": TABLE, "cond": COND, **options}
    return sample_prior(model or Toy(), options.pop("table"), options.pop("cond"), **options)


def test_pictures_are_the_samplers_and_do_not_depend_on_the_batch():
    whole = make(batch=10)
    assert whole.shape == (10, 6) and whole.dtype == torch.float32
    torch.testing.assert_close(make(batch=3), whole)
    assert len({tuple(row.tolist()) for row in whole}) == 10  # each from noise of its own
    assert not torch.equal(make(seed=1), whole)


@pytest.mark.parametrize("uncond", [torch.zeros(1, 4), torch.eye(4).flip(0).repeat(3, 1)[:10]])
def test_guidance_and_a_condition_for_each(uncond):
    conds = torch.eye(4).repeat(3, 1)[:10]
    own = make(cond=conds, batch=4, guidance_scale=2.0, uncond=uncond)
    seeds = torch.randint(2**62, (10,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = sample(
        *(Toy(), TABLE, noise(seeds, (6,)), conds, uncond.expand(10, 4), 2.0), progress=False
    )
    torch.testing.assert_close(own, expected)


def test_the_cache_is_read_the_second_time(tmp_path: Path):
    model = Counting()
    first = make(model, cache=tmp_path / "made")
    calls = Counting.calls
    assert calls > 0
    assert torch.equal(make(model, cache=tmp_path / "made"), first)
    assert Counting.calls == calls and len(list((tmp_path / "made").iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"model": Toy(seed=1)},
        {"cond": 2 * COND},
        {"uncond": torch.zeros(1, 4), "guidance_scale": 1.5},
        {"table": ddim(SCHEDULE, 6, prediction="x0")},
        {"count": 9},
        {"seed": 1},
    ],
    ids=str,
)
def test_what_decides_the_pictures_has_a_file_of_its_own(tmp_path: Path, other):
    first = make(cache=tmp_path)
    second = make(cache=tmp_path, **other)
    assert len(list(tmp_path.iterdir())) == 2
    assert first.shape != second.shape or not torch.equal(first, second)


def adapted(alpha: float = 2.0) -> Toy:
    model = Toy()
    fastlora.inject(model, fastlora.LoRA(rank=2, alpha=alpha), name="s")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in fastlora.parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def trained_when_folded(model: Toy) -> None:
    """What a fold has written stays, whatever becomes of the parameters."""
    factors = fastlora.parameters(model, "s")
    with torch.no_grad():
        for p in factors:
            p.mul_(2)
        fastlora.fold(model)
        for p in factors:
            p.div_(2)


CHANGES = {
    "strength 0": lambda model: fastlora.set_scale(model, {"s": 0.0}),
    "a strength for each": lambda model: fastlora.set_scale(model, {"s": torch.linspace(0, 1, 10)}),
    "off": lambda model: fastlora.disable(model, "s"),
    "folded from other factors": trained_when_folded,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_adapters_do_decides_the_file(tmp_path: Path, change):
    model = adapted()
    first = make(model, cache=tmp_path, batch=10)
    change(model)
    expected = make(model, batch=10)
    assert not torch.allclose(first, expected)
    assert torch.equal(make(model, cache=tmp_path, batch=10), expected)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(make(adapted(), cache=tmp_path, batch=10), first)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_alpha_of_a_lora_decides_the_file(tmp_path: Path):
    """Its parameters are the same."""
    first, second = (make(adapted(alpha), cache=tmp_path) for alpha in (2.0, 1.0))
    assert not torch.allclose(first, second) and len(list(tmp_path.iterdir())) == 2


def test_parameters_of_any_strides_have_a_hash(tmp_path: Path):
    model = Toy()
    model.odd = torch.nn.Parameter(torch.randn(9).as_strided((1, 1), (5, 7)))
    assert torch.equal(make(model, cache=tmp_path), make(model, cache=tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_path_is_no_cache(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(cache="")
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_called_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="sample_prior: cache .*file: expected a writable directory"):
        make(cache=tmp_path / "file")


@pytest.mark.parametrize("broken", ["truncated", "foreign"])
def test_a_file_that_does_not_read_is_made_again(tmp_path: Path, broken):
    first = make(cache=tmp_path)
    (file,) = tmp_path.iterdir()
    if broken == "truncated":
        file.write_bytes(file.read_bytes()[:40])
    else:
        from safetensors.torch import save_file

        save_file({"images": torch.zeros(3)}, file)
    with pytest.warns(UserWarning, match="made again"):
        assert torch.equal(make(cache=tmp_path), first)
    assert torch.equal(make(cache=tmp_path), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count: expected an int from 1 to 2^63 - 1, got 0"),
        ({"count": 2.5}, "count: expected an int from 1 to 2^63 - 1, got 2.5"),
        ({"batch": 0}, "batch: expected an int from 1 to 2^63 - 1, got 0"),
        ({"seed": 2**70}, f"seed: expected an int from 0 to 2^63 - 1, got {2**70}"),
        ({"seed": -1}, "seed: expected an int from 0 to 2^63 - 1, got -1"),
        ({"shape": (6.5,)}, "shape: expected ints >= 1, got (6.5,)"),
        ({"shape": 6}, "shape: expected ints >= 1, got 6"),
        ({"cond": COND.expand(3, 4)}, "cond: expected conditions [1, ...] for all or [10, ...]"),
        ({"cond": "a three"}, "cond: expected conditions [1, ...] for all or [10, ...]"),
        (
            {"uncond": torch.zeros(3, 4), "guidance_scale": 2.0},
            "uncond: expected conditions [1, ...] for all or [10, ...] one for each, got float32",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match="^sample_prior: " + re.escape(message)):
        make(**change)
