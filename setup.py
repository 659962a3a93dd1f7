"""Drives CMakeLists.txt, the one build definition of `fastlora._C` and `fastlora._emulator`."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# CMake remembers these; when one changes it has to start over.
REMEMBERED = ("CXX", "CXXFLAGS", "CUDACXX", "CUDAHOSTCXX", "CUDA_HOME")
built_for = ""  # "cpu" or "cu130", known after the build


class CMakeBuild(build_ext):
    """Configures and builds `_C` and `_emulator` straight into the place setuptools asks for."""

    def build_extension(self, ext: Extension) -> None:
        global built_for
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # One folder for every kind of build, so that a second one compiles only what changed.
        work = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        # cmake and ninja from PyPI lie beside this Python, which need not be on the PATH.
        environment = dict(os.environ)
        scripts = sysconfig.get_path("scripts")
        environment["PATH"] = os.pathsep.join([scripts, environment.get("PATH", os.defpath)])

        remembered = json.dumps({name: os.environ.get(name, "") for name in REMEMBERED})
        memory = work / "environment.json"
        fresh = not memory.exists() or memory.read_text() != remembered
        pybind11 = [sys.executable, "-m", "pybind11", "--cmakedir"]
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{work}",
            "-GNinja",
            *(["--fresh"] if fresh else []),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=environment['PATH'])}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={subprocess.check_output(pybind11, text=True).strip()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DFASTLORA_CUDA={os.environ.get('FASTLORA_CUDA') or 'auto'}",
            f"-DFASTLORA_CUDA_ARCHS={os.environ.get('FASTLORA_CUDA_ARCHS', '')}",
        ]
        build = ["cmake", "--build", str(work), "--target", ext.name.rpartition(".")[2]]
        for command in (configure, build):
            if subprocess.run(command, env=environment).returncode != 0:
                raise CompileError(f"the build of {ext.name} failed; CMake's messages are above")
        memory.write_text(remembered)
        summary, built_for = (work / "summary.txt").read_text().splitlines()
        if ext is self.extensions[-1]:
            print(f"fastlora: {summary}")


class Wheel(bdist_wheel):
    """Says in the wheel's name what it was built for, which is all of a build that pip shows."""

    def run(self) -> None:
        self.run_command("build")
        self.build_number = f"1{built_for}"
        super().run()


setup(
    ext_modules=[Extension(f"fastlora.{name}", sources=[]) for name in ("_C", "_emulator")],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
