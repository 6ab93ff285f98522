"""Builds the native libraries with CMake; everything else about the package stands in pyproject.toml.

ZOKERNELS_CUDA=auto|0|1   build the CUDA library where nvcc is found (auto), never, or fail without it
TORCH_CUDA_ARCH_LIST      architectures, as torch's own extensions take them (default: "8.0;9.0;10.0;12.0+PTX")
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()


def torch_folder() -> pathlib.Path:
    # Located, not imported: importing torch takes seconds and may probe devices.
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "zokernels: torch is needed to build; install torch >= 2.10 first and build with: "
            "pip install --no-build-isolation ."
        )
    return pathlib.Path(spec.origin).parent


def pybind11_folder() -> str:
    try:
        import pybind11
    except ImportError:
        print("zokernels: host module: skipped, no pybind11 (the tensor libraries do not need it)", file=sys.stderr)
        return ""
    return pybind11.get_cmake_dir()


def cuda_architectures() -> str | None:
    """TORCH_CUDA_ARCH_LIST in CMake's form: "8.0 9.0+PTX" -> "80-real;90"."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    codes = []
    for arch in wanted:
        number = arch.removesuffix("+PTX").replace(".", "")
        codes.append(number if arch.endswith("+PTX") else f"{number}-real")
    return ";".join(codes) or None


class CMakeBuild(build_ext):
    """One CMake run builds and installs everything: into the source tree for an editable install, else to be packed."""

    def run(self) -> None:
        to_source = bool(self.inplace) or self.editable_mode
        self.cmake((ROOT if to_source else pathlib.Path(self.build_lib).resolve()) / "zokernels")

    def cmake(self, package: pathlib.Path) -> None:
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # kept: the next build is incremental
        folder.mkdir(parents=True, exist_ok=True)
        torch = torch_folder()
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_INSTALL_PREFIX": package,
            "TORCH_INCLUDE": torch / "include",
            "TORCH_LIB": torch / "lib",
            "PYBIND11_CMAKE": pybind11_folder(),
            "Python_EXECUTABLE": sys.executable,
            "ZOKERNELS_CUDA": os.environ.get("ZOKERNELS_CUDA", "auto"),
        }
        if architectures := cuda_architectures():
            settings["ZOKERNELS_CUDA_ARCHS"] = architectures
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        # This Python's cmake and ninja first: its scripts are not on PATH where the environment is not activated.
        scripts = sysconfig.get_path("scripts")
        environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
        cmake = shutil.which("cmake", path=environment["PATH"])
        if cmake is None:
            sys.exit("zokernels: cmake is needed to build: pip install cmake ninja")
        for step in (["-G", "Ninja", "-S", ROOT, "-B", folder, *defines], ["--build", folder], ["--install", folder]):
            subprocess.run([cmake, *step], check=True, env=environment)


setup(
    ext_modules=[Extension("zokernels._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
