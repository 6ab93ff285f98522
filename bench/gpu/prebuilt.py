"""What is carried to a machine without a network and without time to compile: made here by ``make
gpu-prebuilt``.

A folder of at most 64 MiB: the tensor libraries, which hold for every torch from 2.10 and every Python (they
call torch's stable C shim alone), the host module of each Python that was found, check_math, and the cuRAND
baseline.  A manifest says of which sources, for which GPUs, and what the files' hashes are: ``install`` takes
nothing that does not fit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from typing import Any

from .. import curand, machine
from .stage import ROOT, Context

MANIFEST = "manifest.json"
MIB_AT_MOST = 64
DEFAULT_ARCHITECTURES = "8.0 9.0 10.0"

#: The sources from which the files are compiled.
SOURCES = ("csrc/**/*", "CMakeLists.txt", "setup.py", "tests/gpu/check_math.cu", "bench/curand/perturb.cu")


class Unusable(Exception):
    """A folder cannot be used for this tree on this machine; the message says why."""


def sources_hash(root: pathlib.Path) -> str:
    """One hash of the names and bytes of all sources: equal where the compiled files would be."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in SOURCES for p in root.glob(pattern) if p.is_file()}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _hash(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def math_command(target: pathlib.Path, *sms: str) -> list[str]:
    """nvcc's command for tests/gpu/check_math.cu with machine code for each of ``sms`` ("90")."""
    flags = ["-std=c++20", "-O3", "-I", str(ROOT), *curand.gencodes(*sms)]
    flags += ["-Xcompiler", "-ffp-contract=off", "-cudart", "static"]
    return ["nvcc", *flags, str(ROOT / "tests/gpu/check_math.cu"), "-o", str(target)]


# --- making it --------------------------------------------------------------------------------------------

_HEADERS = "import pathlib, sysconfig as s; print(pathlib.Path(s.get_path('include'), 'Python.h').exists())"


def pythons() -> list[str]:
    """Interpreters for which a host module is compiled beside this one's: those of ZOKERNELS_PYTHONS, and of
    Python 3.10 to 3.14 one each, on PATH or installed beside this one (as pyenv and uv do), that runs and has
    its headers.
    """
    found = [p for p in os.environ.get("ZOKERNELS_PYTHONS", "").split(os.pathsep) if p]
    beside = pathlib.Path(sys.base_prefix).parent
    for minor in (m for m in range(10, 15) if (3, m) != sys.version_info[:2]):
        name = f"python3.{minor}"
        for path in (shutil.which(name), *sorted(beside.glob(f"*/bin/{name}"))):
            command = [path, "-c", _HEADERS]
            if path and subprocess.run(command, capture_output=True, text=True).stdout.strip() == "True":
                found.append(str(path))
                break
    return list(dict.fromkeys(found))


def build(architectures: str) -> None:
    """Compiles the libraries and host modules into the source tree, as an editable install does."""
    env = {**os.environ, "TORCH_CUDA_ARCH_LIST": architectures, "ZOKERNELS_CUDA": "1"}
    env["ZOKERNELS_PYTHONS"] = os.pathsep.join(pythons())
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=env, check=True)


