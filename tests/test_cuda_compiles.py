"""The CUDA sources compile within their budgets wherever there is an nvcc, GPU or not."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from tools import cuda_check
from tools.cuda_check import Use, find_nvcc

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = json.loads(cuda_check.BUDGETS.read_text())


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


@pytest.mark.parametrize("architecture", ["80", "90a"])  # `make cuda-check` compiles for all
@pytest.mark.parametrize("source", cuda_check.SOURCES, ids=lambda path: path.stem)
def test_compiles_within_its_budget(nvcc, source, architecture):
    uses = cuda_check.compiled(nvcc, source, architecture)
    kernels = {use.kernel for use in uses}
    budgets = {name: budget for name, budget in BUDGETS.items() if name in kernels}
    assert cuda_check.violations(uses, budgets) == []


def test_every_budget_has_a_kernel():
    sources = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.cu*"))
    assert [name for name in BUDGETS if f" {name}(" not in sources] == []


REPORT = """\
ptxas info    : Compiling entry function '_ZN8fastlora12_GLOBAL__N_111fold_kernelI6__halfLi64EEvT_' for 'sm_80'
ptxas info    : Function properties for _ZN8fastlora12_GLOBAL__N_111fold_kernelI6__halfLi64EEvT_
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 122 registers, used 1 barriers, 17408 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z11gate_kernelPf' for 'sm_80'
ptxas info    : Function properties for _Z11gate_kernelPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers
"""  # noqa: E501


def test_the_report_is_read():
    assert cuda_check.parse(REPORT, "80") == [
        Use("fold_kernel", "80", 122, 17408, 8, 16),
        Use("gate_kernel", "80", 26, 0, 0, 0),
    ]


def test_every_excess_is_a_violation():
    budgets = {"a_kernel": {"registers": 64, "shared": 100}}
    assert cuda_check.violations([Use("a_kernel", "80", 64, 100, 0, 0)], budgets) == []
    for use, word in (
        (Use("a_kernel", "80", 65, 100, 0, 0), "65 registers, 64 are allowed"),
        (Use("a_kernel", "80", 64, 101, 0, 0), "101 bytes of shared memory"),
        (Use("a_kernel", "80", 64, 100, 8, 0), "8 bytes of stack"),
        (Use("a_kernel", "80", 64, 100, 0, 4), "4 bytes spilled"),
    ):
        (said,) = cuda_check.violations([use], budgets)
        assert word in said and said.startswith("a_kernel on sm_80")
    assert "no budget" in cuda_check.violations([Use("b", "80", 1, 0, 0, 0)], {})[0]
    assert "no such kernel" in cuda_check.violations([], budgets)[0]


def test_every_source_is_in_the_build():
    definition = (ROOT / "CMakeLists.txt").read_text()
    definition += (ROOT / "csrc" / "emulator" / "CMakeLists.txt").read_text()
    folders = [ROOT / "csrc", ROOT / "csrc" / "cpu"]
    for source in [*cuda_check.SOURCES, *(s for f in folders for s in f.glob("*.cpp"))]:
        assert str(source.relative_to(ROOT)) in definition, f"{source.name} is never compiled"
    for source in (ROOT / "csrc" / "emulator").glob("*.cpp"):
        assert f"  {source.name}\n" in definition, f"{source.name} is never compiled"


def test_ptx_compiles_for_both_sides(nvcc, tmp_path):
    """Every wrapper of ptx.cuh, in the kernels that test the emulator."""
    source = ROOT / "tests" / "emulator" / "kernels.cu"
    for architecture in ("80", "90a"):
        command = [nvcc, "-c", source, "-o", tmp_path / "kernels.o", "-std=c++17", "-Werror"]
        command += ["all-warnings", "--expt-relaxed-constexpr", f"-arch=sm_{architecture}"]
        command += [f"-I{ROOT / 'csrc'}", "-diag-suppress=550"]  # a faulty kernel sets in vain
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def ptx_of(nvcc: str, source: str, kernel: str, folder: Path) -> list[str]:
    """The instructions of every instantiation of a kernel."""
    to = folder / "kernels.ptx"
    command = [nvcc, "-ptx", ROOT / "csrc" / source, "-o", to, "-std=c++17", "-O3"]
    command += ["--expt-relaxed-constexpr", "-arch=sm_90a"]
    done = subprocess.run([str(c) for c in command], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    entries = re.split(r"\n\.visible \.entry |\n\.entry |\n\.weak \.entry ", to.read_text())[1:]
    return [entry for entry in entries if kernel in entry.partition("(")[0]]


def test_folds_use_the_planned_instructions(nvcc, tmp_path):
    """Tensor cores and matrix loads; W by asynchronous copies, W' past the caches."""
    kernels = ptx_of(nvcc, "fold.cu", "rank_update_sm80_kernel", tmp_path)
    assert len(kernels) == 4  # two dtypes, few layers and many
    for entry in kernels:
        assert re.search(r"\.param .* \.b8 \S+\[(40|327)\d\d\]", entry)  # bytes of parameters
        for instruction in (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
            "cp.async.cg.shared.global",
            "cvt.rn.bf16x2.f32",
            "st.global.cs.v4.u32",
        ):
            assert instruction in entry, instruction


def test_products_use_the_planned_instructions(nvcc, tmp_path):
    """Tensor cores, matrix loads, asynchronous copies of 16 bytes, and the wait of sm_90."""
    products = ptx_of(nvcc, "lora_linear.cu", "gemm_kernel", tmp_path)
    assert len(products) == 14  # seven shapes, two dtypes
    for entry in products:
        name = entry.partition("(")[0]
        low, stages = "f16" if "6__half" in name else "bf16", int(name[name.index("EEEEE") - 1])
        for instruction in (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{low}.{low}.f32",
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
            "cp.async.cg.shared.global",
            f"cp.async.wait_group {stages - 2};",
            "griddepcontrol.wait",
            "griddepcontrol.launch_dependents",
            "prefetch.global.L2",  # y that is added to
        ):
            assert instruction in entry, instruction


@pytest.mark.parametrize(
    ("name", "transposed"), [("weight", 1), ("dots", 0)], ids=["weight", "dots"]
)
def test_spectral_kernels_use_the_instructions_of_warpgroups(nvcc, tmp_path, name, transposed):
    """U in registers and V as it lies in memory; G and V from memory; registers change hands."""
    kernels = ptx_of(nvcc, f"spectral_{name}.cu", f"spectral_{name}_sm90_kernel", tmp_path)
    assert len(kernels) == 4  # two dtypes, few layers and many
    for entry in kernels:
        low = "f16" if "6__half" in entry.partition("(")[0] else "bf16"
        assert f"wgmma.mma_async.sync.aligned.m64n256k16.f32.{low}.{low}" in entry
        tail = f"p, 1, 1, {transposed};" if name == "weight" else f"p, 1, 1, 0, {transposed};"
        for instruction in (
            tail,
            "wgmma.wait_group.sync.aligned 1;",
            "fence.proxy.async.shared::cta;",
            "setmaxnreg.inc.sync.aligned.u32",
            "cp.async.cg.shared.global",
            "cp.async.wait_group 1;",
        ):
            assert instruction in entry, instruction
