"""The layout of the Hugging Face Hub: read by the builder's own reader, loaded by ``kernels``, without a
network.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
if not (ROOT / "packaging" / "hub.py").exists():
    pytest.skip("no packaging here", allow_module_level=True)
kernels = pytest.importorskip("kernels")


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
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    use = ROOT / "packaging" / "use_hub.py"
    done = subprocess.run(
        [sys.executable, "-B", use, project], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    name = json.loads((project / "build" / "torch-cpu" / "metadata.json").read_text())["id"]
    ran = re.fullmatch(r"torch-cpu: (\d+) values of the contract on reference; (\w+)", done.stdout.strip())
    assert ran is not None, done.stdout
    assert int(ran[1]) > 100
    assert ran[2] == name


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


def test_a_module_loaded_by_its_full_name_is_an_error(hub, tmp_path, monkeypatch):
    """It would be the installed package's, where there is one."""
    (tmp_path / "zokernels").mkdir()
    (tmp_path / "zokernels" / "wire.py").write_text('host = importlib.import_module("zokernels._host")\n')
    monkeypatch.setattr(hub, "ROOT", tmp_path)
    monkeypatch.setattr(hub, "CHANGED", [])
    with pytest.raises(SystemExit, match=r"wire\.py, line 1: expected a module's relative name"):
        hub.sources()
