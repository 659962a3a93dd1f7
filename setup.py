"""Drives CMakeLists.txt, the one build definition of the extension `fastlora._C`."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds the target `_C` straight into the place setuptools asks for."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        work = Path(self.build_temp).resolve() / "cmake"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{work}",
            "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DFASTLORA_CUDA={os.environ.get('FASTLORA_CUDA', 'auto')}",
            f"-DFASTLORA_CUDA_ARCHS={os.environ.get('FASTLORA_CUDA_ARCHS', '')}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(work), "--target", "_C"], check=True)


setup(ext_modules=[Extension("fastlora._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
