"""`fastlora doctor`: what was built, which devices there are, what is missing and how to get it.

`gather` looks at the machine, `diagnose` judges what it saw (a pure function, so that machines that
are not at hand can be tested), `table` prints.
"""

import importlib.metadata
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OPTIONAL = {
    "diffusers": "for the demo's and the benchmarks' comparisons with it",
    "peft": "for the demo's and the benchmarks' comparisons with it",
    "transformers": "the text encoder of the demo's model",
    "scikit-learn": "the demo's images",
    "pillow": "the demo's pictures",
}
# The extra `demo`: without them neither `fastlora demo` nor the README's examples run.
DEMO = ("transformers", "scikit-learn", "pillow")


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it."""

    name: str
    capability: str  # "9.0"
    driver: str  # "580.65.06"


@dataclass(frozen=True)
class Facts:
    """What there is. Versions are strings, "" or None where there is none."""

    fastlora: str
    python: str
    executable: str  # of Python
    platform: str
    torch: str
    torch_cuda: str | None  # the CUDA version that torch was built with
    torch_sees_cuda: bool
    threads: int
    build: dict[str, Any]  # of _C.build_info()
    gpus: list[Gpu] = field(default_factory=list)
    nvcc: str = ""  # "/usr/local/cuda/bin/nvcc"
    source: str = ""  # the clone that this is an editable install of
    packages: dict[str, str | None] = field(default_factory=dict)

    @property
    def pip(self) -> str:
        return f"{shlex.quote(self.executable)} -m pip install"

    def rebuild(self, settings: str = "") -> str:
        """The command that replaces what is installed even though the version is the same."""
        where = f"-e {shlex.quote(self.source)}" if self.source else "."
        command = f"{settings} {self.pip} --force-reinstall --no-deps {where}".strip()
        return command if self.source else f"in fastlora's folder: {command}"


@dataclass(frozen=True)
class Finding:
    """One row of the report. `status`: "ok", "missing" (optional), "warning", "error"."""

    section: str
    name: str
    status: str
    text: str
    advice: str = ""


def gather() -> Facts:
    """Looks at this machine; starts nothing but nvidia-smi."""
    import torch

    from fastlora import __version__
    from fastlora.ops._define import kernels

    root = Path(__file__).resolve().parent.parent
    return Facts(
        fastlora=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_sees_cuda=torch.cuda.is_available(),
        threads=torch.get_num_threads(),
        build=kernels.build_info(),
        gpus=nvidia_gpus(),
        nvcc=shutil.which("nvcc") or "",
        source=str(root) if (root / "CMakeLists.txt").exists() else "",
        packages={name: version_of(name) for name in OPTIONAL},
    )


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_gpus() -> list[Gpu]:
    """What nvidia-smi lists; empty without it, or where it does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in answer.stdout.splitlines()]
    return [Gpu(*row) for row in rows if len(row) == 3] if answer.returncode == 0 else []


# --- judgement ------------------------------------------------------------------------------------


def diagnose(facts: Facts) -> list[Finding]:
    """The report of the machine, with what to do about each thing that is missing or wrong."""
    return [*_build(facts), *_devices(facts), *_packages(facts)]


def _build(facts: Facts) -> list[Finding]:
    build = facts.build
    loops = f"{build['cpu_isa']}, {build['compiler']}"
    findings = [
        Finding("fastlora", "version", "ok", facts.fastlora),
        Finding("fastlora", "Python", "ok", f"{facts.python}, {facts.executable}"),
        Finding("fastlora", "PyTorch", "ok", facts.torch),
        Finding("fastlora", "platform", "ok", facts.platform),
    ]
    if build["openmp"]:
        text = f"{loops}, OpenMP with {facts.threads} threads"
        findings.append(Finding("kernels", "CPU", "ok", text))
    else:
        advice = f"for parallel loops build with GCC: {facts.rebuild('CXX=g++')}"
        findings.append(Finding("kernels", "CPU", "warning", f"{loops}, one thread", advice))
    if build["cuda"]:
        archs = build["cuda_archs"].replace(",", ", ")
        findings.append(Finding("kernels", "CUDA", "ok", f"CUDA {build['cuda']}, for {archs}"))
    elif facts.gpus:
        get = "" if facts.nvcc else "install the CUDA toolkit, 12 or newer; then "
        advice = get + facts.rebuild("FASTLORA_CUDA=on")
        text = f"not built: {build['cpu_only']}"
        findings.append(Finding("kernels", "CUDA", "error", text, advice))
    else:
        text = f"not built: {build['cpu_only']}; not needed without an NVIDIA GPU"
        findings.append(Finding("kernels", "CUDA", "ok", text))
    return findings


