"""`decompose`: right factors, found by `inject`, truncated, and of weights that have none."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.adapters import factorising
from tests.adapters.nets import Net
from tests.adapters.oracles import (
    as_matrix,
    as_weight,
    assert_unchanged,
    same_bits,
    snapshot,
    spectral_weight,
    with_weight,
)

MATRICES = ["embedding", "conv", "grouped", "inner.0", "inner.2"]


@pytest.fixture
def no_svd(monkeypatch) -> Any:
    """Forbids decompositions from when it is called."""

    def forbid() -> None:
        def svd(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a decomposition")

        monkeypatch.setattr(torch.linalg, "svd", svd)

    return forbid


def failing_svd(*failing: torch.dtype) -> Any:
    original = torch.linalg.svd

    def svd(matrix: torch.Tensor, **kwargs: Any) -> Any:
        if matrix.dtype in failing:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix, **kwargs)

    return svd


def shifted(model: nn.Module, size: float = 0.3) -> None:
    with torch.no_grad():
        for p in fastlora.parameters(model):
            p.copy_(size * torch.randn(p.shape))


def test_inject_takes_over_what_decompose_has_left(no_svd) -> None:
    model, tokens = Net(), torch.randint(0, 12, (5, 4))
    y, keys = model(tokens).detach(), list(model.state_dict())
    twin = copy.deepcopy(model)
    fastlora.inject(twin, fastlora.Spectral())
    report = fastlora.decompose(model, cache=None)
    assert [row.path for row in report.rows] == MATRICES
    assert [row.shape for row in report.rows] == [(12, 16), (8, 36), (8, 36), (10, 8), (6, 10)]
    assert {row.source for row in report.rows} == {"computed"} and report.hits == 0
    assert report.shifts == 12 + 8 + 8 + 8 + 6 and report.error < 1e-6
    assert list(model.state_dict()) == keys and type(model.conv) is nn.Conv2d
    no_svd()
    again = fastlora.decompose(model, cache=None)
    assert {row.source for row in again.rows} == {"layer"} and again.hits == 5
    assert fastlora.inject(model, fastlora.Spectral()).parameters == report.shifts + 8
    assert same_bits(model(tokens).detach(), y)  # δ = 0
    for path in MATRICES:
        ours, theirs = (m.get_submodule(path).fastlora for m in (model, twin))
        assert all(same_bits(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    assert not any("_fastlora_factors" in vars(m) for m in model.modules())
    assert {row.source for row in fastlora.decompose(model, cache=None).rows} == {"layer"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [False, True], ids=["one after another", "in parallel"])
def test_factors_and_errors_against_float64(dtype, threads: bool, monkeypatch) -> None:
    monkeypatch.setattr(factorising, "SMALL", 0 if threads else 1 << 60)
    torch.set_num_threads(2)
    layers = [nn.Linear(14, 9), nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3), nn.Linear(7, 20)]
    model = nn.Sequential(*layers).to(dtype)
    report = fastlora.decompose(model, cache=False, progress=False)
    assert torch.get_num_threads() == 2
    fastlora.inject(model, fastlora.Spectral())
    left, whole = 0.0, 0.0
    for row, layer in zip(report.rows, model, strict=True):
        matrix = as_matrix(layer, layer.weight.detach().double())
        f = layer.fastlora
        assert f.svd_u.dtype == f.svd_vh.dtype == dtype
        assert f.svd_s.dtype == torch.promote_types(dtype, torch.float32)
        exact = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(f.svd_s.double(), exact, rtol=1e-5, atol=1e-6)
        residual = matrix - (f.svd_u.double() * f.svd_s.double()) @ f.svd_vh.double()
        error = (residual.norm() / matrix.norm()).item()
        assert row.error == pytest.approx(error, rel=0.2, abs=1e-7)
        assert row.norm == pytest.approx(matrix.norm().item(), rel=1e-6)
        left, whole = left + residual.norm().item() ** 2, whole + matrix.norm().item() ** 2
    assert report.error == pytest.approx(math.sqrt(left / whole), rel=0.2, abs=1e-7)


def test_float64_is_more_exact(monkeypatch) -> None:
    layer = nn.Linear(60, 40)
    exact = torch.linalg.svdvals(layer.weight.detach().double())
    errors = []
    for dtype in (torch.float32, torch.float64):
        fastlora.decompose(layer, cache=None, dtype=dtype)
        fastlora.inject(layer, fastlora.Spectral())
        errors.append((layer.fastlora.svd_s.double() - exact).abs().max())
        fastlora.remove(layer, "default")
    assert errors[1] < errors[0] and errors[1] <= torch.finfo(torch.float32).eps * exact.max()


# --- truncation -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv", "transposed", "embedding"])
def test_truncation_is_exact_at_zero_and_shifts_what_it_keeps(kind: str, dtype) -> None:
    layer: Any = {
        "linear": nn.Linear(14, 9),
        "conv": nn.Conv2d(4, 9, 3),
        "transposed": nn.ConvTranspose2d(4, 9, 3),
        "embedding": nn.Embedding(13, 9),
    }[kind].to(dtype)
    data = {"conv": (2, 4, 5, 5), "transposed": (2, 4, 5, 5), "linear": (3, 14)}
    x = torch.arange(13) if kind == "embedding" else torch.randn(data[kind], dtype=dtype)
    plain = copy.deepcopy(layer)
    matrix = as_matrix(plain, plain.weight.detach().double())
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    (row,) = fastlora.decompose(layer, rank=4, cache=None).rows
    assert (row.shifts, row.rank) == (4, 9)
    assert row.error == pytest.approx((s[4:].norm() / s.norm()).item(), rel=1e-5)
    assert sum(fastlora.parameter_counts(layer, fastlora.Spectral()).values()) == 4
    assert fastlora.inject(layer, fastlora.Spectral()).parameters == 4
    assert same_bits(layer(x).detach(), plain(x).detach())
    shift = layer.fastlora["default"].shift
    with torch.no_grad():
        shift.copy_(torch.tensor([0.5, -1e9, 0.0, -0.25]))
    change = torch.maximum(shift.detach().double(), -s[:4])
    weight = as_weight(plain, matrix + (u[:, :4] * change) @ vh[:4])
    exact = with_weight(plain, weight, x)
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
    fastlora.fold(layer)
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_keeps_the_fewest_that_have_it(energy: float) -> None:
    model = nn.Sequential(nn.Linear(14, 9), nn.Linear(30, 20))
    report = fastlora.decompose(model, energy=energy, cache=None)
    for row, layer in zip(report.rows, model, strict=True):
        squares = torch.linalg.svdvals(layer.weight.detach().double()) ** 2
        have = [(squares[:k].sum() / squares.sum()).item() for k in range(len(squares) + 1)]
        assert have[row.shifts] >= energy - 1e-6 and have[row.shifts - 1] < energy
        assert row.error**2 == pytest.approx(1 - have[row.shifts], abs=1e-6)


def test_ranks_by_path_and_larger_than_there_are() -> None:
    model = nn.Sequential(nn.Linear(14, 9), nn.Linear(5, 6), nn.LayerNorm(6))
    report = fastlora.decompose(model, rank={"0": 3}, cache=None)
    assert [row.shifts for row in report.rows] == [3, 5]
    assert [row.shifts for row in fastlora.decompose(model, rank=7, cache=None).rows] == [7, 5]
    assert "7 of 9" in str(fastlora.decompose(model, rank=7, cache=None))
    with pytest.raises(fastlora.AdapterError, match=r"rank: expected paths .* got \['2', '3'\]"):
        fastlora.decompose(model, rank={"2": 3, "3": 1})


def test_a_file_of_truncated_shifts_needs_the_same_ranks(tmp_path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(14, 9), nn.Linear(9, 6))
    others = [copy.deepcopy(model) for _ in range(4)]
    fastlora.decompose(model, rank=4, cache=None)
    fastlora.inject(model, fastlora.Spectral())
    shifted(model)
    fastlora.save(model, tmp_path / "a")
    before = snapshot(others[0])
    message = r"0: shift: expected \[9\], .* got \[4\]: .*decompose\(model, rank=4"
    with pytest.raises(fastlora.AdapterError, match=message):
        fastlora.load(others[0], tmp_path / "a")
    with pytest.raises(fastlora.AdapterError, match=message):
        fastlora.load(others[0], tmp_path / "a", any_base=True)
    assert_unchanged(others[0], before)
    fastlora.decompose(others[1], rank=5, cache=None)
    with pytest.raises(fastlora.AdapterError, match=r"0, 1: shift: expected \[5\]"):
        fastlora.load(others[1], tmp_path / "a")
    fastlora.decompose(others[2], rank=4, cache=None)
    fastlora.load(others[2], tmp_path / "a")
    x = torch.randn(3, 14)
    assert same_bits(others[2](x), model(x))
    fastlora.inject(others[3], fastlora.Spectral())
    with pytest.raises(fastlora.AdapterError, match="0: its adapters have 9 shifts, .* rank 4"):
        fastlora.decompose(others[3], rank=4, cache=None)
    with pytest.raises(fastlora.AdapterError, match="0: its adapters have 4 shifts, .* rank 9"):
        fastlora.decompose(model, cache=None)
    assert fastlora.decompose(model, rank=4, cache=None).hits == 2


# --- the base changes -------------------------------------------------------------------------


def check(layer: nn.Module, rank: int) -> None:
    """The layer is right for the weight that it has now."""
    plain = nn.Linear(layer.in_features, layer.out_features)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "fastlora" not in k})
    shift = layer.fastlora["default"].shift.detach()
    assert shift.shape == (rank,) == layer.fastlora.svd_s.shape
    weight = spectral_weight(plain, torch.cat([shift, torch.zeros(9 - rank)]), 1.0)
    x = torch.randn(3, 14)
    exact = with_weight(plain, weight, x)
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [9, 4])
def test_factors_of_another_weight_are_not_used(rank: int) -> None:
    layer, other, third = nn.Linear(14, 9), nn.Linear(14, 9), nn.Linear(14, 9)
    fastlora.decompose(layer, cache=None, rank=rank)
    layer.weight.data.copy_(other.weight)  # between decompose and inject
    fastlora.inject(layer, fastlora.Spectral())
    shifted(layer)
    check(layer, rank)
    layer.load_state_dict(third.state_dict())  # and after it: to the rank that the shifts have
    check(layer, rank)
    check(copy.deepcopy(layer), rank)


def test_a_base_without_a_decomposition_is_named_when_it_comes() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    fastlora.inject(model, fastlora.Spectral())
    with pytest.raises(fastlora.AdapterError, match="0: its weight has no decomposition: .*NaN"):
        model.load_state_dict({"0.weight": torch.full((4, 4), torch.nan), "0.bias": torch.ones(4)})


def test_copies_moves_and_removing(no_svd) -> None:
    model = nn.Sequential(nn.Linear(14, 9), nn.LayerNorm(9))
    fastlora.inject(model, fastlora.LoRA(rank=2), name="lora")
    fastlora.decompose(model, cache=None)
    low = copy.deepcopy(model).half()
    fastlora.inject(low, fastlora.Spectral(), where="0")  # another weight: decomposed again
    assert low[0].fastlora.svd_u.dtype == torch.float16
    no_svd()
    for twin in (copy.deepcopy(model), model):
        fastlora.inject(twin, fastlora.Spectral(), name="a")
        fastlora.inject(twin, fastlora.Spectral(), name="b")
        assert twin[0].fastlora.svd_u.shape == (9, 9)
        fastlora.remove(twin, "a")
        assert twin[0].fastlora.svd_u is not None
        fastlora.remove(twin, "b")
        assert twin[0].fastlora.svd_u is None  # the LoRA does not need them
        twin(torch.randn(2, 14))


def test_signs_and_order_of_the_decomposition_do_not_matter(monkeypatch) -> None:
    layer, x = nn.Linear(14, 9), torch.randn(3, 14)
    fastlora.inject(layer, fastlora.Spectral())
    shifted(layer, size=2.0)
    y = layer(x).detach()
    f, order = layer.fastlora, torch.randperm(9)
    signs = torch.randint(0, 2, (9,)) * 2.0 - 1
    f.svd_u, f.svd_vh = (f.svd_u * signs)[:, order], (signs[:, None] * f.svd_vh)[order]
    f.svd_s = f.svd_s[order]
    with torch.no_grad():
        layer.fastlora["default"].shift.copy_(layer.fastlora["default"].shift[order])
    torch.testing.assert_close(layer(x).detach(), y, rtol=1e-5, atol=1e-5)


# --- weights that are hard to decompose -------------------------------------------------------


def test_nan_is_found_before_anything_is_decomposed(no_svd) -> None:
    no_svd()
    for bad in (torch.nan, torch.inf):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with torch.no_grad():
            model[1].weight[0, 0] = bad
        before = snapshot(model)
        with pytest.raises(
            fastlora.AdapterError,
            match="decompose: 1: its weight has no decomposition: it has NaN or infinite values",
        ):
            fastlora.decompose(model, cache=None)
        assert_unchanged(model, before)


def test_zero_and_rank_deficient_weights(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.copy_(torch.randn(5, 1) @ torch.randn(1, 6))
        model[2].weight.mul_(1e30)
    for energy in (None, 0.5):
        report = fastlora.decompose(model, energy=energy, cache=tmp_path)
        assert report.rows[0].error == 0.0
        assert [row.shifts for row in report.rows[:2]] == ([5, 5] if energy is None else [1, 1])
        assert fastlora.decompose(copy.deepcopy(model), energy=energy, cache=tmp_path).hits == 3
    fastlora.decompose(model, cache=tmp_path)
    plain, x = copy.deepcopy(model), torch.randn(3, 6)
    fastlora.inject(model, fastlora.Spectral())
    for ours, theirs in zip(model, plain, strict=True):
        assert same_bits(ours(x).detach(), theirs(x).detach())
        assert (ours.fastlora.svd_s >= 0).all()


def test_empty_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.append(nn.Embedding(0, 4))
    assert [row.path for row in fastlora.decompose(model, cache=None).rows] == ["0"]
    with pytest.raises(fastlora.AdapterError, match=r"1 \(Embedding\): its weight is empty"):
        fastlora.decompose(model, where=["1"], cache=None)


def test_what_fails_in_float32_is_tried_in_float64(monkeypatch) -> None:
    layer = nn.Linear(6, 5)
    exact = torch.linalg.svdvals(layer.weight.detach().double())
    monkeypatch.setattr(torch.linalg, "svd", failing_svd(torch.float32))
    fastlora.inject(layer, fastlora.Spectral())
    assert layer.fastlora.svd_s.dtype == torch.float32
    torch.testing.assert_close(layer.fastlora.svd_s.double(), exact, rtol=1e-6, atol=0)
    monkeypatch.undo()
    monkeypatch.setattr(torch.linalg, "svd", failing_svd(torch.float32, torch.float64))
    for model in (nn.ModuleDict({"a": nn.Linear(6, 5)}), nn.ModuleDict({"a": nn.Linear(4, 4)})):
        with pytest.raises(fastlora.AdapterError, match="decompose: a: .* did not converge"):
            fastlora.decompose(model, cache=None)


def test_an_error_in_a_thread_ends_all(monkeypatch) -> None:
    monkeypatch.setattr(factorising, "SMALL", 0)
    torch.set_num_threads(2)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    monkeypatch.setattr(torch.linalg, "svd", failing_svd(torch.float32, torch.float64))
    with pytest.raises(fastlora.AdapterError, match=r"inject: \d: .* did not converge"):
        fastlora.inject(model, fastlora.Spectral())
    assert torch.get_num_threads() == 2 and type(model[0]) is nn.Linear


# --- arguments and the report -----------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": torch.float16}, "dtype: expected torch.float32 or torch.float64"),
    "rank": ({"rank": 0}, "rank: expected an integer >= 1, got 0"),
    "rank bool": ({"rank": True}, "rank: expected an integer >= 1, got True"),
    "rank by path": ({"rank": {"0": 0}}, "rank: expected an integer >= 1, got 0"),
    "energy": ({"energy": 1.5}, r"energy: expected a value in \(0, 1\], got 1.5"),
    "nan": ({"energy": math.nan}, "energy: expected a value"),
    "both": ({"rank": 1, "energy": 0.5}, "expected one of them, got both"),
    "both by path": ({"rank": {"0": 1}, "energy": 0.5}, "expected one of them, got both"),
    "cache": ({"cache": 3}, "cache: expected True, False, None or a folder, got 3"),
    "device": ({"device": "nowhere"}, "device: expected one that is there, got 'nowhere'"),
    "no device": ({"device": 1.5}, "device: expected one that is there, got 1.5"),
    "missing device": ({"device": "cuda:99"}, "device: expected one that is there, got 'cuda:99'"),
    "meta": ({"device": "meta"}, "device: expected one that computes, got 'meta'"),
    "where": ({"where": "x"}, "decompose: where: 'x' matches no layer"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before = snapshot(model)
    with pytest.raises(fastlora.AdapterError, match=f"decompose: .*{message.split(': ')[-1]}"):
        fastlora.decompose(model, **arguments)
    assert_unchanged(model, before)


def test_a_meta_model_has_nothing_to_decompose() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(fastlora.AdapterError, match="decompose: embedding: .* meta device"):
        fastlora.decompose(model)


def test_the_report_is_a_table(capsys) -> None:
    model = nn.Sequential(nn.Linear(14, 9), nn.Linear(14, 9), nn.LayerNorm(9))
    model[1].load_state_dict(model[0].state_dict())
    lines = str(fastlora.decompose(model, rank=4, cache=None)).splitlines()
    assert lines[0].split() == ["layer", "matrix", "shifts", "error", "seconds"]
    assert lines[1].split()[:7] == ["0", "9", "x", "14", "4", "of", "9"]
    assert lines[1].endswith("computed") and lines[2].endswith("shared")
    assert lines[3].startswith("2 layers, 8 shifts, error ") and "1 not computed" in lines[3]
    assert len({len(line.rsplit(" ", 1)[0].rstrip()) for line in lines[1:3]}) == 1
    norms = fastlora.decompose(nn.Sequential(nn.Linear(2, 2)), where="0", cache=None)
    assert "1 layers, 2 shifts" in str(norms)
    assert capsys.readouterr() == ("", "")  # a bar is for what takes a second
