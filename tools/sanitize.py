"""Runs the operators' tests in a build under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tools/sanitize.py [pytest's arguments]

Both extensions, CPU loops and emulated CUDA kernels, are built into build/sanitize with
-DFASTLORA_SANITIZE=ON; the Python files are those of the checkout. Python itself is not built that
way, so the sanitizers' libraries are loaded before it; leaks are not looked for, since Python and
PyTorch keep much until they end.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
PACKAGE = BUILD / "package" / "fastlora"
# The default: what runs kernels and loops, without what a sanitized Python makes slow (compiling).
TESTS = ["tests/ops", "tests/test_verify.py", "-k", "not compile and not opcheck and not bench"]


def build() -> None:
    """Builds the extensions, and a package of them and links to the Python files."""
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "fastlora").iterdir():
        link = PACKAGE / path.name
        if path.suffix != ".so" and path.name != "__pycache__" and not link.exists():
            link.symlink_to(path)
    pybind11 = subprocess.check_output(
        [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
    ).strip()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    configure = [
        "cmake",
        f"-S{ROOT}",
        f"-B{BUILD}",
        "-GNinja",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={PACKAGE}",
        "-DFASTLORA_CUDA=off",
        "-DFASTLORA_SANITIZE=ON",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",  # pybind11 strips a release of its lines
        "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g",
    ]
    for command in (configure, ["cmake", "--build", str(BUILD), "--target", "_C", "_emulator"]):
        subprocess.run(command, env=environment, check=True)


def runtime(name: str) -> str:
    """The compiler's own copy of a library."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    found = subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
    if not Path(found).is_absolute():
        sys.exit(f"sanitize: {compiler} has no {name}; install its sanitizers, or set CXX=g++")
    return found


def main(arguments: list[str]) -> int:
    libraries = [runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    build()
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-o", f"pythonpath={PACKAGE.parent} {ROOT}", *(arguments or TESTS)]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
