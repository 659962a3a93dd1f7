"""What is shipped: light imports, one version, complete archives, loops for any x86-64."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fastlora
from fastlora.ops._define import kernels

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "diffusers",
    "peft",
    "transformers",
    "accelerate",
    "matplotlib",
    "sklearn",
    "scipy",
    "PIL",
    "gradio",
    "torch._dynamo",
    "torch._inductor",
)


def modules_after(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(answer.stdout.split())


def test_import_is_light():
    added = modules_after("import fastlora") - modules_after("import torch")
    assert "fastlora" in added
    heavy = {m for m in added if any(m == h or m.startswith(h + ".") for h in HEAVY)}
    assert heavy == set()


def test_public_names_exist():
    assert [name for name in fastlora.__all__ if not hasattr(fastlora, name)] == []
    assert len(set(fastlora.__all__)) == len(fastlora.__all__)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, made of a copy of the tree and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    unwanted = shutil.ignore_patterns(
        ".*", "build", "dist", "out", "*.so", "__pycache__", "*.egg-info"
    )
    shutil.copytree(ROOT, folder / "tree", ignore=unwanted)
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=gztar"]
    subprocess.run(command, cwd=folder / "tree", check=True, capture_output=True)
    (archive,) = (folder / "tree" / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / f"fastlora-{fastlora.__version__}"


def files(folder: Path, pattern: str) -> set[str]:
    found = (p.relative_to(folder) for p in folder.rglob(pattern) if p.is_file())
    hidden = ("__pycache__", ".pytest_cache", ".ruff_cache")
    return {str(p) for p in found if not set(p.parts) & set(hidden) and p.suffix != ".so"}


@pytest.mark.parametrize("folder", ["csrc", "fastlora", "tests", "tools", "requirements"])
def test_sdist_has_all_of(sdist, folder):
    assert files(ROOT / folder, "*") - files(sdist / folder, "*") == set()


def test_one_version(sdist):
    """The archive's is the package's; nothing else in the tree states one."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastlora.__version__)
    assert f"\nVersion: {fastlora.__version__}\n" in (sdist / "PKG-INFO").read_text()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt"):
        assert fastlora.__version__ not in (ROOT / name).read_text()


def test_sdist_has_the_build_and_the_licence(sdist):
    needed = ["CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile"]
    assert [name for name in needed if not (sdist / name).is_file()] == []


def test_wheel_has_all_of_the_package(sdist, tmp_path):
    """What a wheel takes from the sdist: every module, the weights, py.typed."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=sdist, check=True, capture_output=True)
    assert files(ROOT / "fastlora", "*") - files(tmp_path / "fastlora", "*") == set()
    assert "py.typed" in files(tmp_path / "fastlora", "*")


# --- the binary -----------------------------------------------------------------------------------


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} (binutils) is not here")


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


EXTENSIONS = sorted(Path(kernels.__file__).parent.glob("_*.so"))
by_extension = pytest.mark.parametrize("extension", EXTENSIONS, ids=lambda p: p.name.split(".")[0])


def test_both_extensions_are_there():
    assert [p.name.split(".")[0] for p in EXTENSIONS] == ["_C", "_emulator"]


@by_extension
@needs("readelf")
def test_extension_links_neither_torch_nor_openmp_nor_cuda(extension):
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", extension))
    assert needed, "a dynamic object"
    foreign = [n for n in needed if re.search("torch|c10|gomp|omp|cuda|cublas", n)]
    assert foreign == []


# The newest that manylinux_2_28 lets a wheel ask for.
MANYLINUX = {"GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}


@by_extension
@needs("readelf")
def test_extension_runs_with_an_old_cpp_runtime(extension):
    if kernels.build_info()["compiler"].partition(" ")[0] != "GNU":
        pytest.skip("the C++ runtime is linked in by GCC only")
    versions = re.findall(r"Name: (GLIBCXX|CXXABI)_([\d.]+)", output("readelf", "-V", extension))
    newer = [v for v in versions if tuple(map(int, v[1].split("."))) > MANYLINUX[v[0]]]
    assert newer == []


@by_extension
def test_extension_is_small(extension):
    assert extension.stat().st_size < 30e6


def objects(isa: str) -> list[Path]:
    cache = f"cmake-{sys.implementation.cache_tag}"
    return sorted((ROOT / "build" / cache / "CMakeFiles" / f"cpu_{isa}.dir").rglob("*.o"))


@needs("nm")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_shared_symbol_leaves_the_vector_loops(isa):
    """A weak symbol (an inline function, a std:: template) would be merged by the linker with the
    baseline's, and the copy it keeps might need instructions that this machine does not have."""
    if not objects(isa):
        pytest.skip(f"no {isa} objects: not built here, or not x86-64")
    for path in objects(isa):
        lines = output("nm", "-C", path).splitlines()
        weak = [line for line in lines if re.search(r" [WVuvw] ", line)]
        assert [line for line in weak if "DW.ref." not in line] == [], path  # (that one is data)
        defined = [line.split(" ", 2)[2] for line in lines if re.search(r" [TDBR] ", line)]
        assert [name for name in defined if not name.startswith(f"fastlora::{isa}::")] == [], path


@needs("objdump")
def test_baseline_needs_no_avx():
    if not objects("avx2"):
        pytest.skip("not built here, or not x86-64")
    assert objects("baseline")
    registers = re.compile(r"%[yz]mm\d")
    for path in objects("baseline"):
        assert registers.search(output("objdump", "-d", path)) is None, path
    vectorised = [bool(registers.search(output("objdump", "-d", p))) for p in objects("avx2")]
    assert any(vectorised)
