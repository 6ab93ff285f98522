"""``make ship-check-short``: what a release has to pass and takes less than ten minutes, without CUDA.

1. Wheels for x86_64 and aarch64 without CUDA, which ``auditwheel`` finds to run on every Linux with glibc
   2.28.
2. The C++ tests for aarch64 under ``qemu-aarch64``: the contract's bits, and ``combine`` on NEON against the
   portable kernel for every dtype, kind of noise and rounding.
3. The instructions of NEON an element, counted by the emulator, against a ceiling.
4. The wheel in a fresh environment, on a PATH without a compiler: the contract's bits and the README's lines.
5. The build for the Hub with compiled kernels, loaded by ``kernels`` without a network, beside the package.
6. Functions that only a newer glibc has, as its headers name them: linked all the same, for glibc 2.28.

Ends with the line "N passed, 0 failed", or at once with what failed.
"""

from __future__ import annotations

import argparse
import ctypes
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

import manylinux

ROOT = pathlib.Path(__file__).resolve().parent.parent
#: Where torch and what it needs lie: the fresh environment gets this folder by a .pth file instead of a
#: download.
SITE = pathlib.Path(importlib.util.find_spec("torch").origin).parent.parent  # type: ignore[union-attr, arg-type]
#: At most so many instructions of NEON an element, in place with one direction.  gcc 12 makes 14.5, 3.2, 14.7
#: and 3.6.
INSTRUCTIONS = {
    ("fp32", "normal"): 15.5,
    ("fp32", "rademacher"): 3.6,
    ("bf16", "normal"): 15.5,
    ("bf16", "rademacher"): 4.0,
}


def call(*command: object, environment: dict[str, str] | None = None, folder: pathlib.Path = ROOT) -> None:
    print("+", *command, flush=True)
    done = subprocess.run([str(c) for c in command], env=environment, cwd=folder)
    if done.returncode != 0:
        sys.exit(f"ship-check: {' '.join(map(str, command))}: failed")


def wheels(out: pathlib.Path) -> None:
    environment = {"SOURCE_DATE_EPOCH": "1700000000", **os.environ, "ZOKERNELS_CUDA": "0"}
    call(sys.executable, ROOT / "packaging" / "wheels.py", "--out", out, environment=environment)
    print("passed: wheels", flush=True)


def emulated() -> None:
    """In the folder in which the wheel for aarch64 was compiled, so that only the tests themselves are
    new.
    """
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        sys.exit("ship-check: qemu-aarch64: not found; install it, in Debian: apt install qemu-user")
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-manylinux_2_28_aarch64"
    libraries = manylinux.Tools("aarch64").library("libc.so.6").parent.parent
    environment = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"}
    setting = f"-DCMAKE_CROSSCOMPILING_EMULATOR={emulator};-L;{libraries}"
    call("cmake", "-DZOKERNELS_TESTS=ON", setting, folder, environment=environment)
    call("cmake", "--build", folder, environment=environment)
    call("ctest", "--test-dir", folder, "--output-on-failure", "--no-tests=error", environment=environment)
    print("passed: C++ tests under qemu-aarch64", flush=True)


def executed(*command: object) -> int:
    """How many instructions a program executes under the emulator."""
    with tempfile.TemporaryDirectory() as name:
        log = pathlib.Path(name) / "log"
        emulator, *rest = map(str, command)
        call(emulator, "-singlestep", "-d", "exec,nochain", "-D", log, *rest)  # a line of the log for each
        with log.open("rb") as lines:
            return sum(1 for line in lines if line.startswith(b"Trace"))


