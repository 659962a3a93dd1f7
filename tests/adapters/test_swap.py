"""`prepare` and `swap`: the result of `remove` and `load`, from values that are ready."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from fastlora.adapters import CapturedStrengths, swapping
from fastlora.adapters.lookup import adapted_layers
from tests.adapters.nets import Net
from tests.adapters.oracles import assert_unchanged, randomise, snapshot

ALL = ["embedding", "conv", "inner.0", "inner.2"]
FILES: dict[str, tuple[fastlora.LoRA, list[str]]] = {
    "one": (fastlora.LoRA(4), ALL),
    "same": (fastlora.LoRA(4, alpha=4.0), ALL),
    "alpha": (fastlora.LoRA(4, alpha=1.0), ALL),
    "ranks": (fastlora.LoRA(6, alphas={"conv": 2.0}, ranks={"inner.0": 3}), ALL),
    "fewer": (fastlora.LoRA(4, alpha=2.0), ["conv", "inner.2"]),
    "others": (fastlora.LoRA(4), ["grouped", "inner.0"]),
    "dora": (fastlora.LoRA(4, dora=True), ["conv", "inner.0"]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of each, and a LoHa."""
    for seed, (name, (spec, where)) in enumerate(FILES.items()):
        donor = base()
        fastlora.inject(donor, spec, where, name, seed=seed)
        randomise(donor, seed=seed, size=0.5)
        fastlora.save(donor, file(tmp_path, name), name)
    sizes = {"hada_w1_a": (10, 2), "hada_w1_b": (2, 8), "hada_w2_a": (10, 2), "hada_w2_b": (2, 8)}
    parts = {f"lycoris_inner_0.{key}": torch.randn(size) for key, size in sizes.items()}
    save_file({**parts, "lycoris_inner_0.alpha": torch.tensor(1.0)}, file(tmp_path, "loha"))
    return tmp_path


def file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def base() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def tokens() -> Tensor:
    return torch.arange(20).remainder(12).view(5, 4)


def close(model: nn.Module, twin: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), twin(tokens()), rtol=1e-4, atol=1e-5)


def loaded(folder: Path, name: str, scale: Any = 1.0, reserve: int = 0) -> nn.Module:
    """The model with a file under the name "x"."""
    model = base()
    if reserve:
        fastlora.reserve(model, reserve)
    fastlora.load(model, file(folder, name), "x", scale)
    return model


@pytest.mark.parametrize("reserve", [0, 8], ids=["no_reserve", "reserve"])
def test_what_a_swap_leaves_is_what_remove_and_load_leave(folder: Path, reserve: int) -> None:
    """From each file to each, the strength and the switch with it."""
    model = base()
    if reserve:
        fastlora.reserve(model, reserve)
    names = [*FILES, "loha"]
    prepared = {name: fastlora.prepare(model, file(folder, name)) for name in names}
    assert fastlora.adapters(model) == {}
    fastlora.swap(model, "x", prepared["one"], scale=0.5)  # in where there is none
    close(model, loaded(folder, "one", 0.5))
    for before in names:
        for after in names:
            fastlora.swap(model, "x", prepared[before])
            fastlora.swap(model, "x", prepared[after])
            twin = loaded(folder, after, 0.5)
            close(model, twin)
            ours, theirs = (fastlora.adapters(m)["x"] for m in (model, twin))
            assert set(ours.modules) == set(theirs.modules)
            assert (ours.kind, ours.rank, ours.parameters, ours.scale) == (
                (theirs.kind, theirs.rank, theirs.parameters, 0.5)
            )
    fastlora.disable(model, "x")
    fastlora.swap(model, "x", prepared["ranks"], scale=2.0)
    close(model, base())
    fastlora.enable(model)
    close(model, loaded(folder, "ranks", 2.0))
    fastlora.remove(model, "x")
    close(model, base())


def test_beside_another_adapter_and_with_strengths_per_sample(folder: Path) -> None:
    model, twin = base(), base()
    fastlora.reserve(model, 16)
    prepared = {name: fastlora.prepare(model, file(folder, name)) for name in FILES}
    for m in (model, twin):
        fastlora.inject(m, fastlora.LoRA(2), ALL, "stays", seed=3)
        randomise(m, seed=3)
        fastlora.set_scale(m, {"stays": 0.7})
    rows = torch.linspace(-1, 1, 5)
    fastlora.swap(model, "x", prepared["one"], scale=rows)
    for name in ("alpha", "ranks", "others", "same"):
        fastlora.swap(model, "x", prepared[name])
        fastlora.load(twin, file(folder, name), "x", rows)
        close(model, twin)
        fastlora.remove(twin, "x")


