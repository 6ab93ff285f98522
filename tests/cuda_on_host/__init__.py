"""The CUDA library's host code for CPU tensors: built by the host compiler, and put in the place of the
real one.
"""

from __future__ import annotations

import dataclasses
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


#: The library that this process has loaded.
_loaded: pathlib.Path | None = None


def build(folder: pathlib.Path, *flags: str) -> pathlib.Path:
    """Compiles csrc/cuda as torch.ops.zokernels_cuda_on_host and loads it; ``flags``: for the compiler.

    A process can define its operations only once: a second test file that asks gets the library of the first.
    """
    global _loaded
    if _loaded is not None:
        return _loaded
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = folder / "libcuda_on_host.so"
    sources = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc/cuda").glob("*.cu"))
    (folder / "all.h").write_text("".join(f'#include "{source}"\n' for source in sources))
    command = [
        compiler,
        "-std=c++20",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        *TORCH,
        *flags,
    ]
    if "avx2" in _host.instruction_sets():
        command.append("-mfma")
    libraries = ["-L", str(pathlib.Path(torch.__file__).parent / "lib"), "-ltorch", "-ltorch_cpu"]
    source = ROOT / "tests/cuda_on_host/library.cpp"
    subprocess.run([*command, "-I", str(folder), str(source), "-o", str(target), *libraries], check=True)
    torch.ops.load_library(target)
    _loaded = target
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
    backend, load = dataclasses.replace(backend, devices=frozenset(("cpu",))), registry._load
    monkeypatch.setitem(registry.PREFERENCE, "cpu", ("cuda",))
    monkeypatch.setattr(registry, "_load", lambda name: backend if name == "cuda" else load(name))
