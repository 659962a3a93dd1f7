"""The doctor: what it says of machines that are not at hand, and that it runs on this one."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from fastlora import _selfcheck, demo, doctor
from fastlora.doctor import Facts, Finding, Gpu, diagnose, runs_on
from fastlora.ops import operators

CPU_BUILD = {
    "compiler": "GNU 12.2.0",
    "openmp": True,
    "cpu_isa": "avx2",
    "cuda": "",
    "cuda_archs": "",
    "cpu_only": "no nvcc was found",
}
CUDA_BUILD = {**CPU_BUILD, "cuda": "13.0", "cuda_archs": "75-real,80,90a-real", "cpu_only": ""}
H200 = Gpu("NVIDIA H200", "9.0", "580.65.06")
HEALTHY = Facts(
    fastlora="0.1.0",
    python="3.11.7",
    executable="/v/bin/python",
    platform="Linux",
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    torch_sees_cuda=True,
    threads=8,
    build=CUDA_BUILD,
    gpus=[H200],
    nvcc="/usr/local/cuda/bin/nvcc",
    packages={"diffusers": "0.42.1"},
)


def facts(**changes) -> Facts:
    return dataclasses.replace(HEALTHY, **changes)


def the(findings: list[Finding], name: str, section: str | None = None) -> Finding:
    (found,) = [f for f in findings if f.name == name and section in (None, f.section)]
    return found


def test_a_healthy_machine_has_no_advice():
    assert [f for f in diagnose(HEALTHY) if f.status != "ok" or f.advice] == []


def test_no_gpu_is_no_problem():
    machine = facts(build=CPU_BUILD, gpus=[], torch="2.13.0+cpu", torch_cuda=None, nvcc="")
    machine = dataclasses.replace(machine, torch_sees_cuda=False)
    assert {f.status for f in diagnose(machine)} == {"ok"}
    assert "no nvcc was found" in the(diagnose(machine), "CUDA").text


@pytest.mark.parametrize("nvcc", ["", "/usr/local/cuda/bin/nvcc"], ids=["no-nvcc", "nvcc"])
def test_gpu_without_kernels(nvcc):
    finding = the(diagnose(facts(build=CPU_BUILD, nvcc=nvcc)), "CUDA")
    assert finding.status == "error"
    assert "FASTLORA_CUDA=on /v/bin/python -m pip install" in finding.advice
    assert ("install the CUDA toolkit" in finding.advice) == (nvcc == "")


def test_rebuilds_the_clone_it_was_installed_from():
    finding = the(diagnose(facts(build=CPU_BUILD, source="/home/me/my fastlora")), "CUDA")
    assert finding.advice.endswith("--force-reinstall --no-deps -e '/home/me/my fastlora'")


@pytest.mark.parametrize(
    ("driver", "cuda", "status"),
    [
        ("580.65.06", "13.0", "ok"),
        ("575.57.08", "13.0", "error"),
        ("525.60.13", "12.8", "ok"),
        ("470.42.01", "12.8", "error"),
        ("600.01", "14.1", "ok"),
    ],
)
def test_driver(driver, cuda, status):
    build = {**CUDA_BUILD, "cuda": cuda}
    finding = the(diagnose(facts(build=build, gpus=[Gpu("H200", "9.0", driver)])), "cuda:0")
    assert finding.status == status
    if status == "error":
        assert f"need driver {doctor.driver_needed(cuda)} or newer" in finding.text
        assert "update the driver" in finding.advice


def test_gpu_that_the_kernels_were_not_compiled_for():
    old, new = Gpu("Tesla V100", "7.0", "580.1"), H200
    findings = diagnose(facts(gpus=[old, new]))
    assert the(findings, "cuda:0").status == "error"
    assert "FASTLORA_CUDA_ARCHS=70 " in the(findings, "cuda:0").advice
    assert the(findings, "cuda:1").status == "ok"


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80-real", "8.0", True),
        ("80-real", "8.9", True),  # same major version, newer
        ("86-real", "8.0", False),  # same major version, older
        ("80-real", "9.0", False),
        ("80", "12.0", True),  # PTX
        ("80-virtual", "9.0", True),
        ("90", "8.9", False),
        ("90a-real", "9.0", True),
        ("90a", "10.0", False),  # the letter a: only there
        ("100f", "10.3", True),
        ("100f", "12.0", False),
        ("75-real, 120-real", "12.1", True),
        ("native", "9.0", False),
    ],
)
def test_runs_on(archs, capability, runs):
    assert runs_on(archs, capability) is runs


@pytest.mark.parametrize(("driver", "index"), [("580.65", "cu130"), ("535.1", "cu126")])
def test_torch_without_cuda(driver, index):
    machine = facts(
        torch="2.13.0+cpu",
        torch_cuda=None,
        torch_sees_cuda=False,
        gpus=[dataclasses.replace(H200, driver=driver)],
    )
    finding = the(diagnose(machine), "PyTorch", "devices")
    assert finding.status == "error"
    assert "torch==2.13.0 --index-url https://download.pytorch.org/whl/" + index in finding.advice


def test_torch_that_does_not_see_the_gpu():
    finding = the(diagnose(facts(torch_sees_cuda=False)), "PyTorch", "devices")
    assert finding.status == "error"
    assert "needs driver 580" in finding.advice


def test_serial_loops_are_a_warning():
    finding = the(diagnose(facts(build={**CUDA_BUILD, "openmp": False})), "CPU")
    assert finding.status == "warning"
    assert "CXX=g++" in finding.advice


def test_missing_package():
    findings = diagnose(facts(packages={"peft": None, "diffusers": "0.42.1"}))
    missing = the(findings, "peft")
    assert (missing.status, missing.advice) == ("missing", "/v/bin/python -m pip install peft")
    assert the(findings, "diffusers").status == "ok"


def test_missing_packages_of_the_demo():
    packages = {"peft": "0.21", "transformers": None, "scikit-learn": None, "pillow": "13"}
    findings = diagnose(facts(packages=packages))
    whole = the(findings, "demo")
    assert whole.status == "warning" and "transformers, scikit-learn" in whole.text
    command = "/v/bin/python -m pip install transformers scikit-learn"
    assert [f.advice for f in findings if f.advice] == [command]
    text = doctor.table(findings)
    assert text.endswith("\n1 warning") and f"  demo: {command}" in text
    healthy = diagnose(facts(packages=dict.fromkeys(packages, "1.0")))
    assert [f for f in healthy if f.status != "ok"] == []
    assert doctor.table(healthy).endswith("\nno problems")


@pytest.mark.parametrize(
    ("statuses", "last"),
    [
        (["ok", "missing"], "no problems"),
        (["error", "ok"], "1 problem"),
        (["warning", "warning"], "2 warnings"),
        (["error", "error", "warning"], "2 problems, 1 warning"),
    ],
    ids=" ".join,
)
def test_verdict(statuses, last):
    assert doctor.verdict([Finding("s", "n", status, "") for status in statuses]) == last


def test_packages_of_the_demo_are_those_that_it_asks_for_and_the_extra_brings():
    root = Path(__file__).resolve().parent.parent
    extra = re.search(r"^demo = (\[.*\])$", (root / "pyproject.toml").read_text(), re.MULTILINE)
    brought = {re.split(r"[><=]", wanted)[0] for wanted in json.loads(extra[1])}
    assert set(doctor.DEMO) == set(demo.NEEDED) <= brought
    assert set(doctor.DEMO) <= set(doctor.OPTIONAL)


def test_table_ends_with_what_to_do():
    text = doctor.table(diagnose(facts(build=CPU_BUILD, packages={"peft": None})))
    assert text.splitlines()[0] == "fastlora"
    assert "  CUDA: in fastlora's folder: FASTLORA_CUDA=on " in text
    assert "  peft: /v/bin/python -m pip install peft" in text
    assert text.endswith("\n1 problem")


def test_nvidia_smi_that_fails(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed, 9.0, x\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor.nvidia_gpus() == []


def test_nvidia_smi(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H200, 9.0, 580.65.06\necho Tesla T4, 7.5, 580.65.06\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor.nvidia_gpus() == [H200, Gpu("Tesla T4", "7.5", "580.65.06")]


def test_report_of_this_machine(capsys):
    code = doctor.main()
    out = capsys.readouterr().out
    assert code == int(" ERROR " in out)
    assert code == 1 or re.fullmatch(r"no problems|\d+ warnings?", out.splitlines()[-1])
    for name in operators:
        assert f"{name} on cpu" in out
    assert not [line for line in out.splitlines() if " on cpu" in line and "ERROR" in line]


def test_json_of_this_machine(capsys):
    doctor.main(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["facts"]["torch"] == torch.__version__
    assert {f["section"] for f in report["findings"]} >= {"kernels", "devices", "self-check"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(operators))
def test_self_check_passes(name, dtype):
    result = _selfcheck.check(name, operators[name], "cpu", dtype)
    assert result.passed, result


class Wrong:
    """An operator that computes something else than its reference."""

    def __init__(self, real, change):
        self.reference, self.overload, self.real, self.change = (
            real.reference,
            real.overload,
            real,
            change,
        )

    def __call__(self, *arguments):
        return self.change(self.real(*arguments))


@pytest.mark.parametrize(
    "change",
    [lambda y: y + 1e-3, lambda y: y * float("nan"), lambda y: 1 / 0],
    ids=["off-by-1e-3", "nan", "raises"],
)
def test_self_check_finds_a_wrong_operator(change):
    wrong = Wrong(operators["lora_linear"], change)
    result = _selfcheck.check("lora_linear", wrong, "cpu", torch.float32)  # type: ignore[arg-type]
    assert not result.passed


def test_self_check_asks_for_an_example():
    assert "no example" in _selfcheck.check("new", operators["fold"], "cpu", torch.float32).problem
