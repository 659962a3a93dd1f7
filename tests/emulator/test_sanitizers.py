"""Under AddressSanitizer and UndefinedBehaviorSanitizer raw accesses stop where they are."""

import subprocess
from pathlib import Path

import pytest

from tests.emulator.harness import SANITIZERS, compile_program
from tests.emulator.test_faults import line_of

pytestmark = pytest.mark.emulated


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    try:
        compile_program(folder / "probe", [probe], *SANITIZERS)
        subprocess.run([folder / "probe"], check=True)
    except (AssertionError, OSError, subprocess.CalledProcessError):
        pytest.skip("this compiler has no sanitizers")
    return compile_program(folder / "kernels", None, *SANITIZERS)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["sum", "5:4:1", "640:4:0"],
        ["pipeline", "128:4:1", "3584:4:0"],
        ["named_barrier", "384:4:1", "384:4:0"],
        ["reverse", "96:4:1", "96:4:0"],
        ["load_4", "128:4:1", "128:4:0"],
        ["store_4t", "128:4:1", "128:4:0"],
        ["multiply_half", "128:4:2", "128:4:0", "64:4:0"],
        ["swizzled", "128:4:1", "1024:2:0", "512:2:0"],
        ["dependent", "128:4:1", "128:4:3", "128:4:0"],
    ],
    ids=lambda a: a[0],
)
def test_right_kernels_pass(program, arguments):
    done = run(program, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["beyond", "128:4:1", "128:4:0"], "if (threadIdx.x == 5) to[kThreads] = 1;"),
        (["reads_beyond", "128:4:1", "128:4:0"], "to[threadIdx.x] = from[threadIdx.x + 1];"),
        (["beyond_shared", "32:4:1"], "first[blockDim.x - 24] = 1;"),
    ],
    ids=["beyond", "reads_beyond", "beyond_shared"],
)
def test_raw_accesses_beyond_stop_where_they_are(program, arguments, line):
    done = run(program, *arguments)
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr
    assert f"kernels.cu:{line_of(line)}" in done.stderr


def test_faults_are_still_faults(program):
    """Abandoned fibres and exceptions on their stacks do not confuse AddressSanitizer."""
    for name, *arrays in (
        ["half_a_barrier", "128:4:1"],
        ["misaligned", "16:4:1", "16:4:0"],
        ["never_waits", "32:4:1", "8:4:0"],
    ):
        done = run(program, name, *arrays)
        assert done.returncode == 1 and done.stdout.startswith("emulator: "), done.stderr
