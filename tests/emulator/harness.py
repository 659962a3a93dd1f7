"""Compiles tests/emulator/kernels.cu, for the emulator or for a GPU, and runs its kernels."""

import ctypes
import os
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests/emulator/kernels.cu"
PARTS = [ROOT / f"csrc/emulator/{name}.cpp" for name in ("fibre", "memory", "block", "call")]


class Role(IntEnum):
    """As in csrc/emulator/call.h."""

    IN = 0
    OUT = 1
    BOTH = 2
    SCRATCH = 3


class KernelFault(RuntimeError):
    pass


def run(*command: object) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


OPTIONS = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
OPTIONS += ["-DFASTLORA_EMULATED", f"-I{ROOT / 'csrc/emulator/include'}", f"-I{ROOT / 'csrc'}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


def compiler() -> str:
    return os.environ.get("CXX") or shutil.which("c++") or "g++"


def compile_emulated(folder: Path) -> "Kernels":
    library = folder / "kernels.so"
    parts = ["-x", "c++", SOURCE, *PARTS]
    run(compiler(), *OPTIONS, "-fPIC", "-shared", *parts, "-o", library)
    return Kernels(library)


def compile_program(program: Path, sources: list[Path] | None, *flags: str) -> Path:
    """A program from the sources, by default from the kernels, the emulator and main.cpp."""
    parts = [SOURCE, *PARTS, SOURCE.with_name("main.cpp")] if sources is None else sources
    run(compiler(), *OPTIONS, *flags, "-x", "c++", *parts, "-o", program)
    return program


def compile_for_gpu(folder: Path, nvcc: str, architecture: str) -> "Kernels":
    library = folder / "kernels_gpu.so"
    options = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch={architecture}"]
    run(nvcc, *options, f"-I{ROOT / 'csrc'}", "-Xcompiler=-fPIC", "-shared", SOURCE, "-o", library)
    return Kernels(library)


class Kernels:
    """The kernels of one library by name."""

    def __init__(self, library: Path) -> None:
        self._run = ctypes.CDLL(str(library)).run_kernel
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.POINTER(ctypes.c_int64),
            ctypes.POINTER(ctypes.c_int32),
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_uint64,
        ]

    def __call__(
        self, name: str, *arrays: tuple[Tensor, Role], runs: int = 4, seed: int = 0
    ) -> None:
        """Runs a kernel on contiguous CPU tensors, in place. Raises KernelFault."""
        count = len(arrays)
        tensors, roles = [t for t, _ in arrays], [int(r) for _, r in arrays]
        assert all(t.is_contiguous() and t.device.type == "cpu" for t in tensors)
        error = self._run(
            name.encode(),
            (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors)),
            (ctypes.c_int64 * count)(*(t.numel() for t in tensors)),
            (ctypes.c_int32 * count)(*(t.element_size() for t in tensors)),
            (ctypes.c_int32 * count)(*roles),
            count,
            runs,
            seed,
        )
        if error is not None:
            raise KernelFault(error.decode())


def ints(n: int, seed: int = 0, high: int = 1000) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, (n,), generator=generator, dtype=torch.int32)


def floats(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))