def test_only_values_change_between_adapters_of_the_same_ranks(folder: Path) -> None:
    model = base()
    fastlora.reserve(model, 8)
    prepared = {name: fastlora.prepare(model, file(folder, name)) for name in ("one", "alpha")}
    kept = {
        name: [p.clone() for part in ready.parts[""] for p in part.slot.parameters()]
        for name, ready in prepared.items()
    }
    fastlora.swap(model, "x", prepared["one"])
    parameters = fastlora.parameters(model)
    for name in ("alpha", "one", "alpha"):
        fastlora.swap(model, "x", prepared[name])
        assert list(map(id, fastlora.parameters(model))) == list(map(id, parameters))
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(3.0)
    for name, ready in prepared.items():  # nobody has written into them
        now = [p for part in ready.parts[""] for p in part.slot.parameters()]
        assert all(map(torch.equal, now, kept[name]))
    assert prepared["one"].bytes == 4 * fastlora.adapters(model)["x"].parameters
    fastlora.swap(model, "x", prepared["alpha"])
    close(model, loaded(folder, "alpha"))
    assert all(p.requires_grad for p in fastlora.parameters(model))


def test_a_backup_of_exchanged_memory_survives_a_swap(folder: Path) -> None:
    model = base()
    fastlora.reserve(model, 8)
    prepared = {name: fastlora.prepare(model, file(folder, name)) for name in ("one", "same")}
    fastlora.swap(model, "x", prepared["one"])
    parameters = fastlora.parameters(model)
    backup = [p.data for p in parameters]
    values = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.data = parameter.data * 0.5
    fastlora.swap(model, "x", prepared["same"])
    assert all(map(torch.equal, backup, values))
    close(model, loaded(folder, "same"))


def test_a_compiled_and_a_captured_model_follow(folder: Path) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = base()
    fastlora.reserve(model, 8)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    captured = CapturedStrengths(model, torch.device("cpu"), steps=3, copies=2)
    inside = [
        n for n in FILES if n not in ("dora", "others")
    ]  # a grouped convolution has no reserve
    prepared = {name: fastlora.prepare(model, file(folder, name)) for name in inside}
    with torch.no_grad():
        compiled(tokens())
        for name in (*inside, "one"):
            fastlora.swap(model, "x", prepared[name], scale=0.5)
            close(compiled, loaded(folder, name, 0.5))
            assert captured.fits()
    assert counter.frame_count == 1


def test_a_folded_model_is_folded_again(folder: Path) -> None:
    for reserve in (0, 8):
        model = loaded(folder, "one", reserve=reserve)
        fastlora.fold(model)
        for name in ("same", "alpha", "ranks", "fewer"):
            fastlora.swap(model, "x", fastlora.prepare(model, file(folder, name)))
            close(model, loaded(folder, name))
            assert all(m._state.merged for m in adapted_layers(model).values() if len(m.fastlora))


def test_values_follow_into_another_dtype(folder: Path) -> None:
    model = base()
    fastlora.reserve(model, 8)
    prepared = fastlora.prepare(model, file(folder, "one"))
    model.bfloat16()
    fastlora.swap(model, "x", prepared)
    assert all(p.dtype == torch.bfloat16 for p in fastlora.parameters(model))
    fastlora.swap(model, "x", prepared)
    with torch.no_grad():
        expected = loaded(folder, "one").bfloat16()(tokens())
        torch.testing.assert_close(model(tokens()), expected, rtol=3e-2, atol=3e-2)


def test_models_by_component(folder: Path) -> None:
    donors = {part: loaded(folder, "one", 0.0) for part in ("unet", "text_encoder")}
    for part, donor in donors.items():
        randomise(donor, seed=len(part))
        fastlora.set_scale(donor, 1.0)
    fastlora.save(donors, folder / "both.safetensors", "x", format="diffusers")
    models = {part: base() for part in donors}
    both = fastlora.prepare(models, folder / "both.safetensors")
    for model in models.values():
        fastlora.reserve(model, 8)
    fastlora.swap(models, "x", both)
    for part, model in models.items():
        close(model, donors[part])
    alone = fastlora.prepare({"unet": models["unet"]}, file(folder, "one"))
    with pytest.raises(fastlora.AdapterError, match="is for 'unet', got"):
        fastlora.swap({"text_encoder": models["text_encoder"]}, "x", both)
    unet_only = fastlora.Prepared(alone.path, alone.format, (), {}, {"unet": both.parts["unet"]})
    fastlora.swap(models, "x", unet_only)
    close(models["unet"], donors["unet"])
    close(models["text_encoder"], base())
    assert fastlora.adapters(models["text_encoder"]) == {}
    # The strength and the switch that it has are those of a part to which it comes.
    fastlora.set_scale(models, {"x": 0.5})
    fastlora.disable(models, "x")
    fastlora.swap(models, "x", both)
    infos = [fastlora.adapters(model)["x"] for model in models.values()]
    assert [(info.scale, info.enabled) for info in infos] == [(0.5, False)] * 2
    fastlora.enable(models["unet"], "x")
    before = fastlora.adapters(models)
    three = {**models, "text_encoder_2": base()}
    third = fastlora.prepare({"text_encoder_2": three["text_encoder_2"]}, file(folder, "one"))
    parts = {"text_encoder_2": third.parts["text_encoder_2"], **both.parts}
    to_three = fastlora.Prepared(third.path, third.format, (), {}, parts)
    with pytest.raises(fastlora.AdapterError, match="comes to 'text_encoder_2' now; give it one"):
        fastlora.swap(three, "x", to_three)
    assert fastlora.adapters(models) == before
    fastlora.swap(models, "x", both)  # each has one of its own
    assert fastlora.adapters(models) == before


