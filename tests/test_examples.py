"""The examples, each as a script; one of them stopped half-way and started again.

The Trainer's: test_packaging.py.
"""

from __future__ import annotations

import ast
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch

from zokernels.examples import encoder, reviews

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _weights_and_sentences():
    pytest.importorskip("transformers")
    try:
        reviews.fetch()
        encoder.folder()
    except SystemExit as error:
        pytest.skip(str(error))


def here(monkeypatch, name: str, folder: pathlib.Path, steps: int) -> dict:
    """Runs an example in this process, which has imported what it needs."""
    monkeypatch.setattr(sys, "argv", [name, str(folder), str(steps)])
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


def test_the_plain_loop_resumes_to_the_same_bits(tmp_path, monkeypatch, capsys):
    log, model = tmp_path / "run.zk", tmp_path / "model.pt"
    here(monkeypatch, "plain_pytorch", tmp_path, 3)["optimizer"].trajectory.close()
    whole, weights = log.read_bytes(), torch.load(model, weights_only=True)
    log.write_bytes(whole[:-40])  # one record, and a part of one
    capsys.readouterr()
    here(monkeypatch, "plain_pytorch", tmp_path, 3)["optimizer"].trajectory.close()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["2", "3"]
    assert log.read_bytes() == whole
    again = torch.load(model, weights_only=True)
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_lightning_saves_the_optimizer(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    here(monkeypatch, "lightning_module", tmp_path, 2)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["zo"]["step"] == saved["global_step"] == 2


@pytest.mark.slow
def test_a_model_from_disk_in_a_limit_that_memory_does_not_keep(tmp_path):
    import json

    command = [sys.executable, "examples/offload_demo.py", "--tiny", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads((tmp_path / "report.json").read_text())
        assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
        assert report["same_losses"] is True
        assert report["streamed"]["losses"] == report["in_memory"]["losses"]
        assert len(set(report["streamed"]["losses"])) == 3
        assert report["streamed"]["private"] <= report["limit_mib"] < report["in_memory"]["private"]
        assert "error" in report["in_memory_limited"]
        assert {s[0] for s in report["streamed"]["spans"]} >= {"copy-in", "update", "compute", "copy-out"}
    finally:  # pytest keeps the folders of its last runs
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()


@pytest.mark.parametrize("name", ["transformers_trainer", "plain_pytorch"])
def test_examples_are_short(name):
    """Counts the lines of code, without the module's docstring, comments and empty lines."""
    source = (ROOT / "examples" / f"{name}.py").read_text()
    begin = ast.parse(source).body[0].end_lineno
    code = [line for line in source.splitlines()[begin:] if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 25
