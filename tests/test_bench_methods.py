"""The table of methods: complete, live, and honest about its forwards."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest
import torch

from bench.methods import hotpath, run
from bench.methods.catalog import METHODS
from bench.methods.tasks import TASKS
from zokernels import optim

ROOT = pathlib.Path(__file__).resolve().parent.parent
ON_WEIGHTS = [m for m in METHODS if m.task not in TASKS]


def test_every_optimizer_is_a_row():
    kinds = {n: what for n in optim.__all__ if isinstance(what := getattr(optim, n), type)}
    classes = {n for n, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer)} - {"ZerothOrder"}
    used = {n for n in classes if any(n + "(" in m.use for m in METHODS)}
    assert used == classes
    assert len({m.name for m in METHODS}) == len(METHODS)


@pytest.mark.parametrize("method", ON_WEIGHTS, ids=lambda m: m.name)
def test_forwards_of_ours_and_of_the_eager_form(method, monkeypatch):
    """Both run the closure as often as the table says, and both change the weights."""
    calls = []

    def losses():
        return lambda: calls.append(0) or 1.0 + 0.01 * torch.rand(()).item()

    monkeypatch.setattr(hotpath, "losses", losses)
    for step in hotpath.run_of(method, torch.float32, "cpu", 0.05):
        calls.clear()
        step()
        assert len(calls) == method.forwards


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    document = folder / "methods.md"
    document.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    command = [sys.executable, "-m", "bench", "methods", "--tiny", "--json", str(folder / "m.json")]
    done = subprocess.run(
        [*command, "--write", str(document)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return {"stdout": done.stdout, "document": document, **json.loads((folder / "m.json").read_text())}


def test_rows(result):
    assert [r["method"] for r in result["rows"]] == [m.name for m in METHODS]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["eager_seconds"] / row["seconds"])
        assert row["curve"][0] == [0, row["loss_first"]]
        assert row["curve"][-1][0] <= result["budget"]
        assert row["method"] in result["stdout"]


def test_document(result):
    text = result["document"].read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert all(r["method"] in text for r in result["rows"])
    assert result["document"].with_suffix(".png").stat().st_size > 10_000


def test_committed_table_is_of_these_methods():
    """docs/methods.md was written by a run with the lines that stand in the catalogue."""
    text = (ROOT / "docs" / "methods.md").read_text()
    for method in METHODS:
        assert f"`{method.use}`".replace("|", "\\|") in text, method.name