def counted() -> None:
    """Instructions of NEON an element: the difference of two runs that differ in their length alone."""
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-manylinux_2_28_aarch64"
    libraries = manylinux.Tools("aarch64").library("libc.so.6").parent.parent
    program = ("qemu-aarch64", "-L", libraries, folder / "tests" / "cpp" / "one_pass")
    short, long = 8192, 3 * 8192
    for (dtype, dist), ceiling in INSTRUCTIONS.items():
        codes = ("fp32", "bf16", "fp16").index(dtype), {"normal": 1, "rademacher": 2}[dist]
        per = (executed(*program, "neon", *codes, long) - executed(*program, "neon", *codes, short)) / (
            long - short
        )
        print(f"neon {dtype} {dist}: {per:.2f} instructions an element, ceiling {ceiling}", flush=True)
        if per > ceiling:
            sys.exit("ship-check: too many instructions")
    print("passed: instructions an element", flush=True)


def installed(wheel: pathlib.Path) -> None:
    """In an environment that has the wheel and torch, on a PATH that has nothing else."""
    with tempfile.TemporaryDirectory() as name:
        fresh = pathlib.Path(name)
        call(sys.executable, "-m", "venv", "--without-pip", fresh)
        (next(fresh.glob("lib/python*/site-packages")) / "torch_from_elsewhere.pth").write_text(f"{SITE}\n")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--python",
            fresh / "bin" / "python",
        ]
        call(*pip, "install", "-q", "--no-deps", "--no-index", wheel)
        environment = {"PATH": str(fresh / "bin"), "HOME": str(fresh)}
        for tool in ("gcc", "cc", "g++", "c++", "nvcc", "cmake", "ld"):
            assert shutil.which(tool, path=environment["PATH"]) is None
        use = ROOT / "packaging" / "use.py"
        call(fresh / "bin" / "python", use, fresh, environment=environment, folder=fresh)
        call(fresh / "bin" / "zokernels", "info", environment=environment, folder=fresh)
    print("passed: the wheel in a fresh environment without compilers", flush=True)


def hub(out: pathlib.Path) -> None:
    """In the folder in which the wheel was compiled, so that only the entries are compiled anew."""
    call(sys.executable, ROOT / "packaging" / "hub.py", "--compiled", "--out", out / "hub")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(out / "hub" / "cache")}
    use = ROOT / "packaging" / "use_hub.py"
    call(sys.executable, "-B", use, out / "hub" / "zokernels", environment=environment, folder=out)
    print("passed: the Hub's build with compiled kernels", flush=True)


#: What a compiler on glibc 2.38 or later makes of ``strtol`` and ``wcstoull``.
NEWER = """\
extern "C" long __isoc23_strtol(const char*, char**, int);
extern "C" unsigned long long __isoc23_wcstoull(const wchar_t*, wchar_t**, int);
extern "C" long sum(const char* text) {
  return __isoc23_strtol(text, nullptr, 0) + static_cast<long>(__isoc23_wcstoull(L"7", nullptr, 10));
}
"""


def newer(out: pathlib.Path) -> None:
    tools = manylinux.Tools(platform.machine())
    toolchain = manylinux.make(tools.arch, out / "newer", None)
    flags = re.search(r'SHARED_LINKER_FLAGS_INIT "(.*)"', toolchain.read_text())
    assert flags is not None
    source, library = out / "newer" / "newer.cpp", out / "newer" / "newer.so"
    source.write_text(NEWER)
    call(tools.compiler, "-O2", "-fPIC", "-shared", source, "-o", library, *flags[1].split())
    got = ctypes.CDLL(str(library)).sum(b"0x10")
    if got != 23:
        sys.exit(f"ship-check: strtol of a newer glibc: expected 16 + 7, got {got}")
    print("passed: functions of a newer glibc", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    out = ROOT / "build" / "ship-check"
    shutil.rmtree(out, ignore_errors=True)
    wheels(out)
    emulated()
    counted()
    (wheel,) = out.glob(f"*manylinux_2_28_{platform.machine()}.whl")
    installed(wheel)
    hub(out)
    newer(out)
    print("6 passed, 0 failed")


if __name__ == "__main__":
    main()
