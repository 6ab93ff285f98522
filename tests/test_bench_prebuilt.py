"""What is carried to a machine without a compiler: it loads elsewhere, and what does not fit is refused."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import test_packaging
import torch

from bench.gpu import prebuilt, stages
from bench.gpu.stage import Context, Failure

ROOT = pathlib.Path(__file__).resolve().parent.parent
SITE = test_packaging.SITE
HOST = f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"

built = test_packaging.built

#: Run in a copy of the tree: where its libraries come from, and the contract's first normals by them.
USE = """
import json, pathlib, sys, sysconfig, torch, zokernels
from zokernels.backends import library
root = pathlib.Path(sys.argv[1])
assert pathlib.Path(zokernels.__file__).is_relative_to(root), zokernels.__file__
theta = torch.full((4,), -0.0)
with zokernels.backend("cpu"):
    zokernels.combine_(theta, 0, 1.0, streams=0)
loaded = {line.split()[-1] for line in open("/proc/self/maps") if "libzokernels" in line}
assert loaded == {str(library.path_of("cpu"))}, loaded
# Its undefined symbols are those of torch's C shim, so that it loads where there is no CUDA too
torch.ops.load_library(library.path_of("cuda"))
torch.ops.zokernels_cuda.combine
try:
    from zokernels import _host
    host = _host.__file__.rsplit("/", 1)[-1] == "_host" + sysconfig.get_config_var("EXT_SUFFIX")
except ImportError:
    host = None
print(json.dumps({
    "host": host, "torch": torch.__version__, "python": sys.version_info[:2],
    "bits": " ".join(f"{b & 0xFFFFFFFF:08x}" for b in theta.view(torch.int32).tolist()),
}))
"""


@pytest.fixture(scope="module")
def carried(built, tmp_path_factory) -> pathlib.Path:
    """The folder that ``make gpu-prebuilt`` makes, of the libraries that this tree holds."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    if not (ROOT / "zokernels/lib/libzokernels_cuda.so").exists():
        pytest.skip("the CUDA library is not built")
    folder = tmp_path_factory.mktemp("carried") / "prebuilt"
    prebuilt.make(folder, test_packaging.settings(built)["TORCH_CUDA_ARCH_LIST"])
    return folder


@pytest.fixture
def copy(tmp_path) -> pathlib.Path:
    """The tree as it travels: without git and without anything that git ignores."""
    ignored = (".git", ".venv", "build", "dist", "prebuilt", "*.so", "__pycache__", "*_cache")
    ignore = shutil.ignore_patterns(*ignored)
    return pathlib.Path(shutil.copytree(ROOT, tmp_path / "tree", symlinks=True, ignore=ignore))


