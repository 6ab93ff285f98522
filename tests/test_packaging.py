"""The wheel, the sdist and the C++ tests, as someone else would build, install, use and remove them."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile

import pytest

import zokernels
from zokernels.examples import encoder, reviews
from zokernels.trajectory import read

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
#: Where torch and what it needs lie: an empty environment gets this folder by a .pth file instead of a
#: download.
SITE = pathlib.Path(importlib.util.find_spec("torch").origin).parent.parent

SCRIPTS = pathlib.Path(sysconfig.get_path("scripts"))

#: What an installed package must do: kernels with the contract's bits, from the folder that it was installed
#: to.
USE = """
import pathlib, sys, torch, zokernels
assert pathlib.Path(zokernels.__file__).is_relative_to(sys.argv[1]), zokernels.__file__
theta = torch.full((4,), -0.0)
with zokernels.backend("cpu"):
    zokernels.combine_(theta, 0, 1.0, streams=0)
print(" ".join(f"{b & 0xFFFFFFFF:08x}" for b in theta.view(torch.int32).tolist()))
"""
WHERE = """
import pathlib, sys, zokernels.examples.encoder as encoder, zokernels.integrations.transformers as integration
for module in (encoder, integration):
    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
print("here")
"""
PROGRAMS = """
import zokernels.bench.machine as machine, zokernels.examples.encoder as encoder
print(machine.__file__, encoder.__file__)
"""
GOLDEN = "3fab67a2 bf030c3e 3fe72676 bf395d96"  # the first normals of tests/golden.json


def run(*command: object, **options) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"SOURCE_DATE_EPOCH": "1700000000", **options.pop("env", {})}
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env=environment, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built() -> pathlib.Path:
    """The folder in which this tree was built: what follows compiles nothing anew."""
    cache = BUILD / "CMakeCache.txt"
    if not cache.exists() or f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        pytest.skip("this tree was not built here: python setup.py build_ext --inplace")
    return BUILD


def settings(built: pathlib.Path) -> dict[str, str]:
    """The variables that configure the build as it is: with or without CUDA, and for which architectures."""
    cache = dict(re.findall(r"^(\w+):STRING=(.*)$", (built / "CMakeCache.txt").read_text(), re.M))
    codes = [
        re.sub(r"(\d)(-real)?$", r".\1" if "-real" in c else r".\1+PTX", c)
        for c in cache["ZOKERNELS_CUDA_ARCHS"].split(";")
    ]
    return {"ZOKERNELS_CUDA": cache["ZOKERNELS_CUDA"], "TORCH_CUDA_ARCH_LIST": ";".join(codes)}


@pytest.mark.parametrize("target", ["wheel", "wheels", "gpu-prebuilt"])
def test_make_leaves_the_architectures_to_the_programs(target, tmp_path):
    """The tree itself is built for one; what is given away is not, unless that is asked for."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    text = (ROOT / "Makefile").read_text()
    shows = f'{target}:\n\t@echo "[$$TORCH_CUDA_ARCH_LIST]"\n'  # in the place of what it needs and does
    text, count = re.subn(rf"^{target}: .*\n(\t.*\n)+", lambda _: shows, text, flags=re.M)
    assert count == 1
    (tmp_path / "Makefile").write_text(text)
    found = lambda *variable: run("env", *variable, "make", "-s", "-C", tmp_path, target).splitlines()[-1]
    assert found("-u", "TORCH_CUDA_ARCH_LIST") == "[]"
    assert found("TORCH_CUDA_ARCH_LIST=8.0") == "[8.0]"


