"""Builds the native libraries with CMake; everything else about the package stands in pyproject.toml.

ZOKERNELS_CUDA=auto|0|1   build the CUDA library where nvcc is found (auto), never, or fail without it
TORCH_CUDA_ARCH_LIST      architectures, as torch's extensions take them (default: "8.0;9.0;10.0;12.0+PTX";
                          `make test` takes "9.0+PTX")
ZOKERNELS_PYTHONS         more interpreters for the host module, separated by ":" (default: the building one)
CMAKE_TOOLCHAIN_FILE      CMake's own: another compiler or architecture, built in a folder of its own
SOURCE_DATE_EPOCH         time stamps in wheel and sdist: the same bytes from the same sources
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

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
        print(
            "zokernels: host module: skipped, no pybind11 (the tensor libraries do not need it)",
            file=sys.stderr,
        )
        return ""
    return pybind11.get_include()


def pythons() -> str:
    """Interpreters for the host module: this one, and those of ZOKERNELS_PYTHONS, as a CMake list."""
    more = os.environ.get("ZOKERNELS_PYTHONS", "").split(os.pathsep)
    return ";".join(dict.fromkeys([sys.executable, *filter(None, more)]))


def cuda_architectures() -> str | None:
    """TORCH_CUDA_ARCH_LIST in CMake's form: "8.0 9.0+PTX" -> "80-real;90"."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    codes = []
    for arch in wanted:
        number = arch.removesuffix("+PTX").replace(".", "")
        codes.append(number if arch.endswith("+PTX") else f"{number}-real")
    return ";".join(codes) or None


class CMakeBuild(build_ext):
    """One CMake run builds and installs everything: into the source tree for an editable install, else to
    be packed.
    """

    def run(self) -> None:
        to_source = bool(self.inplace) or self.editable_mode
        self.cmake((ROOT if to_source else pathlib.Path(self.build_lib).resolve()) / "zokernels")

    def cmake(self, package: pathlib.Path) -> None:
        name = f"cmake-{sys.implementation.cache_tag}"
        if toolchain := os.environ.get("CMAKE_TOOLCHAIN_FILE"):
            name += f"-{pathlib.Path(toolchain).stem}"
        folder = ROOT / "build" / name  # kept: the next build is incremental
        folder.mkdir(parents=True, exist_ok=True)
        torch = torch_folder()
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_INSTALL_PREFIX": package,
            "TORCH_INCLUDE": torch / "include",
            "TORCH_LIB": torch / "lib",
            "PYBIND11_INCLUDE": pybind11_folder(),
            "ZOKERNELS_PYTHONS": pythons(),
            "ZOKERNELS_TESTS": "OFF",
            "ZOKERNELS_CUDA": os.environ.get("ZOKERNELS_CUDA", "auto"),
        }
        if architectures := cuda_architectures():
            settings["ZOKERNELS_CUDA_ARCHS"] = architectures
        # Without a list the default: the cache of an earlier build may have another one.
        defines = ["-UZOKERNELS_CUDA_ARCHS", *(f"-D{name}={value}" for name, value in settings.items())]
        # This Python's cmake and ninja first: its scripts are not on PATH where the environment is not
        # activated.
        scripts = sysconfig.get_path("scripts")
        environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
        cmake, ninja = (shutil.which(tool, path=environment["PATH"]) for tool in ("cmake", "ninja"))
        if cmake is None or ninja is None:
            sys.exit("zokernels: cmake and ninja are needed to build: pip install cmake ninja")
        # Said each time: an isolated build leaves in the cache a path of an environment that is gone.
        defines.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        for step in (
            ["-G", "Ninja", "-S", ROOT, "-B", folder, *defines],
            ["--build", folder],
            ["--install", folder],
        ):
            subprocess.run([cmake, *step], check=True, env=environment)


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True  # CMake's, which setuptools does not see: run build_ext, install to platlib


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the tensor libraries call torch's C shim alone, host modules are named by
    Python.
    """

    def run(self) -> None:
        # What an earlier build left there would be packed too: a module that is gone, a CUDA library not
        # wanted now.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class ReproducibleSdist(sdist):
    """With SOURCE_DATE_EPOCH, an archive that depends on nothing but the files."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if format != "gztar" or epoch is None:
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = int(epoch)
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            return entry

        path = pathlib.Path(f"{base_name}.tar.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(epoch)) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=plain)  # sorted by name
        return str(path)


def packages() -> list[str]:
    """The packages of the wheel.

    ``package-dir`` in pyproject.toml says in which folders those of the programs lie.
    """
    programs = [f"zokernels.{name}" for name in find_packages(include=["bench*", "examples*"])]
    return sorted({*find_packages(include=["zokernels*"]), *programs})


setup(
    packages=packages(),
    distclass=NativeDistribution,
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel, "sdist": ReproducibleSdist},
)