def make(folder: pathlib.Path, architectures: str) -> dict[str, Any]:
    """Fills ``folder`` with what the tree holds compiled, check_math and the baseline; returns the manifest.

    architectures: as TORCH_CUDA_ARCH_LIST has them ("8.0 9.0+PTX"), those for which ``build`` has compiled.
    """
    if folder.exists():
        if any(folder.iterdir()) and not (folder / MANIFEST).exists():
            raise SystemExit(f"gpu-prebuilt: {folder}: expected an empty folder or one of this command")
        shutil.rmtree(folder)
    (folder / "lib").mkdir(parents=True)
    package = ROOT / "zokernels"
    for path in (*sorted((package / "lib").glob("libzokernels_*.so")), *sorted(package.glob("_host*.so"))):
        shutil.copy(path, folder / path.relative_to(package))
    sms = [a.removesuffix("+PTX").replace(".", "") for a in split(architectures)]
    subprocess.run(math_command(folder / "check_math", *sms), check=True)
    curand.compile_library(folder / curand.LIBRARY, *sms)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {
        "sources": sources_hash(ROOT),
        "architectures": split(architectures),
        "commit": machine.commit(),
        "python": platform.python_version(),
        "torch": machine.version("torch"),
        "glibc": platform.libc_ver()[1],
        "nvcc": nvcc_version(),
        "files": {p.relative_to(folder).as_posix(): _hash(p) for p in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    size = sum(p.stat().st_size for p in files) / 2**20
    print(f"{folder}: {len(files)} files, {size:.1f} MiB, for {architectures}")
    if size > MIB_AT_MOST:
        raise SystemExit(
            f"gpu-prebuilt: expected at most {MIB_AT_MOST} MiB, got {size:.0f}: name fewer architectures, "
            "e.g. TORCH_CUDA_ARCH_LIST=9.0"
        )
    return manifest


def nvcc_version() -> str | None:
    try:
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    return found[1] if found else None


def split(architectures: str) -> list[str]:
    return architectures.replace(";", " ").split()


# --- using it ---------------------------------------------------------------------------------------------


def runs_on(built: str, capability: str) -> bool:
    """Whether code for ``built`` ("8.0", "9.0+PTX") runs on a GPU of ``capability`` ("8.6"): machine code
    does on later minor versions of its own major one, PTX on everything later.
    """
    number = lambda text: tuple(int(part) for part in text.removesuffix("+PTX").split("."))
    have, want = number(built), number(capability)
    return have <= want and (have[0] == want[0] or built.endswith("+PTX"))


def check(folder: pathlib.Path, root: pathlib.Path, capability: str | None) -> dict[str, Any]:
    """The manifest; :class:`Unusable` where it is not of this tree's sources, is damaged or is for other
    GPUs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise Unusable(f"no readable {MANIFEST} in {folder}: {error}") from error
    if manifest["sources"] != sources_hash(root):
        of = f"it was built of other sources (commit {manifest['commit']})"
        raise Unusable(f"{of}: run make gpu-prebuilt again")
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file() or _hash(folder / name) != digest:
            raise Unusable(f"{name} is missing or damaged")
    built = manifest["architectures"]
    if capability is not None and not any(runs_on(a, capability) for a in built):
        raise Unusable(f"it is for {', '.join(built)}, and this GPU is {capability}")
    return manifest


def carried(ctx: Context) -> pathlib.Path | None:
    """The folder that was carried, if there is one and it fits this tree and machine."""
    try:
        return ctx.prebuilt and check(ctx.prebuilt, ROOT, None if ctx.rehearse else ctx.arch) and ctx.prebuilt
    except Unusable:
        return None


def install(folder: pathlib.Path, root: pathlib.Path, capability: str | None) -> str:
    """Puts the libraries and this Python's host module into the package of the tree ``root``; says what was
    put there.

    capability: of the GPU; None where there is none.
    """
    manifest = check(folder, root, capability)
    package, host = root / "zokernels", f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    hosts = sorted(name for name in manifest["files"] if name.startswith("_host"))
    for name in (n for n in manifest["files"] if n.startswith("lib/") or n == host):
        target = package / name
        target.parent.mkdir(exist_ok=True)
        new = target.with_name(f"{target.name}.new")  # a process that has loaded the old file keeps it
        shutil.copy(folder / name, new)
        os.replace(new, target)
    note = f"carried: nvcc {manifest['nvcc']}, {', '.join(manifest['architectures'])}"
    if host not in hosts:
        there = ", ".join(hosts) or "no Python"
        note += f"; without the host module, which is there for {there} and not as {host}"
    return note


# --- the command ------------------------------------------------------------------------------------------


def add_arguments(sub: argparse.ArgumentParser) -> None:
    folder = ROOT / "prebuilt"
    sub.add_argument("--output", type=pathlib.Path, default=folder, help="folder to make (prebuilt)")
    sub.set_defaults(call=run)


def run(args: argparse.Namespace) -> int:
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    build(architectures)
    make(args.output.resolve(), architectures)
    return 0