def environments(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    """An empty environment of this Python with this torch, without pip, compilers and the package; and those
    of ZOKERNELS_OTHER_TORCH, each with a Python and a torch of its own.
    """
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    (next((tmp_path / "venv").glob("lib/python*/site-packages")) / "torch.pth").write_text(f"{SITE}\n")
    others = [p for p in os.environ.get("ZOKERNELS_OTHER_TORCH", "").split(os.pathsep) if p]
    return [tmp_path / "venv/bin/python", *map(pathlib.Path, others)]


def run(*command: object, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def test_it_loads_in_another_environment(carried, copy, tmp_path):
    """gpu-check --prebuilt in a copy of the tree, with nothing on PATH but the interpreter: no compiler, no
    git.
    """
    for python in environments(tmp_path):
        variables = {"PATH": str(python.parent), "HOME": str(tmp_path), "LANG": "C.UTF-8"}
        for native in (*copy.glob("zokernels/lib/*"), *copy.glob("zokernels/_host*")):
            native.unlink()  # of the environment before
        arguments = (
            "--rehearse",
            "--prebuilt",
            carried,
            "--out",
            tmp_path / "out",
            "--commit",
            "abc123",
            "--only",
        )
        check = (
            python,
            "-m",
            "bench",
            "gpu-check",
            *arguments,
            "libraries",
            "report",
            "agreement-cuda",
            "math",
        )
        run(*check, cwd=copy, env=variables)
        result = json.loads((tmp_path / "out/rehearsal/result.json").read_text())
        notes = {s["name"]: (s["status"], s["note"]) for s in result["stages"]}
        assert result["machine"]["commit"] == "abc123"
        assert notes["libraries"][0] == "passed"
        assert notes["libraries"][1].startswith("carried: nvcc ")
        assert notes["agreement-cuda"] == ("passed", "cpu: 4 calls equal the reference bit for bit")
        if not torch.cuda.is_available():
            assert notes["math"] == ("skipped", "carried; no GPU to run it on")
        variables["PYTHONPATH"] = str(copy)
        found = json.loads(run(python, "-c", USE, copy, cwd=copy, env=variables).stdout)
        assert found["bits"] == test_packaging.GOLDEN, (python, found)
        said = "without the host module" in notes["libraries"][1]
        assert found["host"] is (None if said else True), (python, found)
        print(f"loaded under Python {found['python']} and torch {found['torch']}")


def test_what_is_carried_is_small_and_stable(carried):
    files = [p for p in carried.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 64 * 2**20
    names = {p.relative_to(carried).as_posix() for p in files}
    fixed = {
        "lib/libzokernels_cpu.so",
        "lib/libzokernels_cuda.so",
        "check_math",
        "libcurand_perturb.so",
        HOST,
    }
    assert names >= {*fixed, "manifest.json"}
    assert {n for n in names - fixed - {"manifest.json"} if not n.startswith("_host.cpython-")} == set()
    if (nm := shutil.which("nm")) is None:
        pytest.skip("no nm")
    for name in names - {"manifest.json"}:
        undefined = run(nm, "-D", "--undefined-only", carried / name).stdout
        symbols = [line.split()[-1] for line in undefined.splitlines()]
        torchs = [s for s in symbols if "torch" in s or re.search(r"2at|3c10|5caffe", s)]
        assert all(re.match(r"(aoti_)?torch_\w+$", s) for s in torchs), (
            name,
            torchs,
        )  # C functions of the shim
        assert bool(torchs) == name.startswith("lib/"), name
        pythons = [s for s in symbols if s.startswith(("Py", "_Py"))]
        assert bool(pythons) == name.startswith("_host"), name


def test_the_baseline_that_was_carried_is_the_one_that_is_loaded(carried, monkeypatch):
    from bench import curand
    from bench.curand import call

    monkeypatch.setenv(curand.CARRIED, str(carried))
    monkeypatch.setattr(call, "compile_library", lambda *a: pytest.fail("it was compiled"))
    call._function.cache_clear()
    try:
        assert call._function() is not None
    finally:
        call._function.cache_clear()


# --- what does not fit
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
    """A small source tree and what was built of it: files of a few bytes instead of libraries."""
    root, folder = tmp_path / "root", tmp_path / "made"
    (root / "csrc").mkdir(parents=True)
    (root / "zokernels").mkdir()
    (root / "csrc/a.cu").write_text("one")
    (root / "setup.py").write_text("two")
    (folder / "lib").mkdir(parents=True)
    files = {"lib/libzokernels_cuda.so": b"cuda", HOST: b"host", "_host.cpython-39-aarch64.so": b"other"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest = {
        "sources": prebuilt.sources_hash(root),
        "architectures": ["8.0", "9.0"],
        "commit": "abc",
        "nvcc": "13",
    }
    manifest["files"] = {name: prebuilt._hash(folder / name) for name in files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return root, folder


def test_install_puts_what_this_python_loads(tree):
    root, folder = tree
    (root / "zokernels/lib").mkdir()
    (root / "zokernels/lib/libzokernels_cuda.so").write_bytes(b"an earlier one")
    assert prebuilt.install(folder, root, "9.0") == "carried: nvcc 13, 8.0, 9.0"
    found = {p.relative_to(root).as_posix(): p.read_bytes() for p in (root / "zokernels").rglob("*.so")}
    assert found == {"zokernels/lib/libzokernels_cuda.so": b"cuda", f"zokernels/{HOST}": b"host"}


def test_another_python_goes_without_the_host_module_and_it_is_said(tree, monkeypatch):
    root, folder = tree
    monkeypatch.setattr(prebuilt.sysconfig, "get_config_var", lambda name: ".cpython-399-x86_64-linux-gnu.so")
    note = prebuilt.install(folder, root, "9.0")
    there, wanted = f"{HOST}, _host.cpython-39-aarch64.so", "_host.cpython-399-x86_64-linux-gnu.so"
    assert note.endswith(f"without the host module, which is there for {there} and not as {wanted}")
    assert not list((root / "zokernels").glob("_host*"))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda root, folder: (root / "csrc/a.cu").write_text("two"), "built of other sources"),
        (lambda root, folder: (root / "csrc/b.h").write_text(""), "built of other sources"),
        (lambda root, folder: (folder / HOST).write_bytes(b"h0st"), f"{HOST} is missing or damaged"),
        (lambda root, folder: (folder / "lib/libzokernels_cuda.so").unlink(), "is missing or damaged"),
        (lambda root, folder: (folder / "manifest.json").write_text("{"), "no readable manifest.json"),
    ],
    ids=["changed", "added", "damaged", "missing", "manifest"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tree, spoil, reason):
    root, folder = tree
    spoil(root, folder)
    with pytest.raises(prebuilt.Unusable, match=re.escape(reason)):
        prebuilt.install(folder, root, "9.0")
    assert list((root / "zokernels").iterdir()) == []


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("9.0", "9.0", True),
        ("8.0", "8.9", True),
        ("8.9", "8.0", False),
        ("8.0", "9.0", False),
        ("9.0+PTX", "10.0", True),
        ("12.0+PTX", "9.0", False),
        ("9.0", "10.0", False),
    ],
)
def test_which_gpus_code_runs_on(built, capability, runs):
    assert prebuilt.runs_on(built, capability) is runs


def test_other_gpus_are_refused(tree):
    root, folder = tree
    with pytest.raises(prebuilt.Unusable, match=r"it is for 8\.0, 9\.0, and this GPU is 10\.0"):
        prebuilt.install(folder, root, "10.0")


def test_the_stage_says_what_is_wrong_and_builds(tree, tmp_path, monkeypatch):
    """On a GPU it falls back to the compiler; in a rehearsal, where nothing is built, it fails."""
    _, folder = tree
    with pytest.raises(Failure, match=r"what was carried cannot be used .*other sources"):
        stages.libraries(Context(tmp_path, tmp_path, rehearse=True, prebuilt=folder))
    commands = []
    monkeypatch.setattr(stages.shutil, "which", lambda tool: f"/bin/{tool}")
    built = lambda arguments, **env: (commands.append((arguments[1:], env)), (0, ""))[1]
    monkeypatch.setattr(stages, "run", built)
    note = stages.libraries(Context(tmp_path, tmp_path, "9.0", prebuilt=folder))
    assert re.fullmatch(r"what was carried cannot be used \(it was built of other sources .*\); built", note)
    assert commands == [
        (["setup.py", "build_ext", "--inplace"], {"TORCH_CUDA_ARCH_LIST": "9.0", "ZOKERNELS_CUDA": "1"})
    ]


def test_a_folder_of_something_else_is_not_deleted(tmp_path):
    (tmp_path / "theirs").write_text("mine")
    with pytest.raises(SystemExit, match="expected an empty folder or one of this command"):
        prebuilt.make(tmp_path, "9.0")
    assert (tmp_path / "theirs").read_text() == "mine"
