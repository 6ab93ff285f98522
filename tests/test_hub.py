"""The layout of the Hugging Face Hub: read by the builder's own reader, loaded by ``kernels``, without a
network.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
if not (ROOT / "packaging" / "hub.py").exists():
    pytest.skip("no packaging here", allow_module_level=True)
kernels = pytest.importorskip("kernels")

#: Loads the kernel beside the installed package.  Any connection is an error.
LOAD = """
import socket, sys
def refuse(*a, **k): raise AssertionError("a connection")
socket.socket.connect = socket.create_connection = refuse
import pathlib, torch
from kernels import get_local_kernel, get_loaded_kernels
hub = get_local_kernel(pathlib.Path(sys.argv[1]), backend="cpu")
(loaded,) = get_loaded_kernels()
print(hub.__name__, loaded.metadata.id)
installed = [name for name in sys.modules if name.split(".")[0] == "zokernels"]
assert not installed, "the installed package was used"
theta = torch.full((4,), -0.0)
hub.combine_(theta, 0, 1.0, streams=0)
print(" ".join(f"{b & 0xFFFFFFFF:08x}" for b in theta.view(torch.int32).tolist()))
ops = getattr(torch.ops, loaded.metadata.id)
print(ops.combine_.default._schema.name, hasattr(torch.ops.zokernels, "combine_"))
weights = torch.randn(50, generator=torch.Generator().manual_seed(1)).bfloat16()
import zokernels
ours = weights.clone()
zokernels.combine_(ours, 7, -0.3, streams=5, decay=0.9, rounding="stochastic", rounding_seed=3)
theirs = weights.clone()
hub.combine_(theirs, 7, -0.3, streams=5, decay=0.9, rounding="stochastic", rounding_seed=3)
assert torch.equal(ours, theirs) and not torch.equal(ours, weights)
print("the same bits")
"""


@pytest.fixture(scope="module")
def hub():
    sys.path.insert(0, str(ROOT / "packaging"))
    try:
        return importlib.import_module("hub")
    finally:
        sys.path.remove(str(ROOT / "packaging"))


@pytest.fixture(scope="module")
def project(hub, tmp_path_factory) -> pathlib.Path:
    return hub.make(tmp_path_factory.mktemp("hub"), "someone/zokernels")


def test_the_builder_reads_it(project):
    from kernels._rust import Backend, Build

    build = Build.open(project)
    assert build.general.backends == [Backend.CPU, Backend.CUDA]
    assert (project / "torch-ext" / "zokernels" / "__init__.py").exists()
    assert "- `combine_`" in (project / "CARD.md").read_text()
    assert not (project / "torch-ext" / "zokernels" / "cli.py").exists()


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_metadata_describes_the_files(project, backend):
    from kernels._rust import Digest, DigestValidationError, Metadata

    variant = project / "build" / f"torch-{backend}"
    metadata = Metadata.read_from_file(variant / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
    path = variant / "wire.py"
    text = path.read_text()
    path.write_text(text + "\n")
    try:
        with pytest.raises(DigestValidationError):
            metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
    finally:
        path.write_text(text)


def test_it_loads_without_a_network_and_has_the_bits(project, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-B", "-c", LOAD, project],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    module, golden, operation, same = done.stdout.splitlines()
    name = json.loads((project / "build" / "torch-cpu" / "metadata.json").read_text())["id"]
    assert module == f"{name} {name}"
    assert golden == "3fab67a2 bf030c3e 3fe72676 bf395d96"  # the first normals of tests/golden.json
    assert operation == f"{name}::combine_ False"
    assert same == "the same bits"


def test_another_source_is_another_id(hub, project, tmp_path, monkeypatch):
    real = hub.sources()
    monkeypatch.setattr(hub, "sources", lambda: {**real, "wire.py": real["wire.py"] + "#\n"})
    other = hub.make(tmp_path, "someone/zokernels")
    ids = [
        json.loads((p / "build" / "torch-cpu" / "metadata.json").read_text())["id"] for p in (project, other)
    ]
    assert ids[0] != ids[1]
    assert all(name.startswith("_zokernels_cpu_") and name.isidentifier() for name in ids)


def test_a_change_that_no_longer_fits_is_an_error(hub, monkeypatch):
    monkeypatch.setattr(hub, "CHANGED", [("wire.py", "what is not there", "")])
    with pytest.raises(SystemExit, match="expected 'what is not there' once, got it 0 times"):
        hub.sources()
