"""The benchmarks of commands about files do what their names say, and see what memory jobs take."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_files, memory
from fastlora.formats import detect
from fastlora.formats.changes import LowRank


def test_the_file_to_inspect_is_of_a_gigabyte():
    layers = bench_files.modules(bench_files.DOUBLE, bench_files.SINGLE)
    size = sum(2 * bench_files.RANK * (inputs + outputs) for inputs, outputs in layers.values())
    assert 1.0e9 < size < 1.05e9


def test_the_file_to_inspect_is_a_lora_of_flux(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_files, "RANK", 2)
    layers, path = bench_files.modules(1, 1), tmp_path / "a.safetensors"
    assert bench_files.adapter(path, layers) == path.stat().st_size
    file = detect.read(path)
    assert file.format == "diffusers" and not file.unused
    assert {(t.component, t.path) for t in file.changes} == {("transformer", n) for n in layers}
    for target, change in file.changes.items():
        assert isinstance(change.weight, LowRank) and change.weight.rank == 2
        assert (change.weight.down.shape[1], change.weight.up.shape[0]) == layers[target.path]
    bench_files.command("inspect", path)()  # the exit code is 0


def test_its_layers_are_those_of_flux():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name
    }
    assert bench_files.modules(1, 1) == linears


def test_layers_to_extract_are_those_of_sd15():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    for name, shape in bench_files.WEIGHTS.items():
        assert tuple(unet.get_submodule(name).weight.shape) == shape


def test_both_extract_from_the_same_differences(tmp_path, monkeypatch):
    """What is written is the floor's decomposition, cut off."""
    sizes = {"mid_block.attentions.0.proj_in": (20, 12), "mid_block.resnets.0.conv1": (8, 6, 3, 3)}
    monkeypatch.setattr(bench_files, "WEIGHTS", sizes)
    jobs = bench_files.extraction(tmp_path, rank=4)
    decompositions: Any = jobs["floor"]()
    jobs["fastlora"]()
    changes = {t.path: c for t, c in detect.read(tmp_path / "lora.safetensors").changes.items()}
    assert changes.keys() == sizes.keys()
    for (path, shape), (u, s, vh) in zip(sizes.items(), decompositions, strict=True):
        best = (u[:, :4] * s[:4] @ vh[:4]).view(shape)
        error = torch.dist(changes[path].delta(shape, torch.float32), best)
        assert error < 2 * torch.finfo(torch.float16).eps * best.norm()  # two factors, rounded
    jobs["fastlora"]()  # once more, over the file of before


def test_a_command_that_fails_is_not_timed(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="inspect: expected exit code 0, got 2"):
        bench_files.command("inspect", tmp_path / "missing.safetensors")()
    assert "no such file" in capsys.readouterr().err


def test_reading_once_reads_all(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_files, "PIECE", 64)
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    assert bench_files.read_once(path) == 1000


def test_without_room_it_skips(monkeypatch):
    free = shutil.disk_usage(".")._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(pytest.skip.Exception, match="needs 3 GB in .*, got 1.0"):
        bench_files.inspections()


def jobs(*sizes: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Jobs that fill memory and leave it again."""
    names = ["floor", *map(str, range(1, len(sizes)))]
    return {n: (lambda s=s: torch.ones(s, dtype=torch.uint8), memory.nothing)
            for n, s in zip(names, sizes, strict=True)}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the largest resident set")
def test_peaks():
    if memory.reset_peak() is None:
        pytest.skip("this system does not tell the largest resident set")
    large, small = 2**28, 2**24
    found = memory.in_turns(jobs(large, small), rounds=3)
    assert found["floor"].info["peak_bytes"] == pytest.approx(large, rel=0.05)
    assert found["1"].info["peak_bytes"] == pytest.approx(small, rel=0.25)  # not the large one's
    assert [len(turns.times) for turns in found.values()] == [3, 3]
    assert found["floor"].info["over_floor"] == 1.0


def test_no_peak_where_the_system_tells_none(tmp_path: Path, monkeypatch):
    """A peak that could not be reset is that of the whole process: it would look like nothing."""
    monkeypatch.setattr(memory, "REFERENCES", tmp_path / "missing" / "clear_refs")
    assert memory.in_turns(jobs(2**20), rounds=2)["floor"].info["peak_bytes"] is None
    monkeypatch.undo()
    monkeypatch.setattr(memory, "STATUS", tmp_path / "missing")
    assert memory.in_turns(jobs(2**20), rounds=2)["floor"].info["peak_bytes"] is None


def test_what_undoes_a_job_follows_it():
    """Once a round, in turns, the first round included."""
    calls: list[str] = []
    pairs = {n: (lambda n=n: calls.append(n), lambda n=n: calls.append(f"-{n}"))
             for n in ("floor", "other")}  # fmt: skip
    memory.in_turns(pairs, rounds=2)
    assert calls == ["floor", "-floor", "other", "-other"] * 3
