"""The cache of decompositions: found again, never trusted, and never in the way."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora.adapters import factor_cache
from fastlora.adapters.decomposition import Settings
from fastlora.adapters.factor_cache import FactorCache, digest, obtain
from fastlora.formats import files
from tests.adapters.nets import Net
from tests.adapters.oracles import same_bits


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """The user's cache folder of this test."""
    monkeypatch.delenv("FASTLORA_FACTORS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastlora" / "factors"


@pytest.fixture
def no_svd(monkeypatch) -> Any:
    def forbid() -> None:
        def svd(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a decomposition")

        monkeypatch.setattr(torch.linalg, "svd", svd)

    return forbid


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def sources(report: Any) -> list[str]:
    return [row.source for row in report.rows]


def factors(layer: nn.Module) -> list[torch.Tensor]:
    """What the layer holds, after `inject`."""
    return list(layer.fastlora.buffers())


def test_the_second_start_decomposes_nothing(folder: Path, no_svd) -> None:
    model, other, third = (copy.deepcopy(m) for m in [Net()] * 3)
    report = fastlora.decompose(model)
    assert report.folder == str(folder) and len(entries(folder)) == 5
    assert sorted(folder.iterdir()) == entries(folder)
    no_svd()
    again = fastlora.decompose(other)
    assert sources(again) == ["cache"] * 5 and again.hits == 5
    assert [r.error for r in again.rows] == [r.error for r in report.rows]
    for m in (model, other, third):  # the third has never heard of `decompose`
        fastlora.inject(m, fastlora.Spectral())
    for path in ("embedding", "conv", "inner.2"):
        first, *rest = (factors(m.get_submodule(path)) for m in (model, other, third))
        for found in rest:
            assert all(same_bits(a, b) for a, b in zip(first, found, strict=True))
    # and load_state_dict on an adapted layer
    fresh = Net()
    third.load_state_dict(third.state_dict())
    with pytest.raises(AssertionError, match="a decomposition"):
        third.load_state_dict(fresh.state_dict(), strict=False)


def test_inject_and_load_state_dict_write_nothing(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    fastlora.inject(model, fastlora.Spectral())
    model.load_state_dict({"0.weight": torch.randn(4, 4), "0.bias": torch.zeros(4)})
    assert not folder.exists()


def test_load_state_dict_of_a_base_that_is_in_the_cache(folder: Path, no_svd) -> None:
    model, other = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 4))
    fastlora.decompose(other)
    fastlora.inject(model, fastlora.Spectral())
    no_svd()
    model.load_state_dict(other.state_dict())
    fastlora.inject(other, fastlora.Spectral())
    assert all(map(same_bits, factors(model[0]), factors(other[0])))


def test_where_the_cache_is(tmp_path: Path, folder: Path, monkeypatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    monkeypatch.chdir(tmp_path)
    for none in (None, False, ""):
        assert fastlora.decompose(model, cache=none).folder == ""
    monkeypatch.setenv("FASTLORA_FACTORS", "")
    assert fastlora.decompose(model, cache=True).folder == ""
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("FASTLORA_FACTORS", str(tmp_path / "a" / "b"))
    report = fastlora.decompose(copy.deepcopy(model))  # the layer has them, the folder has not
    assert report.folder == str(tmp_path / "a" / "b") and sources(report) == ["layer"]
    fastlora.decompose(copy.deepcopy(model), cache=str(tmp_path / "c"))
    fastlora.decompose(copy.deepcopy(model), cache=tmp_path / "d")
    for name in ("a/b", "c", "d"):
        assert len(entries(tmp_path / name)) == 1
    monkeypatch.delenv("FASTLORA_FACTORS")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    report = fastlora.decompose(copy.deepcopy(model))
    assert report.folder == str(tmp_path / "home" / ".cache" / "fastlora" / "factors")


def test_equal_weights_share_an_entry_and_other_ones_do_not(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(6, 4, 1), nn.Linear(6, 4), nn.Linear(4, 6))
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight[:, :, None, None])
        model[3].weight.copy_(model[0].weight.view(4, 6).reshape(6, 4))  # the bytes, not the shape
    assert sources(fastlora.decompose(model)) == ["computed", "shared", "computed", "computed"]
    assert len(entries(folder)) == 3
    for kwargs in ({"dtype": torch.float64}, {"rank": 2}, {"rank": 3}, {"energy": 0.5}):
        fastlora.decompose(copy.deepcopy(model)[:1], **kwargs)
    assert len(entries(folder)) == 7
    fastlora.decompose(copy.deepcopy(model).bfloat16()[:1])
    assert len(entries(folder)) == 8
    # what comes to the same is the same, and what was only on the layer is written now
    double = copy.deepcopy(model).double()[:1]
    fastlora.decompose(double)
    twin = copy.deepcopy(double)
    assert sources(fastlora.decompose(twin, dtype=torch.float64, rank=9)) == ["layer"]


def test_entries_are_mapped_into_memory(folder: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("no list of what is mapped")
    model = nn.Sequential(nn.Linear(300, 200))
    twin = copy.deepcopy(model)
    fastlora.decompose(model)
    assert sources(fastlora.decompose(twin)) == ["cache"]
    assert entries(folder)[0].name in Path("/proc/self/maps").read_text()


# --- entries that are not right ---------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for i in range(len(content) - 64, len(content)):
        content[i] ^= 0x55
    path.write_bytes(content)


def rewrite(path: Path, change: Any) -> None:
    tensors, metadata = files.read(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Any] = {
    "truncated": truncated,
    "flipped": flipped,
    "empty": lambda p: p.write_bytes(b""),
    "garbage": lambda p: p.write_bytes(b"\x80" * 500),
    "foreign": lambda p: save_file({"u": torch.ones(3)}, p),
    "other version": lambda p: rewrite(p, lambda t, m: m.update(version="1")),
    "no error": lambda p: rewrite(p, lambda t, m: m.pop("error")),
    "bad error": lambda p: rewrite(p, lambda t, m: m.update(error="2")),
    "no v": lambda p: rewrite(p, lambda t, m: t.pop("vh")),
    "rank": lambda p: rewrite(p, lambda t, m: t.update(u=t["u"][:, :2].contiguous())),
    "all ranks": lambda p: rewrite(
        p, lambda t, m: t.update(u=t["u"][:, :2].clone(), s=t["s"][:2], vh=t["vh"][:2])
    ),
    "dtype": lambda p: rewrite(p, lambda t, m: t.update(u=t["u"].half())),
    "scalar": lambda p: rewrite(p, lambda t, m: t.update(s=torch.tensor(1.0))),
    "order": lambda p: rewrite(p, lambda t, m: t.update(s=t["s"].flip(0))),
    "negative": lambda p: rewrite(p, lambda t, m: t.update(s=t["s"] - 9)),
    "another weight's": lambda p: rewrite(p, lambda t, m: t.update(vh=t["vh"].flip(1))),
    "zeros": lambda p: rewrite(p, lambda t, m: t["u"][1].zero_()),
}  # fmt: skip


def test_no_flipped_bit_gets_through(tmp_path: Path) -> None:
    """Wherever it is, in the header or in a number's last place."""
    matrix, settings = torch.randn(20, 12), Settings()
    cache = FactorCache(tmp_path, writes=True)
    made, _ = obtain(matrix, settings, cache, torch.device("cpu"))
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    bits = torch.randperm(8 * len(whole), generator=torch.Generator().manual_seed(0))[:400].tolist()
    in_header = 8 * (8 + int.from_bytes(whole[:8], "little"))
    assert sum(bit < in_header for bit in bits) > 20
    for bit in bits:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert cache.read(digest(matrix), settings, matrix) is None, f"bit {bit}"
    assert len(cache.problems) == len(bits)
    path.write_bytes(whole)
    found = cache.read(digest(matrix), settings, matrix)
    assert found is not None and all(map(same_bits, found[:3], made[:3]))


def test_directions_that_the_weight_does_not_see_are_checked_too(folder: Path) -> None:
    """Beside singular values of 0 any U and V give the same product."""
    model = nn.Sequential(nn.Linear(12, 20))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(20, 5) @ torch.randn(5, 12))
    twin = copy.deepcopy(model)
    fastlora.decompose(model)

    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors["vh"][5:] = 37 * torch.randn(7, 12)
        tensors["u"][:, 5:] = 0

    rewrite(entries(folder)[0], change)
    with pytest.warns(RuntimeWarning, match="is ignored: it is damaged"):
        assert sources(fastlora.decompose(twin)) == ["computed"]


def test_an_entry_under_another_name_is_ignored(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    twin = copy.deepcopy(model)
    fastlora.decompose(model)
    first, second = entries(folder)
    second.write_bytes(first.read_bytes())
    with pytest.warns(RuntimeWarning, match=f"{second.name} is ignored: it is damaged"):
        assert sorted(sources(fastlora.decompose(twin))) == ["cache", "computed"]


STRIDED = {
    "a column": torch.randn(8, 1),
    "a row seen as a column": torch.randn(1, 8).t(),
    "one number": torch.randn(9).as_strided((1, 1), (5, 7)),
    "transposed": torch.randn(4, 6).t(),
}


@pytest.mark.parametrize("weight", STRIDED.values(), ids=STRIDED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_any_strides_have_the_hash_of_their_values(weight, dtype) -> None:
    odd = weight.to(dtype)  # which keeps strides
    plain = torch.tensor(odd.float().tolist()).to(dtype)
    assert digest(odd) == digest(plain)
    assert digest(odd) != digest(plain.flatten()) and digest(odd) != digest(plain + 1)
    layer = nn.Linear(odd.shape[1], odd.shape[0], dtype=dtype)
    layer.weight = nn.Parameter(odd)
    assert sources(fastlora.decompose(layer, cache=None)) == ["computed"]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_damaged_entry_is_ignored_and_written_again(folder, damage: Any, dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 4)).to(dtype)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    fastlora.decompose(model)
    (path,) = entries(folder)
    damage(path)
    with pytest.warns(RuntimeWarning, match=f"{path.name} is ignored: "):
        assert sources(fastlora.decompose(twin)) == ["computed"]
    assert sources(fastlora.decompose(third)) == ["cache"]
    for m in (model, twin, third):
        fastlora.inject(m, fastlora.Spectral())
    for other in (twin, third):
        assert all(map(same_bits, factors(model[0]), factors(other[0])))


def test_a_directory_in_an_entrys_place_is_left_alone(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    fastlora.decompose(model)
    (path,) = entries(folder)
    directory(path)
    twin = copy.deepcopy(model)
    del twin[0]._fastlora_factors
    with pytest.warns(RuntimeWarning) as caught:
        assert sources(fastlora.decompose(twin)) == ["computed"]
    assert ["is ignored" in str(w.message) for w in caught] == [True, False]
    assert "are not kept" in str(caught[1].message) and path.is_dir()


def test_inject_warns_too_and_leaves_the_entry(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    twin = copy.deepcopy(model)
    fastlora.decompose(model)
    truncated(entries(folder)[0])
    size = entries(folder)[0].stat().st_size
    with pytest.warns(RuntimeWarning, match="is ignored"):
        fastlora.inject(twin, fastlora.Spectral())
    assert entries(folder)[0].stat().st_size == size


# --- folders that cannot be written, and several processes ------------------------------------


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = Net()
    with pytest.warns(RuntimeWarning, match="factors are not kept: .*file") as caught:
        report = fastlora.decompose(model, cache=tmp_path / "file" / "cache")
    assert len(caught) == 1 and sources(report) == ["computed"] * 5
    fastlora.inject(model, fastlora.Spectral())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_read(folder: Path) -> None:
    model, more = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(6, 4))
    twin = copy.deepcopy(model)
    fastlora.decompose(model)
    folder.chmod(0o555)
    try:
        assert sources(fastlora.decompose(twin)) == ["cache"]
        with pytest.warns(RuntimeWarning, match="factors are not kept: .*Permission"):
            fastlora.decompose(more)
    finally:
        folder.chmod(0o755)


def test_a_full_disk_is_a_warning_and_leaves_nothing(folder: Path, monkeypatch) -> None:
    def full(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    model = Net()
    with pytest.warns(RuntimeWarning, match="not kept: .*No space left") as caught:
        assert sources(fastlora.decompose(model)) == ["computed"] * 5
    assert len(caught) == 1 and list(folder.iterdir()) == []


KILLED = """
import os, signal, sys, torch
from torch import nn
import fastlora
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(20 + i, 20) for i in range(4)))
replace, calls = os.replace, []
def dying(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
if sys.argv[2] == "die":
    os.replace = dying
print(*(row.source for row in fastlora.decompose(model, cache=sys.argv[1]).rows))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_whole_entries(tmp_path: Path) -> None:
    def run(what: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path), what]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("die").returncode == -signal.SIGKILL
    assert len(entries(tmp_path)) == 2
    (left,) = set(tmp_path.iterdir()) - set(entries(tmp_path))  # what it was writing
    for path in entries(tmp_path):
        assert set(load_file(path)) == {"u", "s", "vh"}
    answer = run("live")
    assert sorted(answer.stdout.split()) == ["cache"] * 2 + ["computed"] * 2, answer.stderr
    assert len(entries(tmp_path)) == 4 and left.exists()  # it may be another process's
    old = time.time() - 2 * factor_cache.STALE
    os.utime(left, (old, old))
    assert run("live").stdout.split() == ["cache"] * 4
    assert left.exists()  # nothing was written, so nobody has looked
    entries(tmp_path)[0].unlink()
    run("live")
    assert sorted(tmp_path.iterdir()) == entries(tmp_path) and len(entries(tmp_path)) == 4


def test_several_writers_at_once(tmp_path: Path) -> None:
    models = [copy.deepcopy(m) for m in [Net()] * 4]
    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(lambda m: fastlora.decompose(m, cache=tmp_path), models))
    assert all(len(report.rows) == 5 for report in reports)
    assert sorted(tmp_path.iterdir()) == entries(tmp_path) and len(entries(tmp_path)) == 5
    for path in entries(tmp_path):
        files.read(path)
    for model in models:
        fastlora.inject(model, fastlora.Spectral())
        assert all(map(same_bits, factors(model.conv), factors(models[0].conv)))
