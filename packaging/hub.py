"""``make hub``: this package in the layout that Hugging Face's kernel builder reads and its library
``kernels`` loads.

    python packaging/hub.py [--out build/hub] [--repo-id ORGANISATION/zokernels] [--compiled]

Writes the project ``build.toml``, ``CARD.md``, ``flake.nix`` and ``torch-ext/zokernels/``, and beside them
what the builder makes of it: ``build/torch-<backend>/``, which ``kernels.get_local_kernel`` loads. It is a
project of pure Python and Triton ("torch-noarch"): the backends ``reference`` and ``triton``, with the bits
of the compiled ones.

``--compiled`` adds ``build/torch-stable-abi210-cpu-<arch>-linux/``: the same with the CPU kernels, compiled
as for the wheels (manylinux.py), for torch 2.10 and later and any Python.  The builder itself, which needs
Nix, does not compile these: it has no place for a source that is compiled once for each instruction set.

The Hub asks three things of a package that this tree does not do, and here they are done to the copy:

* Its modules import each other relatively, wherever the package lies. They do so already.
* Several versions live in one process, so operations are registered as ``torch.ops.<id>`` with an id made
  from the sources, where an installed package has ``torch.ops.zokernels``.
* Nothing but torch is imported. The command line, the programs and the bridges to other libraries stay out.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig

import manylinux

ROOT = pathlib.Path(__file__).resolve().parent.parent
BACKENDS = ("cpu", "cuda")
#: Of the package, what stays out: programs, bridges, the command line and what it alone uses.
LEFT_OUT = {"bench", "examples", "integrations", "lib", "cli.py", "commands.py", "report.py", "__main__.py"}
NAMESPACE = "from .._ops import add_op_namespace_prefix\n"
#: What the copy has instead: (file, before, after), each exactly once.
CHANGED = [
    (
        "ops/define.py",
        "from ..backends.terms import Terms\n",
        f"{NAMESPACE}from ..backends.terms import Terms\n",
    ),
    ("ops/define.py", 'Library("zokernels", "DEF")', 'Library(add_op_namespace_prefix("")[:-2], "DEF")'),
    ("backends/library.py", 'f"zokernels_{name}"', 'add_op_namespace_prefix("")[:-2] + f"_{name}"'),
    ("backends/library.py", "from ..contract import DISTS\n", f"{NAMESPACE}from ..contract import DISTS\n"),
]
#: The builder writes a module with these two names. This one is for the folders that are written here.
OPS = '''\
"""The namespace under which this build registers its operations: ``torch.ops.{name}``."""

import torch

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
'''
BUILD = """\
[general]
name = "zokernels"
version = 0
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[general.hub]
repo-id = "{repo}"

