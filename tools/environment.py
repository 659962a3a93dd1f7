"""Prepares the virtual environment that the Makefile's targets run in.

usage: python3 tools/environment.py VENV [lint]

Four steps, each skipped when its inputs are those of the last time it succeeded (hashes of their
contents are kept in VENV/steps.json): PyTorch, the packages of requirements/main.txt, fastlora's
extension, fastlora as an editable install. `lint` adds requirements/lint.txt instead of those two.
Standard library only.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD_SETTINGS = ("FASTLORA_CUDA", "FASTLORA_CUDA_ARCHS", "CXX", "CXXFLAGS", "CUDACXX", "CUDA_HOME")


def fail(message):
    sys.exit("fastlora: " + message)


def main():
    if sys.version_info < (3, 10):  # noqa: UP036 (older ones do get here)
        fail(
            f"Python 3.10 or newer is needed, {sys.executable} is {platform.python_version()};"
            " choose another one: make PYTHON=python3.12 ..."
        )
    environment = Environment(Path(sys.argv[1]).absolute())
    environment.create()
    environment.step("torch", environment.torch_pin(), environment.install_torch)
    main_txt = ROOT / "requirements" / "main.txt"
    environment.step("packages", digest(main_txt), lambda: environment.install("-r", main_txt))
    if sys.argv[2:] == ["lint"]:
        lint_txt = ROOT / "requirements" / "lint.txt"
        environment.step("lint", digest(lint_txt), lambda: environment.install("-r", lint_txt))
        return
    metadata = [ROOT / "pyproject.toml", ROOT / "setup.py"]
    sources = [ROOT / "CMakeLists.txt", ROOT / "setup.py", ROOT / "csrc"]
    settings = json.dumps([os.environ.get(name, "") for name in BUILD_SETTINGS])
    compilers = str([shutil.which("nvcc"), has_nvidia_gpu()])
    built = digest(*sources, extra=settings + compilers)
    for name in ("_C", "_emulator"):
        if not list((ROOT / "fastlora").glob(name + "*" + environment.suffix())):
            environment.forget("extension")
    environment.step("extension", built, environment.build)
    environment.step("fastlora", digest(*metadata), environment.install_fastlora)


def digest(*paths, extra=""):
    """Hash of the names and contents of files and folders."""
    total = hashlib.sha256(extra.encode())
    for path in paths:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            total.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def has_nvidia_gpu():
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


class Environment:
    """A virtual environment and the record of what was done in it."""

    def __init__(self, path):
        self.path = path
        self.python = path / "bin" / "python"
        self.record = path / "steps.json"

    def create(self):
        if not self.works():
            say(f"making {self.path.name} with Python {platform.python_version()}")
            result = subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.path)])
            if result.returncode != 0 or not self.works():
                shutil.rmtree(self.path, ignore_errors=True)  # a half of one is worse than none
                fail(
                    f"{sys.executable} -m venv failed; on Debian and Ubuntu: "
                    "sudo apt install python3-venv python3-dev"
                )

    def works(self):
        """Whether it has a Python that runs and a pip (not so after a Python upgrade, for one)."""
        if not self.python.exists():
            return False
        check = [str(self.python), "-c", "import pip, sys; sys.exit(sys.version_info < (3, 10))"]
        return subprocess.run(check, capture_output=True).returncode == 0

    def step(self, name, key, action):
        """Runs `action` unless it succeeded before with this key."""
        done = self.done()
        if done.get(name) == key:
            return
        self.forget(name)
        action()
        self.record.write_text(json.dumps({**self.done(), name: key}, indent=1))

    def done(self):
        try:
            return json.loads(self.record.read_text())
        except (OSError, ValueError):
            return {}

    def forget(self, name):
        done = self.done()
        if done.pop(name, None) is not None:
            self.record.write_text(json.dumps(done, indent=1))

    def pip(self, *arguments, **options):
        quiet = [] if sys.stdout.isatty() else ["-q"]
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", *quiet]
        return subprocess.run([*command, *map(str, arguments)], **options).returncode == 0

    def install(self, *arguments):
        say("installing the packages of requirements/" + Path(arguments[-1]).name)
        if not self.pip(*arguments):
            fail("pip could not install them (its message is above); run make again to continue")

    def torch_pin(self):
        pins = (ROOT / "requirements" / "main.txt").read_text()
        return re.findall(r"^torch==([\w.]+)", pins, re.MULTILINE)[0]

    def install_torch(self):
        """The CPU build (200 MB) unless there is an NVIDIA GPU (3 GB) or no other build (macOS)."""
        plain = ["torch==" + self.torch_pin()]
        cpu = [plain[0] + "+cpu"]
        attempts = [plain]
        if platform.system() == "Linux" and not has_nvidia_gpu():
            reachable = ["--extra-index-url", CPU_INDEX, "--retries", "1", "--timeout", "30"]
            attempts = [cpu, cpu + reachable, plain]
        constraints = ["-c", ROOT / "requirements" / "main.txt"]
        say("installing " + attempts[0][0])
        for attempt in attempts[:-1]:
            if self.pip(*attempt, *constraints, stderr=subprocess.DEVNULL):
                return
        if len(attempts) > 1:
            say(f"no CPU build was found; installing {plain[0]}, which may be the large CUDA build")
        if not self.pip(*plain, *constraints):
            fail("pip could not install PyTorch (its message is above)")

    def suffix(self):
        command = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
        return subprocess.check_output([str(self.python), "-c", command], text=True).strip()

    def build(self):
        say("building fastlora._C")
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            fail("Python's headers are missing; on Debian and Ubuntu: sudo apt install python3-dev")
        command = [str(self.python), "setup.py", "-q", "build_ext", "--inplace"]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            fail("the build failed (its messages are above; a C++17 compiler is needed)")

    def install_fastlora(self):
        say("installing fastlora")
        if not self.pip("-q", "--no-build-isolation", "--no-deps", "-e", ROOT):
            fail("pip could not install fastlora (its message is above)")


def say(message):
    print("fastlora: " + message, flush=True)


if __name__ == "__main__":
    main()
