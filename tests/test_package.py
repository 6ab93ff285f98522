"""Importing, choosing backends, and the report."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import zokernels
from zokernels.backends import library, registry


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_import_probes_nothing_and_says_nothing():
    done = run_python("""
        import sys, torch
        before = set(sys.modules)
        torch.cuda.is_available = torch.cuda.init = lambda *a: (_ for _ in ()).throw(AssertionError("probed"))
        import zokernels
        assert "triton" not in set(sys.modules) - before, "triton imported"
        assert not hasattr(torch.ops.zokernels_cpu, "combine"), "library loaded"
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_loads_nothing_but_the_package_itself():
    """Not one module of others that ``import torch`` has not loaded already: importing them would take
    time.
    """
    done = run_python("""
        import sys, torch
        before = set(sys.modules)
        import zokernels, zokernels.optim
        print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] != "zokernels"))
        print(*(name for name in ("bench", "examples", "integrations", "offload", "cli")
                if f"zokernels.{name}" in sys.modules))
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n\n", "")


def test_report(capsys):
    done = subprocess.run([sys.executable, "-m", "zokernels"], capture_output=True, text=True, check=True)
    for expected in (
        "zokernels",
        zokernels.__version__,
        "torch",
        "instruction sets",
        "backend cpu",
        "chosen for cpu",
    ):
        assert expected in done.stdout
    assert all(len(line) < 200 for line in done.stdout.splitlines())


def test_selection():
    assert registry.select("cpu").name == "cpu"
    with zokernels.backend("reference"):
        assert registry.select("cpu").name == "reference"
        with zokernels.backend("cpu"):
            assert registry.select("cpu").name == "cpu"
        with zokernels.backend(None):
            assert registry.select("cpu").name == "cpu"
        assert registry.select("cpu").name == "reference"
    assert registry.select("cpu").name == "cpu"


def test_environment_variable():
    code = "import zokernels; print(zokernels.backends.select('cpu').name)"
    assert run_python(code, ZOKERNELS_BACKEND="reference").stdout.strip() == "reference"
    assert run_python(code, ZOKERNELS_BACKEND="auto").stdout.strip() == "cpu"
    failed = run_python(code, ZOKERNELS_BACKEND="metal")
    assert "ZOKERNELS_BACKEND: expected one of reference, cpu, triton, cuda, got 'metal'" in failed.stderr
    isa = "import torch, zokernels; zokernels.noise(3, seed=1)"
    assert (
        "ZOKERNELS_CPU_ISA: expected auto or an instruction set"
        in run_python(isa, ZOKERNELS_CPU_ISA="sse9").stderr
    )


def test_unknown_backend():
    message = "backend: expected one of reference, cpu, triton, cuda, got 'tpu'"
    with pytest.raises(ValueError, match=message), zokernels.backend("tpu"):
        pass


def test_fresh_memory_is_poisoned_in_tests():
    made = [
        torch.empty(3),
        torch.empty_like(torch.ones(2).half()),
        torch.ones(1).new_empty(2, dtype=torch.bfloat16),
    ]
    assert all(t.isnan().all() for t in made)
    assert (torch.empty(2, dtype=torch.int8) == 127).all()
    assert (torch.empty(2, dtype=torch.uint8) == 255).all()


def test_backend_on_the_wrong_device(monkeypatch):
    monkeypatch.setenv("ZOKERNELS_BACKEND", "cpu")
    with pytest.raises(
        zokernels.BackendUnavailable, match="backend 'cpu': expected tensors on cpu, got cuda"
    ):
        registry.select("cuda")


def test_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(zokernels.BackendUnavailable, match="'cpu' is not built; build it with: pip install"):
        library.load("cpu")
    (tmp_path / "libzokernels_cuda.so").write_bytes(b"not a library")
    with pytest.raises(
        zokernels.BackendUnavailable, match=r"does not load with torch .*; rebuild it with: ZOKERNELS_CUDA=1"
    ):
        library.load("cuda")


def test_without_a_library_the_reference_serves():
    done = run_python("""
        import pathlib, torch, zokernels
        from zokernels.backends import library
        library.FOLDER = pathlib.Path("nowhere")
        theta = torch.zeros(3)
        zokernels.combine_(theta, 1, 1.0, streams=0)
        print(zokernels.backends.select("cpu").name, theta.abs().sum().item() > 0)
    """)
    assert done.stdout.split() == ["reference", "True"], done.stderr
