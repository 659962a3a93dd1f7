"""Saving and loading adapters of models: bit-exact, strict, and all or nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastlora
from fastlora.formats import files
from tests.adapters.nets import Net
from tests.adapters.oracles import assert_unchanged, randomise, same_bits, snapshot

SPECS: dict[str, Any] = {
    "lora": fastlora.LoRA(rank=4, alpha=3.7, ranks={"inner.0": 2}, alphas={"conv": 1 / 3}),
    "rslora": fastlora.LoRA(rank=6, alpha=2, rank_stabilized=True, dropout=0.25),
    "dora": fastlora.LoRA(rank=4, dora=True),
    "spectral": fastlora.Spectral(),
    "spectral_scalar": fastlora.Spectral(norms="scalar"),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def base(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype).eval()


def adapted(
    spec: Any, base_dtype: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[Net, Tensor]:
    model = base(base_dtype)
    fastlora.inject(model, spec, name="style", seed=0, **kwargs)
    randomise(model, size=0.5)
    return model, torch.randint(0, 12, (5, 4))


@specs
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_round_trip_is_bit_exact(tmp_path: Path, spec: Any, dtype: torch.dtype) -> None:
    model, x = adapted(spec, dtype)
    path = tmp_path / "ein Stil ☃.safetensors"
    fastlora.save(model, path)
    other = base(dtype)
    info = fastlora.load(other, str(path), name="again").adapter
    mine = fastlora.adapters(model)["style"]
    assert info == mine and fastlora.adapters(other) == {"again": info}
    for module in mine.modules:
        ours = model.get_submodule(module).fastlora["style"]
        theirs = other.get_submodule(module).fastlora["again"]
        assert ours.spec == theirs.spec
        for key, value in ours.named_parameters():
            assert same_bits(value, dict(theirs.named_parameters())[key])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert same_bits(other(x).detach(), model(x).detach())
    fastlora.save(other, tmp_path / "b", name="again")
    assert_same_file(tmp_path / "b", path)


def assert_same_file(a: Path, b: Path) -> None:
    """The same content; safetensors writes its metadata in any order."""
    (tensors, metadata), (others, other_metadata) = files.read(a), files.read(b)
    assert metadata == other_metadata and tensors.keys() == others.keys()
    assert all(same_bits(value, others[key]) for key, value in tensors.items())


def test_adapters_in_the_16_bit_dtype_of_their_base(tmp_path: Path) -> None:
    model, x = adapted(SPECS["lora"], torch.bfloat16, dtype=torch.bfloat16)
    fastlora.save(model, tmp_path / "a")
    assert {t.dtype for t in load_file(tmp_path / "a").values()} == {torch.bfloat16}
    other = base(torch.bfloat16)
    fastlora.load(other, tmp_path / "a")
    assert {p.dtype for p in fastlora.parameters(other)} == {torch.bfloat16}
    assert same_bits(other(x), model(x))


@pytest.mark.parametrize("file", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("model", DTYPES, ids=lambda d: str(d)[6:])
def test_a_file_of_any_dtype_on_a_base_of_any_dtype(
    tmp_path: Path, file: torch.dtype, model: torch.dtype
) -> None:
    source, x = adapted(SPECS["dora"])
    for p in fastlora.parameters(source):
        p.data = p.data.bfloat16().to(file)  # values that every dtype can hold
    fastlora.save(source, tmp_path / "a")
    target = base(model)
    fastlora.load(target, tmp_path / "a")
    y = target(x)
    assert y.dtype == model
    fits = file == model or (file == torch.float32 and model.itemsize == 2)
    default = torch.float32 if model.itemsize == 2 else model
    assert {p.dtype for p in fastlora.parameters(target)} == {file if fits else default}
    exact = copy.deepcopy(target).double()(x)
    tolerance = 200 * torch.finfo(model).eps
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)
    y.float().sum().backward()


def test_the_files_own_alpha_and_rank_and_not_those_of_an_earlier_adapter(tmp_path: Path) -> None:
    """Hot swapping: the gate is that of the new file."""
    for rank, alpha in ((4, 16), (8, 2)):
        source = nn.Sequential(nn.Linear(6, 6))
        fastlora.inject(source, fastlora.LoRA(rank=rank, alpha=alpha), seed=0)
        randomise(source, seed=rank)
        fastlora.save(source, tmp_path / f"{rank}")
    model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(2, 6)
    plain = model(x)
    for rank, ratio in ((4, 4.0), (8, 0.25)):
        fastlora.load(model, tmp_path / f"{rank}", name="style", scale=0.5)
        tensors = load_file(tmp_path / f"{rank}")
        change = 0.5 * ratio * x @ tensors["0.down"].t() @ tensors["0.up"].t()
        torch.testing.assert_close(model(x), plain + change)
        fastlora.set_scale(model, {"style": 1.0})
        torch.testing.assert_close(model(x), plain + 2 * change)
        fastlora.remove(model, "style")


def test_scale_and_freeze(tmp_path: Path) -> None:
    source, x = adapted(SPECS["lora"])
    fastlora.save(source, tmp_path / "a")
    for scale in (0.25, torch.tensor([0.0, 1, 2, 3, 4])):
        model = base()
        info = fastlora.load(model, tmp_path / "a", name="a", scale=scale, freeze=False)
        assert torch.equal(torch.as_tensor(info.adapter.scale), torch.as_tensor(scale))
        assert model.conv.weight.requires_grad
        fastlora.set_scale(source, scale)
        torch.testing.assert_close(model(x), source(x))
    model = base()
    fastlora.load(model, tmp_path / "a")
    assert not model.conv.weight.requires_grad


def test_strengths_and_other_adapters_are_not_in_the_file(tmp_path: Path) -> None:
    model, _ = adapted(SPECS["lora"])
    fastlora.save(model, tmp_path / "a")
    fastlora.inject(model, fastlora.LoRA(rank=2), name="other")
    fastlora.set_scale(model, 0.1)
    fastlora.disable(model, "style")
    fastlora.fold(model)
    fastlora.save(model, tmp_path / "b", name="style")
    assert_same_file(tmp_path / "a", tmp_path / "b")
    with pytest.raises(
        fastlora.AdapterError, match=r"expected one of \['other', 'style'\], got None"
    ):
        fastlora.save(model, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_loading_into_folded_and_adapted_models(tmp_path: Path) -> None:
    source, x = adapted(SPECS["dora"])
    fastlora.save(source, tmp_path / "a")
    fastlora.save(adapted(SPECS["rslora"])[0], tmp_path / "b")
    model, _ = adapted(SPECS["lora"])
    twin = copy.deepcopy(model)
    fastlora.fold(model)
    for m in (model, twin):
        fastlora.load(m, tmp_path / "a", name="b", scale=0.5)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)
    before, y = snapshot(model), model(x)
    with pytest.raises(fastlora.AdapterError, match="differs per sample"):
        fastlora.load(model, tmp_path / "b", name="c", scale=torch.ones(5))
    assert_unchanged(model, before)
    assert same_bits(model(x), y)
    fastlora.unfold(model)
    fastlora.set_scale(model, {"style": torch.ones(5)})
    before = snapshot(model)
    with pytest.raises(fastlora.AdapterError, match="one batch size"):
        fastlora.load(model, tmp_path / "b", name="c", scale=torch.ones(4))
    assert_unchanged(model, before)
    assert "c" not in fastlora.adapters(model)


def test_inference_mode_while_loading(tmp_path: Path) -> None:
    source, x = adapted(SPECS["spectral"])
    fastlora.save(source, tmp_path / "a")
    model = base()
    with torch.inference_mode():
        fastlora.load(model, tmp_path / "a")
        model(x)
    model(x).sum().backward()
    assert all(p.grad is not None for p in fastlora.parameters(model))


def test_models_that_are_one_layer(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    fastlora.inject(model, fastlora.LoRA(rank=2))
    randomise(model)
    fastlora.save(model, tmp_path / "a")
    other = nn.Linear(4, 3)
    other.load_state_dict(model.state_dict(), strict=False)
    fastlora.load(other, tmp_path / "a")
    x = torch.randn(2, 4)
    assert torch.equal(other(x), model(x))


# --- what does not fit ------------------------------------------------------------------------


def rewritten(path: Path, change: Any) -> None:
    """The file with `change(tensors, config, metadata)` applied."""
    tensors, metadata = files.read(path)
    config = json.loads(metadata["config"])
    change(tensors, config, metadata)
    metadata["config"] = json.dumps(config)
    save_file(tensors, path, metadata)


def drop(key: str) -> Any:
    return lambda t, c, m: t.pop(key)


def put(key: str, value: Any) -> Any:
    return lambda t, c, m: t.__setitem__(key, value)


def setting(path: str, key: str, value: Any) -> Any:
    return lambda t, c, m: c["modules"][path].__setitem__(key, value)


def rename(old: str, new: str) -> Any:
    def change(t: dict[str, Tensor], c: dict[str, Any], m: dict[str, str]) -> None:
        c["modules"][new] = c["modules"].pop(old)
        for key in [k for k in t if k.rpartition(".")[0] == old]:
            t[f"{new}.{key.rpartition('.')[2]}"] = t.pop(key)

    return change


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "missing": (
        drop("conv.up"),
        fastlora.FormatError,
        "conv: up: expected a tensor, got nothing",
    ),
    "missing_magnitude": (drop("inner.0.magnitude"), fastlora.FormatError, "inner.0: magnitude"),
    "module_missing": (
        lambda t, c, m: [t.pop(f"conv.{k}") for k in ("down", "up", "magnitude")],
        fastlora.FormatError,
        "no tensors for",
    ),
    "extra": (put("conv.mid", torch.ones(1)), fastlora.FormatError, "unexpected key 'conv.mid'"),
    "extra_module": (put("x.up", torch.ones(1)), fastlora.FormatError, "unexpected key 'x.up'"),
    "shape": (
        lambda t, c, m: t.update(
            {"inner.2.up": torch.ones(7, 4), "inner.2.magnitude": torch.ones(7)}
        ),
        fastlora.AdapterError,
        r"inner.2: up: expected \[6, 4\], got \[7, 4\]",
    ),
    "transposed": (
        put("inner.2.down", torch.ones(10, 4)),
        fastlora.FormatError,
        "inner.2: .* down",
    ),
    "rank": (setting("inner.0", "rank", 5), fastlora.FormatError, "inner.0: down: expected rank 5"),
    "integers": (
        put("inner.2.up", torch.ones(6, 4, dtype=torch.int32)),
        fastlora.FormatError,
        "float",
    ),
    "nan": (put("inner.2.up", torch.full((6, 4), torch.nan)), fastlora.FormatError, "NaN"),
    "unknown_setting": (setting("conv", "colour", 3), fastlora.FormatError, "conv.*colour"),
    "bad_alpha": (setting("conv", "alpha", "high"), fastlora.FormatError, "alpha: expected"),
    "zero_alpha": (setting("conv", "alpha", 0), fastlora.FormatError, "alpha: expected"),
    "bad_rank": (setting("conv", "rank", "4"), fastlora.FormatError, "rank: expected"),
    "bad_dropout": (setting("conv", "dropout", 2), fastlora.FormatError, "dropout: expected"),
    "bad_dora": (setting("conv", "dora", "yes"), fastlora.FormatError, "dora: expected True"),
    "bad_rslora": (
        setting("conv", "rank_stabilized", "no"),
        fastlora.FormatError,
        "rank_stabilized: expected True or False, got 'no'",
    ),
    "bad_ranks": (setting("conv", "ranks", 7), fastlora.FormatError, "conv.*ranks"),
    "huge_rank": (setting("conv", "rank", 10**400), fastlora.FormatError, "rank: expected"),
    "not_dora": (setting("conv", "dora", False), fastlora.FormatError, "magnitude: expected none"),
    "other_path": (rename("conv", "conw"), fastlora.AdapterError, "no module 'conw'"),
    "other_layer": (
        rename("conv", "norm"),
        fastlora.AdapterError,
        "norm: a GroupNorm cannot take it",
    ),
    "an_activation": (rename("conv", "inner.1"), fastlora.AdapterError, "a SiLU cannot take it"),
    "a_container": (rename("conv", "inner"), fastlora.AdapterError, "a Sequential cannot take it"),
    "version": (
        lambda t, c, m: m.update(version="9"),
        fastlora.FormatError,
        "version 1 or 2 .* got '9'",
    ),
    "foreign": (
        lambda t, c, m: m.update(format="pt"),
        fastlora.FormatError,
        "expected the keys of",
    ),
    "kind": (lambda t, c, m: c.update(kind="loha"), fastlora.FormatError, "cannot be read"),
    "groups": (
        lambda t, c, m: (
            t.update(
                {"grouped.down": torch.ones(3, 4, 3, 3), "grouped.up": torch.ones(8, 1, 1, 1)}
            ),
            c["modules"]["grouped"].update(rank=3),
        ),
        fastlora.FormatError,
        r"grouped: expected down .* got \[3, 4, 3, 3\] and \[8, 1, 1, 1\]",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("has_adapters", [False, True], ids=["plain", "adapted"])
def test_a_file_that_does_not_fit_changes_nothing(
    tmp_path: Path, change: Any, error: type[Exception], message: str, has_adapters: bool
) -> None:
    source, x = adapted(SPECS["dora"])
    path = tmp_path / "file.safetensors"
    fastlora.save(source, path)
    rewritten(path, change)
    model = adapted(SPECS["lora"])[0] if has_adapters else base()
    before, y = snapshot(model), model(x).detach()
    with pytest.raises(error, match=rf"file.safetensors: .*{message}"):
        fastlora.load(model, path, name="new")
    assert_unchanged(model, before)
    assert same_bits(model(x).detach(), y)


def test_bad_arguments_of_load_change_nothing(tmp_path: Path) -> None:
    source, x = adapted(SPECS["lora"])
    fastlora.save(source, tmp_path / "a")
    model = base()
    before = snapshot(model)
    for kwargs, message in [
        ({"name": "a.b"}, "without dots"),
        ({"scale": float("nan")}, "scale of 'default'"),
        ({"scale": "much"}, "scale of 'default'"),
        ({"scale": torch.ones(2, 2)}, "scale of 'default'"),
    ]:
        with pytest.raises(fastlora.AdapterError, match=message):
            fastlora.load(model, tmp_path / "a", **kwargs)
    with pytest.raises(FileNotFoundError):
        fastlora.load(model, tmp_path / "b")
    assert_unchanged(model, before)
    with pytest.raises(fastlora.AdapterError, match="'style' exists already"):
        fastlora.load(source, tmp_path / "a", name="style")
    with torch.device("meta"):
        meta = Net()
    with pytest.raises(fastlora.AdapterError, match="meta device"):
        fastlora.load(meta, tmp_path / "a")
    assert type(meta.conv) is nn.Conv2d


def test_two_paths_of_one_layer(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
        return model

    source = make()
    fastlora.inject(source, fastlora.LoRA(rank=2))
    fastlora.save(source, tmp_path / "a")
    model = make()
    model["second"] = model["first"]
    before = snapshot(model)
    with pytest.raises(fastlora.AdapterError, match="second and first are the same layer"):
        fastlora.load(model, tmp_path / "a")
    assert_unchanged(model, before)


def test_shifts_never_go_onto_another_weight(tmp_path: Path) -> None:
    source, x = adapted(SPECS["spectral"])
    fastlora.save(source, tmp_path / "a")
    for seed in range(1, 8):  # weights with the same initialisation have nearly the same norms
        other = base(seed=seed)
        before = snapshot(other)
        with pytest.raises(fastlora.AdapterError, match="and this is another one"):
            fastlora.load(other, tmp_path / "a")
        assert_unchanged(other, before)
    permuted = base()
    with torch.no_grad():
        permuted.conv.weight.copy_(permuted.conv.weight.flip(0))
    with pytest.raises(fastlora.AdapterError, match="conv: .*another one"):
        fastlora.load(permuted, tmp_path / "a")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):  # the same weight, rounded
        fastlora.load(base(dtype), tmp_path / "a")
    rewritten(tmp_path / "a", lambda t, c, m: c.pop("base_hash"))
    with pytest.raises(fastlora.AdapterError, match="another one"):
        fastlora.load(base(), tmp_path / "a")


@pytest.mark.parametrize("value", [3, None, [], ["a"] * 5, [1.0], {"x": 1}])
def test_nonsense_instead_of_a_base_hash(tmp_path: Path, value: Any) -> None:
    source, _ = adapted(SPECS["spectral"])
    fastlora.save(source, tmp_path / "a")
    rewritten(tmp_path / "a", lambda t, c, m: c["base_hash"].update(conv=value))
    with pytest.raises(fastlora.AdapterError, match="conv: .*another one"):
        fastlora.load(base(), tmp_path / "a")
    rewritten(tmp_path / "a", lambda t, c, m: c.update(base_hash=value))
    with pytest.raises(fastlora.AdapterError, match="another one"):
        fastlora.load(base(), tmp_path / "a")


def test_one_name_of_two_kinds_has_no_file(tmp_path: Path) -> None:
    model = base()
    fastlora.inject(model.inner, fastlora.LoRA(rank=2), name="a")
    fastlora.inject(model.conv, fastlora.Spectral(), name="a")
    with pytest.raises(
        fastlora.AdapterError, match="'a' is lora and spectral; a file has one kind"
    ):
        fastlora.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_save_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    model, _ = adapted(SPECS["lora"])
    path = tmp_path / "a.safetensors"
    fastlora.save(model, path)
    before = path.read_bytes()
    randomise(model, seed=9)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        fastlora.save(model, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="its directory does not exist"):
        fastlora.save(model, tmp_path / "no" / "a.safetensors")
