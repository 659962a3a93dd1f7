"""The CUDA sources compile wherever there is an nvcc, whether or not there is a GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
# One architecture is enough to find errors; the build compiles for all of them.
ARCHITECTURE = "sm_80"


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    named = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next(filter(None, map(shutil.which, filter(None, named))), None)


@pytest.fixture(scope="module")
def nvcc() -> str:
    compiler = find_nvcc()
    if compiler is None:
        pytest.skip("no nvcc on this machine: the CUDA sources were not compiled")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)", version.stdout)
    if release is None or int(release[1]) < 12:
        pytest.skip(f"{compiler} is not CUDA 12 or newer: the CUDA sources were not compiled")
    return compiler


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings_and_spills(nvcc, source, tmp_path):
    command = [nvcc, "-c", str(source), "-o", str(tmp_path / "kernel.o"), "-std=c++17", "-O3"]
    command += [f"-arch={ARCHITECTURE}", "--expt-relaxed-constexpr", "-Xptxas=-v"]
    command += ["-Xcompiler=-Wall", "-Werror=all-warnings"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", result.stderr)
    assert frames, "the compiler reported no kernel"
    assert set(frames) == {("0", "0")}, result.stderr


def test_every_source_is_in_the_build():
    definition = (ROOT / "CMakeLists.txt").read_text()
    loops = (ROOT / "csrc" / "cpu").glob("*.cpp")
    for source in [*SOURCES, *loops, *(ROOT / "csrc").glob("*.cpp")]:
        assert str(source.relative_to(ROOT)) in definition, f"{source.name} is never compiled"
