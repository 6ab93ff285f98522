"""The notebook examples/first_hour.ipynb: its cells run in order, each of them twice."""

from __future__ import annotations

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"
#: A kernel's work: it runs the cells in one namespace, each twice, as somebody does who presses the keys again.
RUN = """
import json, pathlib, sys, tempfile, torch
torch.set_num_threads(1)
tempfile.tempdir = sys.argv[2]
scope = {"__name__": "__main__"}
for cell in json.loads(pathlib.Path(sys.argv[1]).read_text())["cells"]:
    if cell["cell_type"] == "code":
        for time in range(2):
            exec(compile("".join(cell["source"]), cell["id"], "exec"), scope)
        print("ran", cell["id"])
"""


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_every_cell_runs_twice(tmp_path):
    for package in ("transformers", "peft", "sklearn"):
        pytest.importorskip(package)
    command = [sys.executable, "-c", RUN, str(NOTEBOOK), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("ran cell-") == sum(cell["cell_type"] == "code" for cell in cells())
    assert "bit for bit (8 tensors)" in done.stdout
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith("tmp")] == []  # writes to its folder alone


def test_it_shows_what_the_issue_of_a_first_hour_is():
    """Its cells name what they are about, and links lead to files."""
    text = "".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "markdown")
    for heading in ("A model of your own", "LoRA", "Trainer", "Killed", "Replay", "population"):
        assert heading in text
    for cell in cells():
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
            assert not [o for o in cell["outputs"] if o["output_type"] == "error"]
