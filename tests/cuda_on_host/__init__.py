"""The CUDA library's host code for CPU tensors: built by the host compiler, and put in the place of the
real one.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import importlib
import pathlib
import shutil
import subprocess
from typing import Any

import pytest
import torch

from zokernels import _host
from zokernels.backends import library, registry
from zokernels.backends.cuda.support import Build, Machine, Target

ROOT = pathlib.Path(__file__).parent.parent.parent

#: What the stable ABI needs of a compiler, the host's or nvcc.
TORCH = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-I", str(ROOT)]
TORCH += ["-isystem", str(pathlib.Path(torch.__file__).parent / "include")]


#: Compiled libraries by the hash of what they are made of: a minute of one core for each.
BUILT = ROOT / "build" / "cuda_on_host"
FLAGS = ["-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-O1", "-Wall", "-Wextra", "-Werror"]


@functools.cache  # a process can define the library's operations only once
def build() -> pathlib.Path:
    """Compiles csrc/cuda as torch.ops.zokernels_cuda_on_host, and loads it.

    All test files of a run share the library, whichever process asks first, and so do later runs of the same
    sources; the others wait for it.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, *FLAGS, *TORCH, *(["-mfma"] if "avx2" in _host.instruction_sets() else [])]
    libraries = ["-L", str(pathlib.Path(torch.__file__).parent / "lib"), "-ltorch", "-ltorch_cpu"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    found = hashlib.sha256(repr((command, version, torch.__version__)).encode())
    source = ROOT / "tests/cuda_on_host/library.cpp"
    csrc = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".cu", ".cuh", ".h"))
    for path in (source, *csrc):
        found.update(f"{path.relative_to(ROOT)} {path.stat().st_size} ".encode() + path.read_bytes())
    folder = BUILT / found.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "libcuda_on_host.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            kernels = [path.relative_to(ROOT) for path in csrc if path.suffix == ".cu"]
            (folder / "all.h").write_text("".join(f'#include "{path}"\n' for path in kernels))
            part = folder / "part.so"
            subprocess.run([*command, "-I", folder, source, "-o", part, *libraries], check=True)
            part.replace(target)
    torch.ops.load_library(target)
    return target


def use(operations: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations on CPU tensors go through the CUDA backend, and ``operations`` are
    torch.ops.zokernels_cuda to it.
    """
    monkeypatch.setattr(library, "load", lambda name: None)
    monkeypatch.setattr(torch.ops, "zokernels_cuda", operations)
    host_build = Build(13000, 13000, (Target.parse("90-real"),))
    backend = importlib.import_module("zokernels.backends.cuda").load(
        host_build, Machine("13.0", 13000, ((9, 0),))
    )
    backend = dataclasses.replace(backend, devices=frozenset(("cpu",)))
    monkeypatch.setitem(registry.PREFERENCE, "cpu", ("cuda",))
    monkeypatch.setitem(registry.LOADED, "cuda", backend)