def _devices(facts: Facts) -> list[Finding]:
    findings = [Finding("devices", "cpu", "ok", platform.machine())]
    if not facts.gpus:
        if facts.torch_sees_cuda:
            text = "PyTorch sees a GPU, but nvidia-smi does not describe it"
            return [*findings, Finding("devices", "cuda", "warning", text)]
        return [*findings, Finding("devices", "cuda", "ok", "no NVIDIA GPU found")]
    needed = driver_needed(facts.build["cuda"])
    archs = facts.build["cuda_archs"]
    for i, gpu in enumerate(facts.gpus):
        text = f"{gpu.name}, compute capability {gpu.capability}, driver {gpu.driver}"
        finding = Finding("devices", f"cuda:{i}", "ok", text)
        if major(gpu.driver) < needed:
            older = facts.rebuild("CUDA_HOME=/path/to/an/older/cuda")
            advice = f"update the driver, or build with an older CUDA toolkit: {older}"
            text += f"; CUDA {facts.build['cuda']} kernels need driver {needed} or newer"
            finding = Finding("devices", f"cuda:{i}", "error", text, advice)
        elif archs and not runs_on(archs, gpu.capability):
            arch = gpu.capability.replace(".", "")
            text += "; the kernels were not compiled for it"
            advice = facts.rebuild(f"FASTLORA_CUDA_ARCHS={arch}")
            finding = Finding("devices", f"cuda:{i}", "error", text, advice)
        findings.append(finding)
    if facts.torch_cuda is None:
        release = facts.torch.partition("+")[0]
        text = f"PyTorch {facts.torch} is a build without CUDA"
        advice = (
            f"{facts.pip} --force-reinstall torch=={release} --index-url"
            f" https://download.pytorch.org/whl/{torch_index(facts.gpus[0].driver)}"
        )
        findings.append(Finding("devices", "PyTorch", "error", text, advice))
    elif not facts.torch_sees_cuda:
        text = f"PyTorch {facts.torch} (CUDA {facts.torch_cuda}) does not see the GPU"
        advice = (
            f"CUDA {facts.torch_cuda} needs driver {driver_needed(facts.torch_cuda)} or newer; also"
            ' look at CUDA_VISIBLE_DEVICES and at: python -c "import torch; torch.cuda.init()"'
        )
        findings.append(Finding("devices", "PyTorch", "error", text, advice))
    return findings


def _packages(facts: Facts) -> list[Finding]:
    findings = []
    for name, version in facts.packages.items():
        if version is None:
            text = f"not installed; {OPTIONAL[name]}"
            advice = "" if name in DEMO else f"{facts.pip} {name}"  # one command for the demo's
            findings.append(Finding("optional packages", name, "missing", text, advice))
        else:
            findings.append(Finding("optional packages", name, "ok", version))
    absent = [name for name in DEMO if name in facts.packages and facts.packages[name] is None]
    if absent:
        text = f"`fastlora demo` and the README's examples need {', '.join(absent)}"
        advice = f"{facts.pip} {' '.join(absent)}"
        findings.append(Finding("optional packages", "demo", "warning", text, advice))
    return findings


def major(version: str) -> int:
    digits = re.match(r"\d+", version)
    return int(digits.group()) if digits else 0


def driver_needed(cuda: str) -> int:
    """The oldest driver that runs a binary of this CUDA version (minor versions are compatible)."""
    return {0: 0, 11: 450, 12: 525}.get(major(cuda), 580)


def torch_index(driver: str) -> str:
    return "cu130" if major(driver) >= 580 else "cu126"


def runs_on(archs: str, capability: str) -> bool:
    """Whether code for `archs` ("75-real,80,90a") runs on a GPU of this capability ("8.6").

    Machine code runs on GPUs of the same major version from its minor version on; PTX (no suffix,
    or -virtual) on anything as new; with the letter a, either only on exactly its own.
    """
    x, _, y = capability.partition(".")
    gpu = (int(x), int(y or 0))
    for arch in archs.split(","):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch.strip())
        if match is None:
            continue
        code = (int(match[1]), int(match[2]))
        family = gpu[0] == code[0] and gpu >= code
        if match[3] == "a":
            fits = gpu == code
        elif match[3] == "f" or match[4] == "-real":
            fits = family
        else:
            fits = gpu >= code
        if fits:
            return True
    return False


def self_check_findings(facts: Facts) -> list[Finding]:
    """Each operator run once against its reference on each device."""
    from fastlora._selfcheck import self_check

    devices = ["cpu", "emulated"]
    if facts.torch_sees_cuda:
        import torch

        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    findings = []
    for device in devices:
        for check in self_check(device):
            name = (
                f"{check.operator} on {device}"
                if device != "emulated"
                else (f"{check.operator}, CUDA emulated")
            )
            if check.passed:
                text = f"error {check.error:.1e}, allowed {check.allowed:.1e}"
                findings.append(Finding("self-check", name, "ok", text))
                continue
            text = check.problem or f"error {check.error:.1e}, allowed only {check.allowed:.1e}"
            advice = f"rebuild: {facts.rebuild()}   (if it stays, please report it with this table)"
            findings.append(Finding("self-check", name, "error", text, advice))
    return findings


# --- printing -------------------------------------------------------------------------------------

MARK = {"ok": "ok", "missing": "-", "warning": "!", "error": "ERROR"}


def table(findings: list[Finding]) -> str:
    """Plain text, one section after the other, then what to do."""
    width = max(len(f.name) for f in findings)
    lines, section = [], ""
    for f in findings:
        if f.section != section:
            lines += ["", f.section] if section else [f.section]
            section = f.section
        lines.append(f"  {f.name:<{width}}  {MARK[f.status]:<5}  {f.text}")
    todo = [f for f in findings if f.advice]
    if todo:
        lines += ["", "what to do"]
        for f in todo:
            lines += [f"  {f.name}: {f.advice}"]
    return "\n".join([*lines, "", verdict(findings)])


def verdict(findings: list[Finding]) -> str:
    """The last line: "no problems" only where there is no warning either."""
    count = Counter(f.status for f in findings)
    said = [
        f"{count[status]} {noun}{'s' * (count[status] > 1)}"
        for status, noun in (("error", "problem"), ("warning", "warning"))
        if count[status]
    ]
    return ", ".join(said) or "no problems"


def main(as_json: bool = False) -> int:
    """Prints the report; 1 if there is an error in it, else 0."""
    facts = gather()
    findings = diagnose(facts) + self_check_findings(facts)
    if as_json:
        report = {"facts": asdict(facts), "findings": [asdict(f) for f in findings]}
        print(json.dumps(report, indent=2))
    else:
        print(table(findings))
    return int(any(f.status == "error" for f in findings))