[torch-noarch]
"""
FLAKE = """\
{
  description = "zokernels: fused kernels for zeroth-order training";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""
CARD = """\
---
library_name: kernels
license: apache-2.0
---

Fused kernels for zeroth-order training: noise regenerated from a seed and applied to the weights in one pass,
with the same bits on every backend and device. {parts}

## How to use

```python
import torch
from kernels import get_kernel

zokernels = get_kernel("{repo}", version=0)
theta = torch.zeros(1000, dtype=torch.bfloat16)
zokernels.combine_(theta, 7, 1e-3, streams=zokernels.stream_of("layer.weight"))
```

## Available functions

{functions}
"""
#: What the card says of the parts.
PURE = """\
This is the part in pure Python and Triton; the package
`zokernels` adds CUDA C++ and CPU kernels with the same bits."""
COMPILED = """\
In Python, Triton and, for the CPU, C++ (AVX2, AVX-512,
NEON); the package `zokernels` adds CUDA C++ with the same bits."""


def sources() -> dict[str, str]:
    """The package's modules as the Hub has them: {path: text}."""
    package = ROOT / "zokernels"
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in LEFT_OUT:
            found[name.as_posix()] = path.read_text()
    for name, before, after in CHANGED:
        count = found[name].count(before)
        if count != 1:
            raise SystemExit(f"hub: {name}: expected {before!r} once, got it {count} times")
        found[name] = found[name].replace(before, after)
    for name, text in found.items():
        for node in ast.walk(ast.parse(text)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            if any(module.split(".")[0] == "zokernels" for module in modules):
                raise SystemExit(f"hub: {name}, line {node.lineno}: expected a relative import")
            # In a call such as import_module(...), a name that is not relative means the installed package.
            for value in node.args if isinstance(node, ast.Call) else ():
                if isinstance(value, ast.Constant) and str(value.value).startswith("zokernels."):
                    raise SystemExit(f"hub: {name}, line {node.lineno}: expected a module's relative name")
    return found


def functions(text: str) -> list[str]:
    """``__all__`` of the package, which is its interface for the Hub."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return list(ast.literal_eval(node.value))
    raise SystemExit("hub: __init__.py: expected __all__")


def write(folder: pathlib.Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_variant(variant: pathlib.Path, name: str, backend: str, modules: dict[str, str]) -> None:
    """A folder that ``kernels`` loads: the modules, and metadata with a digest of every file there."""
    write(variant, {**modules, "_ops.py": OPS.format(name=name)})
    digests = {
        path.relative_to(variant).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "id": name,
        "name": "zokernels",
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def native_digest() -> str:
    """Of everything that the CPU library is compiled from."""
    digest = hashlib.sha256()
    for path in sorted([ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*")]):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:7]


def compile_cpu(namespace: str, library: pathlib.Path) -> None:
    """Compiles the CPU kernels as ``torch.ops.<namespace>``, in the folder that the wheels use."""
    torch = pathlib.Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    policy = f"manylinux_2_28_{platform.machine()}"
    toolchain = manylinux.make(platform.machine(), ROOT / "build" / policy, torch / "lib")
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{policy}"
    settings = {
        "CMAKE_TOOLCHAIN_FILE": toolchain,
        "CMAKE_BUILD_TYPE": "Release",
        "TORCH_INCLUDE": torch / "include",
        "TORCH_LIB": torch / "lib",
        "ZOKERNELS_CUDA": "0",
        "ZOKERNELS_HUB": namespace,
        "ZOKERNELS_TESTS": "OFF",
    }
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        sys.exit("hub: cmake and ninja are needed to compile: pip install cmake ninja")
    defines = [f"-D{key}={value}" for key, value in settings.items()]
    for step in (
        ["-G", "Ninja", "-S", ROOT, "-B", folder, f"-DCMAKE_MAKE_PROGRAM={ninja}", *defines],
        ["--build", folder, "--target", "zokernels_hub"],
    ):
        subprocess.run([cmake, *map(str, step)], check=True, env=environment)
    library.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "libzokernels_hub.so", library)


def make(out: pathlib.Path, repo: str, compiled: bool = False) -> pathlib.Path:
    """Writes the project into ``out/zokernels`` and returns that folder."""
    project = out / "zokernels"
    shutil.rmtree(project, ignore_errors=True)
    modules = sources()
    unique = hashlib.sha256(json.dumps(modules, sort_keys=True).encode()).hexdigest()[:7]
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    listed = "\n".join(
        f"- `{name}`" for name in functions(modules["__init__.py"]) if not name.startswith("_")
    )
    files = {"build.toml": BUILD.format(backends=backends, repo=repo), "flake.nix": FLAKE}
    files["CARD.md"] = CARD.format(repo=repo, functions=listed, parts=COMPILED if compiled else PURE)
    write(project, files)
    write(project / "torch-ext" / "zokernels", modules)
    for backend in BACKENDS:
        name = f"_zokernels_{backend}_{unique}"
        write_variant(project / "build" / f"torch-{backend}", name, backend, modules)
    if compiled:
        name = f"_zokernels_cpu_{unique}{native_digest()}"
        variant = project / "build" / f"torch-stable-abi210-cpu-{platform.machine()}-linux"
        compile_cpu(f"{name}_cpu", variant / "lib" / "libzokernels_cpu.so")
        write_variant(variant, name, "cpu", modules)
    return project


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "hub")
    parser.add_argument("--repo-id", default="zokernels/zokernels")
    parser.add_argument("--compiled", action="store_true", help="also compile the CPU kernels")
    arguments = parser.parse_args()
    print(make(arguments.out, arguments.repo_id, arguments.compiled))
