"""Compiles every CUDA kernel for every GPU generation and holds the compiler's report against
csrc/budgets.json.

    python tools/cuda_check.py [ARCHITECTURE ...]       default: 80 86 89 90a 100 120

No spills, no stack frame, registers and shared memory (bytes) within the kernel's budget, no wgmma
that waits for the one before it.
Generations that the toolkit does not know are left out and named. Standard library only.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
BUDGETS = ROOT / "csrc" / "budgets.json"
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")  # 100 and 120 run the kernels of 80
OPTIONS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v"]
OPTIONS += ["-Xcompiler=-Wall", "-Werror=all-warnings"]


@dataclass(frozen=True)
class Use:
    """What one instantiation of a kernel needs."""

    kernel: str  # its name without namespace and template arguments
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    named = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next(filter(None, map(shutil.which, filter(None, named))), None)


def known(nvcc: str) -> set[str]:
    """The architectures that a toolkit compiles for, without suffix."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return set(re.findall(r"compute_(\d+)", listed))


def kernel_name(mangled: str) -> str:
    """`lora_linear_kernel` of `_ZN8fastlora...18lora_linear_kernelI6__halfLi64EEvv`."""
    # Digits of the file's hash, which depends on its path, may read as a length as well: the
    # shortest such name is the kernel's.
    found = re.findall(r"(?=(\d+)([A-Za-z_]\w*))", mangled)
    names = [rest[: int(length)] for length, rest in found]
    return min((n for n in names if n.endswith("_kernel")), key=len, default=mangled)


def parse(report: str, architecture: str) -> list[Use]:
    """What `ptxas -v` says of every kernel."""
    entry = re.compile(
        r"Compiling entry function '(\S+)' for .*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    uses = []
    for mangled, stack, stores, loads, registers, rest in entry.findall(report):
        shared = re.search(r"(\d+) bytes smem", rest)
        uses.append(
            Use(
                kernel_name(mangled),
                architecture,
                int(registers),
                int(shared[1]) if shared else 0,
                int(stack),
                int(stores) + int(loads),
            )
        )
    return uses


def compiled(nvcc: str, source: Path, architecture: str) -> list[Use]:
    """Compiles one file. Raises RuntimeError with the compiler's words where it fails or warns."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-c", str(source), "-o", f"{folder}/kernel.o", *OPTIONS]
        done = subprocess.run(
            [*command, f"-arch=sm_{architecture}"], capture_output=True, text=True
        )
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} for sm_{architecture}:\n{done.stdout}{done.stderr}")
    if slow := re.findall(r".*wgmma\S* instructions are serialized.*", done.stderr):
        raise RuntimeError(f"{source.name} for sm_{architecture}: " + "\n".join(slow))
    uses = parse(done.stderr, architecture)
    if not uses:
        raise RuntimeError(f"{source.name} for sm_{architecture}: the compiler reports no kernel")
    return uses


def violations(uses: Sequence[Use], budgets: dict[str, dict[str, int]]) -> list[str]:
    """What breaks a rule, in words."""
    found = []
    for use in uses:
        where = f"{use.kernel} on sm_{use.architecture}"
        budget = budgets.get(use.kernel)
        if budget is None:
            found.append(f"{where}: csrc/budgets.json has no budget for it")
            continue
        for what, got, allowed in (
            ("registers", use.registers, budget["registers"]),
            ("bytes of shared memory", use.shared, budget["shared"]),
            ("bytes of stack", use.stack, 0),
            ("bytes spilled", use.spilled, 0),
        ):
            if got > allowed:
                found.append(f"{where}: {got} {what}, {allowed} are allowed")
    for name in sorted(set(budgets) - {use.kernel for use in uses}):
        found.append(f"{name}: there is a budget, but no such kernel")
    return found


def table(uses: Sequence[Use], budgets: dict[str, dict[str, int]]) -> str:
    """The largest use of each kernel's instantiations, by architecture."""
    names = sorted({use.kernel for use in uses})
    architectures = list(dict.fromkeys(use.architecture for use in uses))
    lines = [f"{'registers, shared bytes':<24}{'budget':>14}"]
    lines[0] += "".join(f"{'sm_' + a:>14}" for a in architectures)
    for name in names:
        budget = budgets.get(name, {"registers": 0, "shared": 0})
        line = f"{name:<24}{budget['registers']:>6}, {budget['shared']:>6}"
        for architecture in architectures:
            mine = [u for u in uses if (u.kernel, u.architecture) == (name, architecture)]
            line += f"{max(u.registers for u in mine):>6}, {max(u.shared for u in mine):>6}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: no nvcc; install the CUDA toolkit or set CUDA_HOME", file=sys.stderr)
        return 2
    wanted = [a.removeprefix("sm_") for a in arguments] or list(ARCHITECTURES)
    there = known(nvcc)
    jobs = [(s, a) for a in wanted if a.rstrip("af") in there for s in SOURCES]
    if not jobs:
        print(f"cuda-check: {nvcc} knows none of {', '.join(wanted)}", file=sys.stderr)
        return 2
    budgets = json.loads(BUDGETS.read_text())
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(lambda job: compiled(nvcc, *job), jobs))
    except RuntimeError as error:
        print(f"cuda-check: {error}", file=sys.stderr)
        return 1
    uses = [use for result in results for use in result]
    print(table(uses, budgets))
    for architecture in wanted:
        if architecture.rstrip("af") not in there:
            print(f"sm_{architecture}: not compiled, {nvcc} does not know it")
    for extension in sorted((ROOT / "fastlora").glob("_*.so")):
        print(f"{extension.name}: {extension.stat().st_size / 1e6:.1f} MB")
    broken = violations(uses, budgets)
    for line in dict.fromkeys(broken):
        print(f"cuda-check: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
