"""``make hub``: this package in the layout that Hugging Face's kernel builder reads and its library
``kernels`` loads.

    python packaging/hub.py [--out build/hub] [--repo-id ORGANISATION/zokernels]

Writes the project ``build.toml``, ``CARD.md``, ``flake.nix`` and ``torch-ext/zokernels/``, and beside them
what the builder makes of it: ``build/torch-<backend>/``, which ``kernels.get_local_kernel`` loads. It is a
project of pure Python and Triton ("torch-noarch"): the backends ``reference`` and ``triton``, with the bits
of the compiled ones.

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
import json
import pathlib
import shutil

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
    ("ops/define.py", 'f"zokernels::{name}"', "add_op_namespace_prefix(name)"),
    ("ops/define.py", "getattr(torch.ops.zokernels, name)", "getattr(getattr(torch.ops, _LIBRARY.ns), name)"),
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
with the same bits on every backend and device. This is the part in pure Python and Triton; the package
`zokernels` adds CUDA C++ and CPU kernels with the same bits.

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


def make(out: pathlib.Path, repo: str) -> pathlib.Path:
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
    files["CARD.md"] = CARD.format(repo=repo, functions=listed)
    write(project, files)
    write(project / "torch-ext" / "zokernels", modules)
    for backend in BACKENDS:
        name = f"_zokernels_{backend}_{unique}"
        variant = project / "build" / f"torch-{backend}"
        write(variant, {**modules, "_ops.py": OPS.format(name=name)})
        digests = {
            path.relative_to(variant).as_posix(): base64.b64encode(
                hashlib.sha256(path.read_bytes()).digest()
            ).decode()
            for path in sorted(variant.rglob("*.py"))
        }
        metadata = {
            "id": name,
            "name": "zokernels",
            "version": 0,
            "license": "Apache-2.0",
            "python-depends": [],
        }
        metadata |= {"backend": {"type": backend}, "digest": {"algorithm": "sha256", "files": digests}}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return project


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "hub")
    parser.add_argument("--repo-id", default="zokernels/zokernels")
    arguments = parser.parse_args()
    print(make(arguments.out, arguments.repo_id))