def make_wheel(built: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    code = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    name = run(sys.executable, "-c", code, folder, cwd=ROOT, env=settings(built)).splitlines()[-1]
    return folder / name


@pytest.fixture(scope="module")
def wheel(built, tmp_path_factory) -> pathlib.Path:
    return make_wheel(built, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> pathlib.Path:
    """An empty environment with the wheel in it, and nothing of this tree."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "torch_from_elsewhere.pth").write_text(f"{SITE}\n")
    pip(folder, "install", "--no-deps", "--no-index", wheel)
    return folder


def pip(folder: pathlib.Path, *arguments: object) -> None:
    run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "-q", *arguments)


def test_one_wheel_for_every_python_and_torch(wheel):
    assert re.fullmatch(rf"zokernels-{re.escape(zokernels.__version__)}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    native = sorted(n for n in names if n.endswith(".so"))
    host = f"zokernels/_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert set(native) - {"zokernels/lib/libzokernels_cuda.so"} == {host, "zokernels/lib/libzokernels_cpu.so"}
    for needed in ("py.typed", "bench/page.css", "bench/curand/perturb.cu", "examples/demo-requirements.txt"):
        assert f"zokernels/{needed}" in names
    for folder in ("bench", "examples"):  # of the tree, with all that lies below them
        programs = [p.relative_to(ROOT) for p in (ROOT / folder).rglob("*.py")]
        assert {f"zokernels/{p}" for p in programs} <= set(names)
    assert {n.split("/")[0] for n in names} == {"zokernels", f"zokernels-{zokernels.__version__}.dist-info"}
    assert f"\nVersion: {zokernels.__version__}\n" in metadata
    assert "\nRequires-Dist: torch>=2.10\n" in metadata


def test_the_same_sources_give_the_same_wheel(built, wheel, tmp_path):
    """Also after an isolated build, whose ninja lay in an environment that is gone."""
    cache = built / "CMakeCache.txt"
    gone = re.sub(
        r"^CMAKE_MAKE_PROGRAM:\w+=.*$",
        "CMAKE_MAKE_PROGRAM:FILEPATH=/gone/ninja",
        cache.read_text(),
        flags=re.M,
    )
    assert "/gone/ninja" in gone
    cache.write_text(gone)
    assert make_wheel(built, tmp_path).read_bytes() == wheel.read_bytes()


def test_no_library_names_a_folder_of_this_machine(wheel):
    with zipfile.ZipFile(wheel) as archive:
        for name in (n for n in archive.namelist() if n.endswith(".so")):
            for folder in {str(ROOT), str(SITE), str(pathlib.Path.home())} - {"/"}:
                assert folder.encode() not in archive.read(name), (name, folder)


def test_installed_wheel_computes(environment):
    python = environment / "bin" / "python"
    assert run(python, "-c", USE, environment, cwd=environment).strip() == GOLDEN
    command = environment / "bin" / "zokernels"
    assert zokernels.__version__ in run(command, cwd=environment)
    assert "combine" in run(command, "bench", "list", cwd=environment)


@pytest.fixture
def weights_and_sentences(tmp_path) -> pathlib.Path:
    """An empty folder to work in.  It holds the demo's reviews if this machine has them."""
    if missing := [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"no {missing[0]}")
    try:
        archive = reviews.fetch()
        encoder.folder()
    except SystemExit as error:
        pytest.skip(str(error))
    there = tmp_path / "zokernels-demo" / "demo-data"
    there.mkdir(parents=True)
    shutil.copy(archive, there)
    return tmp_path


@pytest.mark.slow
def test_a_script_killed_half_way_ends_with_the_same_bits(environment, weights_and_sentences):
    """The script of docs/transformers.md, copied to an empty folder, runs twice with the wheel alone."""
    folder = weights_and_sentences
    script = shutil.copy(ROOT / "examples" / "transformers_trainer.py", folder)
    assert run(environment / "bin" / "python", "-c", WHERE, environment, cwd=folder)
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    outputs = {name: (folder / f"{name}.txt").open("ab") for name in ("whole", "part")}

    def start(name: str) -> subprocess.Popen:
        command = [environment / "bin" / "python", script, name, "4"]
        return subprocess.Popen(
            command, cwd=folder, env=variables, stdout=outputs[name], stderr=outputs[name]
        )

    whole, part = start("whole"), start("part")
    checkpoint = folder / "part" / "checkpoint-2" / "trainer_state.json"
    # its last file; the next checkpoint is two steps away
    while part.poll() is None and not checkpoint.exists():
        time.sleep(2e-3)
    part.kill()
    assert part.wait() == -9, (folder / "part.txt").read_text()
    assert 2 <= read(folder / "part" / "run.zk", recover=True).steps <= 4
    assert not (folder / "part" / "model.safetensors").exists()
    for name, child in (("part", start("part")), ("whole", whole)):
        assert child.wait(600) == 0, (folder / f"{name}.txt").read_text()
    for file in ("model.safetensors", "run.zk"):
        assert (folder / "part" / file).read_bytes() == (folder / "whole" / file).read_bytes()
    assert read(folder / "whole" / "run.zk").steps == 4
    assert "eval_accuracy" in (folder / "part.txt").read_text()


def test_without_its_host_module_it_computes_and_says_so(environment, tmp_path):
    """This is the case under a Python for which none was built."""
    shutil.copytree(next(environment.glob("lib/python*/site-packages/zokernels")), tmp_path / "zokernels")
    for module in (tmp_path / "zokernels").glob("_host*"):
        module.unlink()
    python, path = environment / "bin" / "python", {"PYTHONPATH": str(tmp_path)}
    assert run(python, "-c", USE, tmp_path, env=path, cwd=tmp_path).strip() == GOLDEN
    report = run(python, "-m", "zokernels", env=path, cwd=tmp_path)
    assert re.search(r"host module +not built", report)
    assert re.search(r"backend cpu +ready", report)


def test_other_torch_versions(environment):
    """The same files under the interpreters of ZOKERNELS_OTHER_TORCH, each with a torch of its own."""
    others = [p for p in os.environ.get("ZOKERNELS_OTHER_TORCH", "").split(os.pathsep) if p]
    if not others:
        pytest.skip(
            "ZOKERNELS_OTHER_TORCH names no interpreter with another torch (docs/packaging.md has "
            "what was run)"
        )
    site = next(environment.glob("lib/python*/site-packages"))
    for python in others:
        assert run(python, "-c", USE, site, env={"PYTHONPATH": str(site)}, cwd=site).strip() == GOLDEN, python


def test_uninstalling_leaves_nothing(wheel, environment, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    listing = lambda: sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    (next(tmp_path.glob("lib/python*/site-packages")) / "torch_from_elsewhere.pth").write_text(f"{SITE}\n")
    before = listing()
    pip(tmp_path, "install", "--no-deps", "--no-index", wheel)
    assert listing() != before
    run(tmp_path / "bin" / "python", "-c", USE, tmp_path, cwd=tmp_path)
    pip(tmp_path, "uninstall", "-y", "zokernels")
    assert listing() == before


def test_sdist_is_whole_and_reproducible(built, tmp_path):
    code = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(
            tmp_path / name / run(sys.executable, "-c", code, tmp_path / name, cwd=ROOT).splitlines()[-1]
        )
    assert made[0].read_bytes() == made[1].read_bytes()
    with tarfile.open(made[0]) as archive:
        archive.extractall(tmp_path, filter="data") if hasattr(
            tarfile, "data_filter"
        ) else archive.extractall(tmp_path)
    tree = tmp_path / f"zokernels-{zokernels.__version__}"
    assert not [p for p in tree.rglob("*") if p.suffix in (".so", ".pyc") or p.is_symlink()]
    tracked = ("csrc", "zokernels", "tests", "bench", "examples", "docs")
    for folder in tracked:
        here = {
            p.relative_to(ROOT)
            for p in (ROOT / folder).rglob("*.*")
            if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
        }
        there = {p.relative_to(tree) for p in (tree / folder).rglob("*.*")}
        assert here <= there, sorted(here - there)[:5]
    # CMake finds every source that it names; compiling them again would take minutes.
    torch = SITE / "torch"
    defines = {"TORCH_INCLUDE": torch / "include", "TORCH_LIB": torch / "lib", "ZOKERNELS_CUDA": "0"}
    cmake = SCRIPTS / "cmake"
    run(
        *(cmake if cmake.exists() else "cmake", "-G", "Ninja", "-S", tree, "-B", tmp_path / "configured"),
        *(f"-D{key}={value}" for key, value in defines.items()),
        env={"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"},
    )


@pytest.mark.parametrize("cuda", ["auto", "0"])
def test_every_command_of_the_build_can_be_run(cuda, tmp_path):
    """With the default architectures, of which there are several, and with and without CUDA: as a shell
    reads them.
    """
    import pybind11

    torch, environment = SITE / "torch", {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    defines = {"TORCH_INCLUDE": torch / "include", "TORCH_LIB": torch / "lib", "ZOKERNELS_CUDA": cuda}
    defines |= {"PYBIND11_INCLUDE": pybind11.get_include(), "ZOKERNELS_PYTHONS": sys.executable}
    cmake, ninja = (shutil.which(tool, path=environment["PATH"]) for tool in ("cmake", "ninja"))
    told = run(
        cmake,
        "-G",
        "Ninja",
        "-S",
        ROOT,
        "-B",
        tmp_path,
        *(f"-D{k}={v}" for k, v in defines.items()),
        env=environment,
    )
    commands = run(ninja, "-C", tmp_path, "-t", "commands", env=environment)
    assert "csrc/host/module.cpp" in commands
    assert ("csrc/cuda/combine.cu" in commands) == ("CUDA library: built by" in told)
    run("sh", "-n", "-c", commands)


def test_cpp(built):
    """ctest, in the folder that has the kernels compiled."""
    path = {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    cmake, ctest = (shutil.which(tool, path=path["PATH"]) for tool in ("cmake", "ctest"))
    run(cmake, "-DZOKERNELS_TESTS=ON", BUILD, env=path)
    run(cmake, "--build", BUILD, env=path)
    out = run(ctest, "--test-dir", BUILD, "--output-on-failure", env=path)
    assert re.search(r"100% tests passed.* out of [1-9]", out), out


def test_the_version_stands_in_one_place():
    pattern = re.compile(rf"(?<![\d.]){re.escape(zokernels.__version__)}(?![\d.])")
    texts = [
        ROOT / name for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "Makefile")
    ]
    texts += [p for p in (ROOT / "zokernels").rglob("*.py") if p.name != "version.py"]
    assert not [str(p) for p in texts if pattern.search(p.read_text())]
    first = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert pattern.search(first.group(1)), f"CHANGELOG.md begins with {first.group(1)!r}"


def test_native_libraries_call_only_the_stable_interface(wheel, tmp_path):
    """The undefined symbols of all libraries in the wheel are of torch's C shim, and not of its C++."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [archive.extract(n, tmp_path) for n in archive.namelist() if n.endswith(".so")]
    for library in libraries:
        symbols = [
            line.split(maxsplit=1)[-1] for line in run(nm, "-DC", "--undefined-only", library).splitlines()
        ]
        assert symbols
        bad = [s for s in symbols if re.search(r"\b(at|c10|torch|caffe2)::", s)]
        assert not bad, (library, bad[:5])
        if "_host" in pathlib.Path(library).name:  # no tensor: nothing of torch at all
            assert not [s for s in symbols if "aoti" in s or "torch" in s]
        else:
            assert not [s for s in symbols if s.startswith(("Py", "_Py"))], (
                "an interpreter's symbol in a tensor library"
            )


def test_a_source_tree_has_its_programs_in_the_package(tmp_path):
    """They are the folders ``bench`` and ``examples`` beside the package, without any installation."""
    found = run(sys.executable, "-c", PROGRAMS, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert found.split() == [str(ROOT / "bench" / "machine.py"), str(ROOT / "examples" / "encoder.py")]


def test_an_editable_install_runs_the_programs_of_the_tree(built, tmp_path):
    """From another folder it uses what was built in the tree, and the programs of the tree."""
    code = "from setuptools import build_meta; import sys; print(build_meta.build_editable(sys.argv[1]))"
    name = run(sys.executable, "-c", code, tmp_path, cwd=ROOT, env=settings(built)).splitlines()[-1]
    folder = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (next(folder.glob("lib/python*/site-packages")) / "torch_from_elsewhere.pth").write_text(f"{SITE}\n")
    pip(folder, "install", "--no-deps", "--no-index", tmp_path / name)
    found = run(folder / "bin" / "python", "-c", PROGRAMS, cwd=tmp_path)
    assert found.split() == [str(ROOT / "bench" / "machine.py"), str(ROOT / "examples" / "encoder.py")]
    assert run(folder / "bin" / "python", "-c", USE, ROOT, cwd=tmp_path).strip() == GOLDEN
    assert "combine" in run(folder / "bin" / "zokernels", "bench", "list", cwd=tmp_path)


def test_wheels_refuse_functions_of_a_newer_system(tmp_path, monkeypatch):
    """A module of Python may leave functions open for Python, but none that the oldest system lacks."""
    compiler = shutil.which("g++")
    if compiler is None or not (ROOT / "packaging" / "wheels.py").exists():
        pytest.skip("no g++, or no packaging here")
    monkeypatch.syspath_prepend(str(ROOT / "packaging"))
    import manylinux
    import wheels

    def packed(name: str, code: str) -> pathlib.Path:
        source, library = tmp_path / "module.c", tmp_path / "module.so"
        source.write_text(code)
        run(compiler, "-x", "c", "-shared", "-fPIC", source, "-o", library)
        with zipfile.ZipFile(tmp_path / "made.whl", "w") as archive:
            archive.write(library, f"zokernels/{name}")
        return tmp_path / "made.whl"

    tools = manylinux.Tools(platform.machine())
    called = "long PyLong_AsLong(void*); long f(void* x) { return PyLong_AsLong(x); }"
    wheels.unresolved(packed("_host.so", called), tools)
    with pytest.raises(SystemExit, match=r"lib/libzokernels_cpu\.so: expected .* got PyLong_AsLong"):
        wheels.unresolved(packed("lib/libzokernels_cpu.so", called), tools)
    newer = "long __isoc23_newer(void); long f(void) { return __isoc23_newer(); }"
    with pytest.raises(SystemExit, match=r"_host\.so: expected functions of glibc 2\.28, got __isoc23_newer"):
        wheels.unresolved(packed("_host.so", newer), tools)