def test_what_does_not_fit_is_refused_and_nothing_changes(folder: Path) -> None:
    model = base()
    fastlora.reserve(model, 5)
    prepared = {n: fastlora.prepare(model, file(folder, n)) for n in ("one", "ranks", "dora")}
    fastlora.swap(model, "x", prepared["one"])
    before, y = snapshot(model), model(tokens())
    refused: list[tuple[Any, str]] = [
        (dict(new=prepared["ranks"]), "reserve of rank 5 has room for 5 more and the adapter has"),
        (dict(new=prepared["one"], name="y"), "reserve of rank 5 has room for 1 more"),
        (dict(new=prepared["one"], name="a.b"), "expected a word without dots"),
        (dict(new=prepared["one"], scale=float("nan")), "scale of 'x': expected a finite number"),
        (dict(new=prepared["one"], scale=1e39), "scale of 'x': expected a finite number"),
        (dict(new=prepared["dora"], scale=torch.ones(5)), "DoRA's norm, which depends on the str"),
        (dict(new=fastlora.prepare(base(), file(folder, "one"))), "is a layer of another model"),
    ]
    for arguments, message in refused:
        with pytest.raises(fastlora.AdapterError, match=message):
            fastlora.swap(model, **{"name": "x", **arguments})
    with pytest.raises(TypeError, match="new: expected what prepare returns, got PosixPath"):
        fastlora.swap(model, "x", folder)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="prepare reads local ones"):
        fastlora.prepare(model, folder / "none.safetensors")
    assert_unchanged(model, before)
    assert torch.equal(model(tokens()), y)
    copied = copy.deepcopy(model)
    with pytest.raises(fastlora.AdapterError, match="is a layer of another model"):
        fastlora.swap(copied, "x", prepared["one"])


def test_where_the_new_one_cannot_come_the_old_one_is_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for reserve in (0, 8):
        model = loaded(folder, "one", 0.5, reserve)
        prepared, real = fastlora.prepare(model, file(folder, "ranks")), swapping.attach
        y = model(tokens())

        def fails(model: nn.Module, slots: Any, *rest: Any, real: Any = real, **how: Any) -> Any:
            if any(slot.width == 6 for slot in slots.values()):
                raise RuntimeError("no memory")
            return real(model, slots, *rest, **how)

        with monkeypatch.context() as patch:
            patch.setattr(swapping, "attach", fails)
            with pytest.raises(RuntimeError, match="no memory"):
                fastlora.swap(model, "x", prepared)
        assert torch.equal(model(tokens()), y) and fastlora.adapters(model)["x"].scale == 0.5
        fastlora.swap(model, "x", prepared)
        close(model, loaded(folder, "ranks", 0.5))


def test_peft_s_adapters_are_left_to_peft(folder: Path) -> None:
    """Native ones are swapped beside them."""
    peft = pytest.importorskip("peft")
    model = base()
    config = peft.LoraConfig(r=2, target_modules=["inner.0", "conv"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model, "theirs")
    twin = copy.deepcopy(model)
    for m in (model, twin):
        fastlora.accelerate(m)
    fastlora.reserve(model, 8)
    for name in ("one", "alpha", "ranks", "fewer"):
        fastlora.swap(model, "x", fastlora.prepare(model, file(folder, name)), scale=0.5)
        fastlora.load(twin, file(folder, name), "x", 0.5)
        close(model, twin)
        fastlora.remove(twin, "x")
    with pytest.raises(fastlora.AdapterError, match="swap: 'theirs' is PEFT's"):
        fastlora.swap(model, "theirs", fastlora.prepare(model, file(folder, "one")))
    fastlora.load(twin, file(folder, "fewer"), "x", 0.5)
    close(model, twin)
