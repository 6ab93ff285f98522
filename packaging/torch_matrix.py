"""``make torch-matrix``: one wheel under every torch from 2.10 on, each in a folder of its own.

    python packaging/torch_matrix.py --wheel dist/zokernels-*-manylinux_2_28_x86_64.whl [--torch 2.10.0 ...]

Of most versions the index has CUDA builds alone, which ask for gigabytes of NVIDIA's packages. Nothing of
those is used on a machine without a GPU, so each library that torch names and does not bring is replaced by a
*stub*: its name, its functions, and a body that says "no device". torch then imports and computes on the CPU
as it always does. The download is torch's own wheel, about half a gigabyte a version, deleted afterwards.

What is run with each: the contract's bits on every instruction set, errors of the operations as torch shows
them, a step of an optimizer against the reference, and the README's lines. The output is the table of
docs/packaging.md.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

import manylinux
from manylinux import run

ROOT = pathlib.Path(__file__).resolve().parent.parent
VERSIONS = ["2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1"]
#: What torch imports besides itself; all of it is Python.
PURE = [
    "filelock",
    "typing_extensions",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
    "setuptools",
    "scikit-learn",  # and what it needs: the data of the README's first lines
    "scipy",
    "joblib",
    "threadpoolctl",
]
#: return 100: cudaErrorNoDevice, and no success of any other of NVIDIA's libraries.
BODY = {"x86_64": "mov $100, %eax; ret", "aarch64": "mov x0, #100; ret"}


def needed(tools: manylinux.Tools, library: pathlib.Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", run(tools.readelf, "-d", library))


def wanted(tools: manylinux.Tools, library: pathlib.Path) -> dict[str, set[str]]:
    """The versions of functions that a library asks of each of the others: {soname: versions}."""
    versions: dict[str, set[str]] = {}
    soname = ""
    for line in run(tools.readelf, "-W", "--version-info", library).splitlines():
        if found := re.search(r"Version: \d+ +File: (\S+)", line):
            soname = found[1]
        elif (found := re.search(r"Name: (\S+) +Flags", line)) and soname:
            versions.setdefault(soname, set()).add(found[1])
    return versions


def write_stubs(torch: pathlib.Path, folder: pathlib.Path, arch: str = platform.machine()) -> list[str]:
    """Stubs for the libraries that an installed torch names and that are neither in it nor the system's."""
    tools = manylinux.Tools(arch)
    folder.mkdir(parents=True, exist_ok=True)
    libraries = [p for p in (torch / "lib").iterdir() if ".so" in p.name and not p.is_symlink()]
    names = {name for library in libraries for name in needed(tools, library)} - {p.name for p in libraries}
    missing = sorted(n for n in names if re.match(r"lib(cu|nv|nccl)", n))
    versions: dict[str, set[str]] = {}
    functions: set[tuple[str, str]] = set()
    for library in libraries:
        functions |= tools.undefined(library)
        for soname, names in wanted(tools, library).items():
            versions.setdefault(soname, set()).update(names)
    for soname in missing:
        # A function without a version may be from any library, so each has them all.
        own = versions.get(soname, set())
        mine = {
            f
            for f in functions
            if f[1] in own or (not f[1] and re.match(r"_{0,2}(cu|nv|nccl)[a-zA-Z]", f[0]))
        }
        manylinux.write_stub(
            tools, soname, ((*one, "FUNC") for one in mine), folder, body=BODY[arch], versions=own
        )
    return missing


def check(python: str, paths: list[pathlib.Path], stubs: pathlib.Path, facts: list[str]) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ZOKERNELS"))}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "LD_LIBRARY_PATH": str(stubs)}
    script = ROOT / "packaging" / "use.py"
    done = subprocess.run(
        [python, str(script), str(paths[0])], env=environment, cwd=stubs, capture_output=True, text=True
    )
    if done.returncode != 0:
        return f"FAILED\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=pathlib.Path, required=True)
    parser.add_argument("--torch", nargs="+", default=VERSIONS)
    parser.add_argument(
        "--python", nargs="+", default=[sys.executable], help="interpreters, each with each torch"
    )
    arguments = parser.parse_args()
    failed = 0
    print("| torch | Python | download | result |\n|---|---|---|---|")
    for version in arguments.torch:
        for python in arguments.python:
            with tempfile.TemporaryDirectory() as name:
                folder = pathlib.Path(name)
                pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
                quiet = ["-q", "--no-deps", "--no-cache-dir"]
                run(*pip, "download", *quiet, "-d", folder / "wheels", f"torch=={version}")
                (torch,) = (folder / "wheels").glob("torch-*.whl")
                size = f"{torch.stat().st_size / 1e6:.0f} MB"
                run(*pip, "install", "--no-compile", *quiet, "--target", folder / "site", torch, *PURE)
                shutil.rmtree(folder / "wheels")
                run(*pip, "install", "--no-compile", *quiet, "--target", folder / "ours", arguments.wheel)
                stubs = write_stubs(folder / "site" / "torch", folder / "stubs")
                result = check(python, [folder / "ours", folder / "site"], folder / "stubs", stubs)
                failed += result.startswith("FAILED")
                which = run(python, "-c", "import platform; print(platform.python_version())").strip()
                print(
                    f"| {torch.name.split('-')[1]} | {which} | {size}, {len(stubs)} stubs | {result} |",
                    flush=True,
                )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
